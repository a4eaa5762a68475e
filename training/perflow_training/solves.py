"""Where solved windows come from: a solver along the teacher's path, or runs of the teacher's own pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from perflow_diffusers.flow import SigmaWindows, Windows
from perflow_training.buffer import SolvedWindows
from perflow_training.config import TrainingConfig
from perflow_training.data import DataOptions, ExampleStream, open_examples
from perflow_training.loader import Loader, Streaming, named
from perflow_training.objective import (
    Guidance,
    Loss,
    Solver,
    guidance_of,
    measure_window_costs,
    solve_from_data,
    solve_trajectories,
    windows_between,
)
from perflow_training.rng import Draws
from perflow_training.teacher.backbone import Backbone, Boundaries
from perflow_training.teacher.conditions import Conditions
from perflow_training.teacher.observed import Observed


@runtime_checkable
class Solves(Protocol):
    """Solved windows for one solve after another, over `windows`; the same ones for the same number and state."""

    needs_teacher: bool  #: whether `solve` calls the teacher, so that training must keep it beside the student

    @property
    def windows(self) -> Boundaries: ...

    def solve(self, number: int) -> SolvedWindows: ...

    def costs(self, student: Backbone) -> Tensor:
        """(2, K), as `measure_window_costs` has them, of one solve."""
        ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    def describe(self) -> dict[str, float]: ...

    def close(self) -> None: ...


class SolverSolves:
    """Windows of `teacher` by the solver that the options name: trajectories, or noised data in the share asked for.

    `plain` is the teacher as it is measured, not compiled.
    """

    needs_teacher = True

    def __init__(
        self,
        config: TrainingConfig,
        loader: Loader,
        windows: Windows,
        teacher: Backbone,
        plain: Backbone,
        draws: Draws,
        device: torch.device,
    ):
        self.config, self.loader, self.windows, self.draws = config, loader, windows, draws
        self.teacher, self.plain, self.device = teacher, plain, device

    def solve(self, number: int) -> SolvedWindows:
        """Windows of solve `number`."""
        count, config = self.config.solve_batch_size, self.config
        from_data = self.draws.shared("kind", number) < config.data_starts
        material = self.loader.draw(count, number, from_data)
        cond, guidance, noise = self._conditions(material.cond, number, material.shape)
        arguments = (self.teacher, self.windows, Solver.of(config))
        if from_data:
            window = (self.draws.uniform("start", number, count) * self.windows.num_windows).long()
            latents = cast(Tensor, material.latents).to(noise.device)
            solved = solve_from_data(
                *arguments, latents, noise, window, cond, self.loader.uncond, guidance, config.zero_snr
            )
        else:
            solved = solve_trajectories(*arguments, noise, cond, self.loader.uncond, guidance)
        return replace(solved, names=material.names)

    def costs(self, student: Backbone) -> Tensor:
        """(2, K): what the windows' losses cost, measured on one batch of trajectories of this process."""
        material = self.loader.draw(self.config.solve_batch_size, -1, False)
        cond, guidance, noise = self._conditions(material.cond, -1, material.shape)
        return measure_window_costs(
            student, self.plain, self.windows, Solver.of(self.config), Loss.of(self.config),
            noise, cond, self.loader.uncond, guidance,
        )  # fmt: skip

    def _conditions(self, cond: Conditions, number: int, shape: tuple[int, ...]) -> tuple:
        """(conditions with dropped captions, guidance, noise) of a solve."""
        count = len(cond)
        dropped = self.draws.uniform("caption", number, count) < self.config.caption_dropout
        guidance: Guidance = guidance_of(self.config.solve_guidance, self.draws.uniform("guidance", number, count))
        noise = self.draws.normal("noise", number, (count, *shape)).to(self.device)
        return cond.drop(dropped, self.loader.uncond), guidance, noise

    def state_dict(self) -> dict:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.loader.load_state_dict(state)

    def describe(self) -> dict[str, float]:
        return self.loader.describe()

    def close(self) -> None:
        self.loader.close()


class PipelineSolves(Streaming):
    """Windows of the trajectories that the watched pipeline itself draws for captions, with its own guidance.

    A solve has one guidance scale; where the options give a range, one is drawn for each solve.
    """

    stream: ExampleStream
    needs_teacher = True

    def __init__(
        self, observed: Observed, config: TrainingConfig, windows: SigmaWindows, draws: Draws, device: torch.device
    ):
        self.observed, self.config, self.windows, self.draws, self.device = observed, config, windows, draws, device
        self.stream = open_examples(
            DataOptions.of(config).sized(8),
            seed=config.seed,
            with_images=False,
            process_index=draws.process_index,
            num_processes=draws.num_processes,
        )

    def solve(self, number: int) -> SolvedWindows:
        """Windows of solve `number`."""
        config, count = self.config, self.config.solve_batch_size
        examples = self.stream.batch(count)
        dropped = self.draws.uniform("caption", number, count) < config.caption_dropout
        captions = ["" if gone else e.caption for e, gone in zip(examples, dropped.tolist(), strict=True)]
        scale = self._scale(number)
        noise = self.draws.normal("noise", number, (count, *self.observed.shape)).to(self.device)
        cond = self.observed.conditions(captions, scale)
        states = self.observed.follow(captions, noise, self.windows, config.solver_steps, scale)
        return windows_between(states, self.windows, cond, named(examples))

    def skip(self) -> None:
        """Goes on as if a solve had been made: its captions are read, and nothing is computed."""
        self.stream.batch(self.config.solve_batch_size)

    def _scale(self, number: int) -> float | None:
        asked = self.config.solve_guidance
        if not isinstance(asked, list):
            return asked
        return asked[0] + (asked[1] - asked[0]) * self.draws.shared("guidance", number)

    def costs(self, student: Backbone) -> Tensor:
        """Not known: a pipeline's run begins at its first step. Raises ValueError."""
        raise ValueError("The cost of windows cannot be measured by running a pipeline.")

    def describe(self) -> dict[str, float]:
        report = self.stream.report
        return {
            "missing_captions": report.missing_captions,
            "unreadable_captions": report.unreadable_captions,
        }


class Timed:
    """Seconds that `solve` has taken, waiting for the device before and after."""

    def __init__(self, solve: Callable[[int], SolvedWindows], device: torch.device):
        self.solve, self.device, self.seconds = solve, device, 0.0

    def __call__(self, number: int) -> SolvedWindows:
        began = self._now()
        solved = self.solve(number)
        self.seconds += self._now() - began
        return solved

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # a solve is hundreds of network calls: this costs nothing beside it
        return time.perf_counter()
