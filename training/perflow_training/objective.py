"""What the student learns: solved windows of the teacher, points on their chords, the loss and its window weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from perflow_diffusers.flow import NoisePath, Windows, euler, interpolate, solve, target
from perflow_training.buffer import SolvedWindows
from perflow_training.config import ConfigError, TrainingConfig
from perflow_training.teacher.backbone import Backbone, Boundaries
from perflow_training.teacher.conditions import Conditions

Guidance = float | Tensor | None


@dataclass(frozen=True)
class Solver:
    """How the teacher's windows are solved: `method`, `steps` a window and `spacing` as `flow.solve` has them."""

    method: str
    steps: int
    spacing: str

    @classmethod
    def of(cls, config: TrainingConfig) -> "Solver":
        return cls(config.solver, config.solver_steps, config.solver_spacing)

    def __call__(
        self, predict: Callable, teacher: Backbone, z: Tensor, start: int | Tensor, end: int | Tensor
    ) -> Tensor:
        """The state at `end`, like z (B, C, H, W), of the flow of `predict` that is at z at `start`."""
        return solve(
            predict, teacher.path, z, start, end, self.steps,
            method=self.method, prediction=teacher.prediction, spacing=self.spacing,
        )  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """What the student's output is compared with (`prediction_type`) and how: `kind` is l2 or pseudo_huber."""

    prediction_type: str
    kind: str = "l2"
    huber_c: float = 0.03

    @classmethod
    def of(cls, config: TrainingConfig) -> "Loss":
        return cls(config.parameterisation, config.loss, config.huber_c)


def windows_of(config: TrainingConfig, num_train_timesteps: int) -> Windows:
    """The windows that the config asks for. Raises ConfigError if they do not fit the teacher's N timesteps."""
    given = config.window_boundaries
    if given is None:
        if config.num_time_windows > num_train_timesteps:
            raise ConfigError(
                f"`num_time_windows={config.num_time_windows}`: the teacher has {num_train_timesteps} timesteps."
            )
        return Windows.uniform(config.num_time_windows, num_train_timesteps)
    if given[0] != num_train_timesteps:
        raise ConfigError(
            f"`window_boundaries={given}` must begin at {num_train_timesteps}, the teacher's noisiest timestep: "
            "sampling starts there."
        )
    return Windows(tuple(int(boundary) for boundary in given))


def guidance_of(scale: float | list[float] | None, uniform: Tensor) -> Guidance:
    """None, the number, or one number of the range for each of `uniform` (B,) in 0..1."""
    if isinstance(scale, list):
        return scale[0] + (scale[1] - scale[0]) * uniform
    return None if scale == 1.0 else scale


@torch.no_grad()
def solve_trajectories(
    teacher: Backbone,
    windows: Windows,
    solver: Solver,
    noise: Tensor,
    cond: Conditions,
    uncond: Conditions,
    guidance: Guidance = None,
) -> SolvedWindows:
    """Every window of the teacher's own trajectories from `noise` (B, C, H, W): each end is the next start."""
    predict = teacher.guided(uncond, cond, guidance)
    states = [noise]
    for start, end in pairwise(windows.boundaries):
        states.append(solver(predict, teacher, states[-1], start, end))
    return windows_between(states, windows, cond)


def windows_between(
    states: Sequence[Tensor], windows: Boundaries, cond: Conditions, names: tuple[str, ...] = ()
) -> SolvedWindows:
    """The windows of trajectories whose `states`, each (B, ...), are those at the boundaries, noisy to clean."""
    bounds = torch.tensor(windows.boundaries, dtype=torch.int64 if isinstance(windows, Windows) else torch.float64)
    starts, ends = (part.repeat_interleave(len(states[0])) for part in (bounds[:-1], bounds[1:]))
    return SolvedWindows(torch.cat(list(states[:-1])), torch.cat(list(states[1:])), starts, ends, cond, names)


@torch.no_grad()
def solve_from_data(
    teacher: Backbone,
    windows: Windows,
    solver: Solver,
    latents: Tensor,
    noise: Tensor,
    number: Tensor,
    cond: Conditions,
    uncond: Conditions,
    guidance: Guidance = None,
    zero_snr: bool = False,
) -> SolvedWindows:
    """Window `number` (B,) of each sample, started on the noised `latents` (B, C, H, W), as in the paper.

    `zero_snr`: in the first window on pure noise, as sampling starts.
    """
    bounds = torch.tensor(windows.boundaries)
    start, end = bounds[number], bounds[number + 1]
    z = teacher.path.add_noise(latents, noise, start)
    if zero_snr:
        first = (start == teacher.path.num_train_timesteps).to(z.device).reshape(-1, *[1] * (z.ndim - 1))
        z = torch.where(first, noise, z)
    z_end = solver(teacher.guided(uncond, cond, guidance), teacher, z, start, end)
    return SolvedWindows(z, z_end, start, end, cond)


