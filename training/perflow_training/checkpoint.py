"""Checkpoints that appear only when they are complete, and from which a run goes on as if it had not been stopped."""

import json
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from .config import ConfigError, TrainingConfig, config_of
from .student import load_trained, trained

STATE, CONFIG, EMA, STUDENT = "trainer_state.json", "config.json", "ema.safetensors", "student.safetensors"
PREFIX = "checkpoint-"
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted((p for p in found if (p / STATE).is_file()), key=lambda path: int(path.name[len(PREFIX) :]))


def find_checkpoint(config: TrainingConfig) -> Path | None:
    """The folder that `resume_from_checkpoint` means; None for a fresh start (`latest` of a run without any).

    Raises ConfigError for a name that is none, and for a fresh start among the checkpoints of another run.
    """
    asked, there = config.resume_from_checkpoint, checkpoints(config.output_dir)
    if not asked and there:
        raise ConfigError(
            f"{config.output_dir} holds {there[-1].name} of an earlier run. Go on with resume_from_checkpoint=latest, "
            "choose another `output_dir`, or delete the old one."
        )
    if not asked:
        return None
    if asked == "latest":
        return there[-1] if there else None
    for path in (Path(asked), Path(config.output_dir) / asked):
        if (path / STATE).is_file():
            return path
    have = ", ".join(path.name for path in there) or "none"
    raise ConfigError(f"`resume_from_checkpoint={asked}` is no checkpoint. In {config.output_dir} there are: {have}.")


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was made."""
    return json.loads((folder / STATE).read_text())["step"]


def use_trained_weights_only(accelerator: Accelerator) -> None:
    """Makes accelerate save and load the trained parameters alone, as safetensors, unless they are sharded."""

    def save(models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            for model in models:
                values = trained(accelerator.unwrap_model(model))
                save_file(
                    {name: value.detach().contiguous() for name, value in values.items()}, Path(folder) / STUDENT
                )

    def load(models: list[nn.Module], folder: str) -> None:
        while models:
            load_trained(accelerator.unwrap_model(models.pop()), load_file(Path(folder) / STUDENT))

    if accelerator.distributed_type not in SHARDED:
        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)


def save_checkpoint(
    accelerator: Accelerator,
    config: TrainingConfig,
    step: int,
    state: dict,
    ema: dict[str, Tensor],
    windows: dict[str, Tensor],
) -> Path:
    """Writes output_dir/checkpoint-`step`, atomically, and deletes those above `checkpoints_total_limit`.

    `state` is JSON and the same on every process, `ema` the EMA of the trained weights, `windows` this process's
    buffer.
    """
    out = Path(config.output_dir)
    folder, temporary = out / f"{PREFIX}{step}", out / f".{PREFIX}{step}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    save_file(windows, temporary / _windows_name(accelerator))
    if accelerator.is_main_process:
        save_file(ema, temporary / EMA)
        (temporary / CONFIG).write_text(json.dumps(config.to_dict(), indent=2))
        (temporary / STATE).write_text(json.dumps({**state, "step": step, "processes": accelerator.num_processes}))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _sync(temporary)
        if folder.exists():  # of the same step: never without one of them
            os.replace(folder, out / f".{PREFIX}{step}.old.tmp")
        os.replace(temporary, folder)
        shutil.rmtree(out / f".{PREFIX}{step}.old.tmp", ignore_errors=True)
        if config.checkpoints_total_limit:
            for old in checkpoints(out)[: -config.checkpoints_total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def load_checkpoint(
    accelerator: Accelerator, config: TrainingConfig, folder: Path
) -> tuple[dict, dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Restores what accelerate holds; returns (state, EMA, this process's windows, options that have changed)."""
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
    return state, load_file(folder / EMA), windows, changed


def full_tensors(names: list[str], values: list[Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU; all processes must call this, for shards are gathered."""
    return {name: whole(value).detach().cpu().contiguous().clone() for name, value in zip(names, values, strict=True)}


def whole(value: Tensor | float) -> Tensor | float:
    """The whole of a tensor that may be sharded; all processes must call this."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


@torch.no_grad()
def copy_into(target: Tensor, value: Tensor) -> None:
    """A whole tensor into a plain or sharded one."""
    if hasattr(target, "device_mesh"):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def _windows_name(accelerator: Accelerator) -> str:
    return f"windows-{accelerator.process_index:05d}.safetensors"


def _sync(folder: Path) -> None:
    """Makes the files survive a power cut before the rename says that they are there."""
    for path in [*folder.rglob("*"), folder]:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
