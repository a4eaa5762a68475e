"""EMA and checkpoints of weights that are spread over processes, in a world of one."""

import pytest
import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from torch.distributed.fsdp import fully_shard

from perflow_training.checkpoint import copy_into, full_tensors, whole


@pytest.fixture
def sharded():
    """A linear layer whose parameters are DTensors."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh("cpu", (1,))
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 4)
    plain = {name: value.detach().clone() for name, value in layer.named_parameters()}
    yield fully_shard(layer, mesh=mesh), plain
    dist.destroy_process_group()


def test_the_ema_of_sharded_weights_is_that_of_whole_ones(sharded):
    layer, plain = sharded
    parameters = list(layer.parameters())
    assert hasattr(parameters[0], "full_tensor")
    ema = EMAModel(parameters, decay=0.9, use_ema_warmup=True, power=0.75, foreach=True)
    reference = EMAModel(plain.values(), decay=0.9, use_ema_warmup=True, power=0.75)
    for value in plain.values():
        value.requires_grad_(True)
    for step in range(4):
        with torch.no_grad():
            for parameter, value in zip(parameters, plain.values(), strict=True):
                parameter.add_(step + 1)
                value.add_(step + 1)
        ema.step(parameters)
        reference.step(plain.values())
    got = full_tensors(list(plain), ema.shadow_params)
    for value, wanted in zip(got.values(), reference.shadow_params, strict=True):
        torch.testing.assert_close(value, wanted)
        assert type(value) is torch.Tensor


def test_whole_tensors_go_back_into_sharded_ones(sharded):
    layer, plain = sharded
    wanted = torch.arange(12.0).reshape(4, 3)
    copy_into(layer.weight, wanted)
    assert torch.equal(whole(layer.weight), wanted)
    copy_into(plain["weight"], wanted)
    assert torch.equal(plain["weight"], wanted)
    assert whole(1.5) == 1.5
