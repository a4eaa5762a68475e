"""What the student learns: solved windows of the teacher, points on their chords, the loss and its window weights."""

from collections.abc import Callable

import torch

from perflow_diffusers.flow import Windows, euler, interpolate, solve, target

from .backbone import Backbone
from .buffer import SolvedWindows
from .config import TrainingConfig


@torch.no_grad()
def solve_trajectories(
    teacher: Backbone, windows: Windows, config: TrainingConfig, noise: torch.Tensor, cond, uncond
) -> SolvedWindows:
    """Every window of the teacher's own trajectories from `noise` (B, C, H, W): each end is the next start."""
    predict = teacher.guided(uncond, cond, config.guidance_scale)
    z, solved = noise, []
    for start, end in zip(windows.boundaries[:-1], windows.boundaries[1:], strict=True):
        z_end = _solve(predict, teacher, config, z, start, end)
        solved.append(SolvedWindows(z, z_end, _full(z, start), _full(z, end), cond))
        z = z_end
    return SolvedWindows.cat(solved)


@torch.no_grad()
def solve_from_data(
    teacher: Backbone, windows: Windows, config: TrainingConfig, latents: torch.Tensor, noise, cond, uncond
) -> SolvedWindows:
    """One random window a sample, started on the noised `latents` (B, C, H, W), as in the paper."""
    bounds = torch.tensor(windows.boundaries)
    index = torch.randint(windows.num_windows, (len(latents),))
    start, end = bounds[index], bounds[index + 1]
    z = teacher.path.add_noise(latents, noise, start)
    z_end = _solve(teacher.guided(uncond, cond, config.guidance_scale), teacher, config, z, start, end)
    return SolvedWindows(z, z_end, start, end, cond)


def _solve(predict, teacher: Backbone, config: TrainingConfig, z, start, end) -> torch.Tensor:
    return solve(
        predict, teacher.path, z, start, end, config.solver_steps, method=config.solver, prediction=teacher.prediction
    )


def _full(z: torch.Tensor, value: int) -> torch.Tensor:
    return torch.full((len(z),), value, dtype=torch.int64)


def draw_timesteps(start: torch.Tensor, end: torch.Tensor, starts: float, grid: float) -> torch.Tensor:
    """(B,) path indices in end+1..start: share `starts` on the start, `grid` on start or middle, the rest uniform."""
    length = start - end
    uniform = start - (torch.rand(len(start)) * length).long()
    middle = start - length * torch.randint(0, 2, start.shape) // 2
    choice = torch.rand(len(start))
    return torch.where(choice < starts, start, torch.where(choice < starts + grid, middle, uniform))


def student_loss(
    student: Callable,
    teacher: Backbone,
    batch: SolvedWindows,
    timestep: torch.Tensor,
    config: TrainingConfig,
    weights: torch.Tensor,
) -> torch.Tensor:
    """(B,) weighted losses of the student at points on the chords; `weights` (B,) from `window_weights`."""
    z = interpolate(batch.z_start, batch.z_end, batch.start, batch.end, timestep)
    wanted = target(teacher.path, config.prediction_type, batch.z_start, batch.z_end, batch.start, batch.end)
    error = (student(z, timestep, batch.cond).float() - wanted).pow(2).mean((1, 2, 3))
    if config.loss == "pseudo_huber":
        error = (error + config.huber_c**2).sqrt() - config.huber_c
    return weights * error


@torch.no_grad()
def measure_window_weights(
    student: Backbone, teacher: Backbone, windows: Windows, config: TrainingConfig, noise, cond, uncond
) -> torch.Tensor:
    """(K,) loss weights, mean one: how much a unit of each window's loss costs in the final latent.

    The untrained student takes one step through window k of the teacher's trajectory and the teacher goes on exactly;
    the weight is the squared error this leaves at the end over the student's loss at the window's start.
    """
    exact = solve_trajectories(teacher, windows, config, noise, cond, uncond)
    count, path = len(noise), teacher.path
    predict = teacher.guided(uncond, cond, config.guidance_scale)
    final, weights = exact.z_end[-count:], []
    for k, (start, end) in enumerate(zip(windows.boundaries[:-1], windows.boundaries[1:], strict=True)):
        part = exact[torch.arange(k * count, (k + 1) * count)]
        loss = student_loss(student, teacher, part, part.start, config, torch.ones(count)).mean()
        a, b = euler(path, config.prediction_type, start, end, start, end)
        z = a * part.z_start + b * student(part.z_start, part.start, cond)
        for later, next_end in zip(windows.boundaries[k + 1 : -1], windows.boundaries[k + 2 :], strict=True):
            z = _solve(predict, teacher, config, z, later, next_end)
        weights.append((z - final).pow(2).mean() / loss)
    weights = torch.stack(weights)
    return weights / weights.mean()
