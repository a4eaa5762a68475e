"""Checkpoints that appear only when they are complete, and from which a run goes on as if it had not been stopped."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import overload

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from perflow_diffusers.io.atomic import sync, sync_folder
from perflow_diffusers.io.writer import specs_of, write_safetensors
from perflow_training.config import ConfigError, TrainingConfig, config_of
from perflow_training.lazy import read_afresh
from perflow_training.manifest import entries, files_of, write_manifest
from perflow_training.processes import FailedSomewhere, on_all
from perflow_training.run_folder import STATE, checkpoint_name, keep_newest, put_in_place, write_time
from perflow_training.student import load_trained, trained

CONFIG, EMA, STUDENT = "config.json", "ema.safetensors", "student.safetensors"


class CheckpointNotWritten(OSError):
    """A checkpoint that could not be written, on any process; the message says where and how much space there is."""


def use_trained_weights_only(accelerator: Accelerator) -> None:
    """Makes accelerate save and load the trained parameters alone, as safetensors, unless they are sharded."""

    def save(models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            for model in models:
                values = trained(accelerator.unwrap_model(model))
                write_safetensors(Path(folder) / STUDENT, specs_of(values), values.items())

    def load(models: list[nn.Module], folder: str) -> None:
        while models:
            load_trained(accelerator.unwrap_model(models.pop()), read_afresh(Path(folder) / STUDENT))

    if accelerator.distributed_type != DistributedType.FSDP:
        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)


def save_checkpoint(
    accelerator: Accelerator,
    config: TrainingConfig,
    step: int,
    state: dict,
    ema: Mapping[str, Tensor],
    windows: Mapping[str, Tensor],
) -> Path:
    """Writes output_dir/checkpoint-`step`, atomically, and deletes those above `checkpoints_total_limit`.

    `state` is JSON and the same on every process, `ema` the EMA of the trained weights, sharded or not, `windows` this
    process's buffer; of these, one tensor at a time is gathered and copied. Raises CheckpointNotWritten on all
    processes if one of them cannot write its part; what was there before stays.
    """
    out = Path(config.output_dir)
    temporary = out / f".{checkpoint_name(step)}.tmp"
    main = accelerator.is_main_process

    def begin() -> None:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write() -> None:
        accelerator.save_state(str(temporary))
        write_safetensors(temporary / _windows_name(accelerator), specs_of(windows), windows.items())
        if main:
            (temporary / CONFIG).write_text(json.dumps(config.to_dict(), indent=2))
            content = {**state, "step": step, "processes": accelerator.num_processes, "manifest": True}
            (temporary / STATE).write_text(json.dumps(content))

    def gather() -> None:  # only when nothing else has failed: a process that does not take part makes others hang
        write_gathered(ema, temporary / EMA if main else None)

    def hashed() -> dict[str, dict]:
        # its share of the files, so that no process waits for one that reads them all
        return entries(temporary, names[accelerator.process_index :: accelerator.num_processes])

    def finish() -> None:
        if main:
            write_manifest(temporary, files, write_time(out))
            readable(temporary, temporary / STATE)
            sync(temporary)
            put_in_place(temporary, out / checkpoint_name(step))
            sync_folder(out)

    try:
        on_all(accelerator, begin)
        on_all(accelerator, write)
        on_all(accelerator, gather)
        # a network disk may show a process its own files first
        names = sorted(set(gather_object(on_all(accelerator, lambda: files_of(temporary)))))
        files = dict(gather_object(list(on_all(accelerator, hashed).items())))
        on_all(accelerator, finish)
    except FailedSomewhere as error:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointNotWritten(_not_written(out, step, error)) from error
    if main:
        keep_newest(out, config.checkpoints_total_limit)
    accelerator.wait_for_everyone()
    return out / checkpoint_name(step)


def load_checkpoint(
    accelerator: Accelerator, config: TrainingConfig, folder: Path
) -> tuple[dict, Mapping[str, Tensor], dict[str, Tensor], list[str]]:
    """Restores what accelerate holds; returns (state, EMA, this process's windows, options that have changed).

    The EMA is read as it is asked for.
    """
    state = json.loads((folder / STATE).read_text())
    if state["processes"] != accelerator.num_processes:
        raise ConfigError(
            f"{folder} was written by {state['processes']} processes and there are {accelerator.num_processes} now: "
            "data and windows would not be the same. Launch as many as before, or start a new run."
        )
    then, now = config_of(json.loads((folder / CONFIG).read_text())).to_dict(), config.to_dict()
    changed = [f"{name}: {then[name]} -> {now[name]}" for name in now if then[name] != now[name]]
    accelerator.load_state(str(folder))
    windows = load_file(folder / _windows_name(accelerator))
    return state, read_afresh(folder / EMA), windows, changed


def write_gathered(values: Mapping[str, Tensor], path: Path | None) -> None:
    """Writes whole tensors of what may be sharded; all processes must call this, those without a `path` write nothing.

    One tensor at a time is whole, on whatever process. An error of the one that writes is raised when all are done.
    """
    stream = _gathered(values, path is not None)
    try:
        if path is not None:
            write_safetensors(path, specs_of(values), stream)
    finally:
        for _ in stream:  # the others wait for this process's part of each tensor
            pass


def full_tensors(values: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Whole tensors on the CPU, none without `keep`; all processes must call this, for shards are gathered."""
    return {name: value.clone() for name, value in _gathered(values, keep)}


def _gathered(values: Mapping[str, Tensor], keep: bool) -> Iterator[tuple[str, Tensor]]:
    for name, value in values.items():
        tensor = whole(value)
        if keep:
            yield name, tensor.detach().cpu().contiguous()
        del tensor  # before the next one comes


@overload
def whole(value: Tensor) -> Tensor: ...
@overload
def whole(value: float) -> float: ...
def whole(value: Tensor | float) -> Tensor | float:
    """The whole of a tensor that may be sharded; all processes must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def number_of(value: Tensor | float | None) -> float | None:
    """The same as a number, which waits for the device."""
    return None if value is None else float(whole(value))


@torch.no_grad()
def copy_into(target: Tensor, value: Tensor) -> None:
    """A whole tensor into a plain or sharded one."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def readable(folder: Path, like: Path) -> None:
    """Gives the files in `folder` the rights of `like`, an ordinary one: safetensors writes for the owner alone."""
    wanted = like.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o666 != wanted:
            path.chmod(wanted)


def _not_written(out: Path, step: int, error: Exception) -> str:
    try:
        free = f"its disk has {shutil.disk_usage(out).free / 2**20:,.1f} MiB free"
    except OSError:
        free = "it cannot be looked at"
    return f"{out / checkpoint_name(step)} could not be written ({error}); {free}."


def _windows_name(accelerator: Accelerator) -> str:
    return f"windows-{accelerator.process_index:05d}.safetensors"
