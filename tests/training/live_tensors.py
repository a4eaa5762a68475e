"""How many bytes of tensors this process holds."""

import gc
import warnings
from contextlib import contextmanager

import torch


def live_bytes() -> int:
    """Of all storages that any live tensor has, each counted once; a shard is a tensor of its own."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at every object wakes the deprecated ones
        tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    return storage_bytes(tensors)


@contextmanager
def only_new():
    """`live_bytes` sees what is made from here on alone, and is fast: the rest of the process is set aside."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def storage_bytes(tensors) -> int:
    """Of the storages of `tensors`, each counted once."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors if not one.is_meta}
    return sum(storages.values())