def draw_timesteps(
    start: Tensor, end: Tensor, uniform: Tensor, starts: float, grid: float, discrete: tuple[int, int] | None = None
) -> Tensor:
    """(B,) path indices in end+1..start: share `starts` on the start, `grid` on start or middle, the rest uniform.

    Of noise levels, which are not whole, those above the end.

    `uniform` (3, B) are numbers in 0..1. `discrete=(n, N)` puts the uniform ones on the next noisier of the n points
    1, 1 - 1/n, ... of time in N timesteps.
    """
    length, whole = start - end, not start.is_floating_point()
    anywhere = start - ((uniform[0] * length).long() if whole else uniform[0] * length)
    if discrete is not None:
        points, total = discrete
        step = torch.div((total - anywhere) * points, total, rounding_mode="floor")
        anywhere = (total - torch.div(step * total, points, rounding_mode="floor")).minimum(start)
    half = torch.div(length, 2, rounding_mode="floor") if whole else length / 2
    middle = torch.where(uniform[1] >= 0.5, start - half, start)
    return torch.where(uniform[2] < starts, start, torch.where(uniform[2] < starts + grid, middle, anywhere))


def sample_weights(scheme: str, windows: Boundaries, start: Tensor, timestep: Tensor, total: int) -> Tensor:
    """(B,) weights of the published `reweighting_scheme` none, reciprocal or rcp_win; `total` is N."""
    if scheme == "reciprocal":
        return 1 / (1 - timestep / total).clamp(min=0.1) / 2.3
    if scheme == "rcp_win":
        mean = sum(windows.boundaries[:-1]) / windows.num_windows
        return start / mean
    return torch.ones(len(start))


def student_loss(
    student: Callable,
    path: NoisePath,
    batch: SolvedWindows,
    timestep: Tensor,
    loss: Loss,
    weights: Tensor,
) -> Tensor:
    """(B,) weighted losses of the student at points on the chords; `weights` (B,)."""
    z = interpolate(batch.z_start, batch.z_end, batch.start, batch.end, timestep)
    wanted = target(path, loss.prediction_type, batch.z_start, batch.z_end, batch.start, batch.end)
    error = (student(z, timestep, batch.cond).float() - wanted).pow(2).flatten(1).mean(1)
    if loss.kind == "pseudo_huber":
        error = (error + loss.huber_c**2).sqrt() - loss.huber_c
    return weights.to(error.device) * error


@torch.no_grad()
def measure_window_costs(
    student: Backbone,
    teacher: Backbone,
    windows: Windows,
    solver: Solver,
    loss: Loss,
    noise: Tensor,
    cond: Conditions,
    uncond: Conditions,
    guidance: Guidance = None,
) -> Tensor:
    """(2, K): squared error in the final latent for one student step in window k, and the student's loss at its start.

    The untrained student takes one step through window k of the teacher's trajectory and the teacher goes on exactly.
    The ratio of the rows says how much a unit of each window's loss costs in the final latent.
    """
    exact = solve_trajectories(teacher, windows, solver, noise, cond, uncond, guidance)
    count, path = len(noise), teacher.path
    predict = teacher.guided(uncond, cond, guidance)
    final, costs = exact.z_end[-count:], []
    for k, (start, end) in enumerate(pairwise(windows.boundaries)):
        part = exact[torch.arange(k * count, (k + 1) * count)]
        own = student_loss(student, path, part, part.start, loss, torch.ones(count)).mean()
        a, b = (float(c) for c in euler(path, loss.prediction_type, start, end, start, end))
        z = a * part.z_start + b * student(part.z_start, part.start, cond)
        for later, next_end in pairwise(windows.boundaries[k + 1 :]):
            z = solver(predict, teacher, z, later, next_end)
        costs.append(torch.stack([(z - final).pow(2).mean(), own]))
    return torch.stack(costs, dim=1)


def per_window(count: int, index: Tensor, *rows: Tensor) -> Tensor:
    """(len(rows), count) sums of each row's values (B,) by window, of numbers `index` (B,)."""
    sums = torch.zeros(len(rows), count)
    for total, row in zip(sums, rows, strict=True):
        total.index_add_(0, index, row.float())
    return sums


def window_weights(asked: str | list[float], count: int, measure: Callable[[], Tensor]) -> Tensor:
    """(count,) loss weights of mean 1: equal, measured, or those given; `measure` is `measure_window_costs`."""
    if asked == "equal":
        return torch.ones(count)
    if asked == "measured":
        final, loss = measure()
        given = final / loss
    else:
        given = torch.tensor(asked, dtype=torch.float32)
    return given / given.mean()
