"""A watched teacher's trajectories on disk: a student of them needs no teacher, text encoder or autoencoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from perflow_diffusers.flow import SigmaWindows
from perflow_diffusers.io.documents import read_json, write_json
from perflow_diffusers.io.writer import specs_of, write_safetensors
from perflow_training.buffer import SolvedWindows
from perflow_training.config import TrainingConfig
from perflow_training.data.identity import model_identity, same_model
from perflow_training.data.order import permutation
from perflow_training.errors import DataError
from perflow_training.objective import windows_between
from perflow_training.rng import Draws
from perflow_training.solves import PipelineSolves
from perflow_training.teacher.backbone import Backbone
from perflow_training.teacher.call import Call, Form
from perflow_training.teacher.conditions import packed, unpacked
from perflow_training.teacher.observed import flow_backbone

MANIFEST = "trajectories.json"
FORMAT = 1
#: options that decide what the trajectories are
DECIDE = (
    "seed", "window_boundaries", "window_shift", "solver_steps", "solve_guidance", "caption_dropout",
    "solve_batch_size", "recommended_guidance_scale", "pipeline_arguments", "resolution",
)  # fmt: skip


def write_trajectories(
    folder: Path,
    solves: PipelineSolves,
    config: TrainingConfig,
    count: int,
    part: tuple[int, int] = (0, 1),
    dtype: torch.dtype = torch.float16,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Writes solves 0..`count` - 1, a file each; returns how many files there are now.

    `part` (i, n): those whose number leaves i when divided by n, for n processes side by side; what they write does
    not depend on n. Files that are there are kept, so that a killed run goes on. States are stored in float32, what
    the network is told in `dtype`. `config`: with its windows spelt out.

    Raises DataError if the folder holds trajectories of other options.
    """
    made = {
        "format": FORMAT,
        "model": model_identity(config.pretrained_model_name_or_path, config.revision, network=True),
        "source": solves.stream.source.fingerprint(),
        **{name: getattr(config, name) for name in DECIDE},
        "dtype": str(dtype).removeprefix("torch."),
        "call": asdict(solves.observed.call),
    }
    made = json.loads(json.dumps(made))
    folder.mkdir(parents=True, exist_ok=True)
    found = _manifest(folder)
    if found is None:
        write_json(folder, MANIFEST, made, overwrite=True)
    elif found != made:
        odd = sorted(name for name in made if found.get(name) != made[name])
        raise DataError(
            f"{folder} holds trajectories that were made with other options ({', '.join(odd)}). Choose another "
            "folder, or delete this one."
        )
    for number in range(count):
        path = folder / _name(number)
        if number % part[1] != part[0] or path.is_file():
            solves.skip()
        else:
            _write(path, solves.solve(number), dtype)
        progress(number + 1)
    return len(list(folder.glob("solve-*.safetensors")))


def _name(number: int) -> str:
    return f"solve-{number:06d}.safetensors"


def _manifest(folder: Path) -> dict[str, Any] | None:
    return read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None


def _write(path: Path, solved: SolvedWindows, dtype: torch.dtype) -> None:
    rows = len(solved.cond)
    states = [*solved.z_start.split(rows), solved.z_end[-rows:]]
    told, said = packed(solved.cond.to("cpu", dtype), rows)
    tensors: dict[str, Tensor] = {f"state.{k}": z.float().cpu().contiguous() for k, z in enumerate(states)}
    tensors |= {f"cond.{name}": value.contiguous() for name, value in told.items()}
    header = {"format": "pt", "conditions": json.dumps(said), "names": json.dumps(solved.names)}
    write_safetensors(path, specs_of(tensors), tensors.items(), header, overwrite=True)


class CachedSolves:
    """Solved windows out of a folder of trajectories, each file once in a random order, then all again.

    Raises DataError for a folder that is empty, or whose trajectories were made with other options or another teacher.
    """

    needs_teacher = False

    def __init__(self, folder: str | Path, config: TrainingConfig, draws: Draws, device: torch.device):
        self.folder, self.config, self.draws, self.device = Path(folder), config, draws, device
        made = _manifest(self.folder)
        self.files = sorted(self.folder.glob("solve-*.safetensors"))
        if made is None or not self.files:
            raise DataError(
                f"`train_cache_dir={folder}` holds no trajectories. Make them with training/precompute.py and "
                "--trajectories."
            )
        model = model_identity(config.pretrained_model_name_or_path, config.revision, network=True)
        if made["format"] != FORMAT or not same_model(made["model"], model):
            raise DataError(f"The trajectories in {folder} are of another teacher ({made['model']}) than {model}.")
        asked = {"solve_batch_size": config.solve_batch_size, "solve_guidance": config.solve_guidance}
        for name, value in asked.items():
            if made[name] != value:
                raise DataError(f"The trajectories in {folder} have `{name}={made[name]}` and the options {value}.")
        self.windows = SigmaWindows(tuple(made["window_boundaries"]), made["window_shift"])
        self.guidance_scale: float | None = made["recommended_guidance_scale"]
        call = made["call"]
        forms = {side: Form(tuple(call[side]["axes"]), call[side]["listed"]) for side in ("sees", "says")}
        self.call = Call(**{**call, **forms})

    def backbone(self, network: torch.nn.Module) -> Backbone:
        """The network as it was called when the trajectories were made."""
        return flow_backbone(network, self.call)

    def solve(self, number: int) -> SolvedWindows:
        """The windows of one file."""
        place = number * self.draws.num_processes + self.draws.process_index
        epoch, place = divmod(place, len(self.files))
        path = self.files[int(permutation(self.config.seed, epoch, len(self.files))[place])]
        with safe_open(path, "pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name).to(self.device) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        states = [tensors[f"state.{k}"] for k in range(self.windows.num_windows + 1)]
        told = {name.removeprefix("cond."): value for name, value in tensors.items() if name.startswith("cond.")}
        cond = unpacked(told, json.loads(header["conditions"])).to(dtype=torch.float32)
        return windows_between(states, self.windows, cond, tuple(json.loads(header["names"])))

    def costs(self, student: Backbone) -> Tensor:
        """Not known: trajectories on disk do not go on from elsewhere. Raises ValueError."""
        raise ValueError("The cost of windows cannot be measured on trajectories from disk.")

    def state_dict(self) -> dict:
        return {"trajectories": len(self.files)}

    def load_state_dict(self, state: dict) -> None:
        """Raises DataError if files have come or gone since."""
        if state != self.state_dict():
            raise DataError(f"{self.folder} has {len(self.files)} files, at the checkpoint it had {state}.")

    def describe(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing is open."""
