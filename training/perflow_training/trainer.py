"""The distillation loop: knows backbones, windows and batches, and no model family."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from perflow_training.buffer import SolvedWindows, WindowBuffer
from perflow_training.checkpoint import (
    EMA,
    CheckpointNotWritten,
    copy_into,
    full_tensors,
    load_checkpoint,
    number_of,
    save_checkpoint,
    use_trained_weights_only,
)
from perflow_training.compiling import can_compile, compiled
from perflow_training.config import TrainingConfig
from perflow_training.diagnostics import Watch, answers_zero, check_start, expectation
from perflow_training.lazy import read_afresh
from perflow_training.loader import Loader
from perflow_training.log import StepLog, to_trackers
from perflow_training.nonfinite import NonFinite
from perflow_training.objective import (
    Loss,
    draw_timesteps,
    per_window,
    sample_weights,
    student_loss,
    window_weights,
    windows_of,
)
from perflow_training.processes import by_main
from perflow_training.rng import Draws
from perflow_training.run_folder import begin_branch, step_of
from perflow_training.solves import SolverSolves, Solves, Timed
from perflow_training.stopping import Stopped, Stopping
from perflow_training.student import DTYPES, make_learner, trained, values_in_place
from perflow_training.teacher.backbone import Backbone
from perflow_training.teacher.conditions import Conditions

logger = logging.getLogger(__name__)
Student = Callable[[Tensor, Tensor, Conditions], Tensor]
HEAVY = (
    "network", "optimizer", "schedule", "parameters", "ema", "plain_teacher", "plain_student", "teacher", "student",
    "buffer", "source", "solve", "validate",
)  # fmt: skip
Validate = Callable[[int, Backbone], dict]


class Trainer:
    """Distils `teacher` into a student that starts as its copy, on windows that `source` has solved.

    A loader, of what a solve starts from, is solved by the solver that the options name.

    `validate(step, student)` is called every `validation_steps` with the EMA weights in place; its result is logged.
    It may raise Stopped. `stopping` says when the run is to end; `base` is the folder that the teacher was read from,
    for the export.
    """

    def __init__(
        self,
        config: TrainingConfig,
        teacher: Backbone,
        source: Loader | Solves,
        accelerator: Accelerator,
        draws: Draws,
        validate: Validate | None = None,
        stopping: Stopping | None = None,
        base: Path | None = None,
    ):
        self.config, self.accelerator, self.draws = config, accelerator, draws
        self.validate, self.base = validate, base
        dtype = DTYPES[accelerator.mixed_precision]
        self.network, self.optimizer, self.schedule = make_learner(
            teacher.network, config, accelerator, keep=not isinstance(source, Solves) or source.needs_teacher
        )
        use_trained_weights_only(accelerator)
        self.parameters = trained(accelerator.unwrap_model(self.network))
        self.ema = EMAModel(
            self.parameters.values(), decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True
        )
        self.plain_teacher = replace(teacher, dtype=dtype)
        self.plain_student = teacher.student(self.network)
        pair = [self.plain_teacher, self.plain_student]
        if config.torch_compile and can_compile(accelerator.device):
            # teacher and student share their code: without this, the second batch size makes all shapes symbolic
            dynamic = None if config.aspect_buckets else False
            pair = [replace(one, network=compiled(one.network, dynamic)) for one in pair]
        self.teacher, self.student = pair
        if isinstance(source, Solves):
            self.source: Solves = source
        else:
            windows = windows_of(config, teacher.path.num_train_timesteps)
            self.source = SolverSolves(
                config, source, windows, self.teacher, self.plain_teacher, draws, accelerator.device
            )
        self.windows = self.source.windows
        self.solve = Timed(self.source.solve, accelerator.device)
        self.buffer = WindowBuffer(self.solve, config.buffer_size, config.reuse, draws, config.solve_batch_size)
        self.step = 0
        self.weights = torch.ones(self.windows.num_windows)
        self.watch = Watch(config, [0.0] * self.windows.num_windows)
        self.nonfinite = NonFinite(accelerator, config.skip_nonfinite)
        self.stopping = stopping or Stopping()
        self.saved: Path | None = None  # the checkpoint of this run that was written last

    def _costs(self) -> Tensor:
        """(2, K): what the windows' losses cost, measured on one batch of trajectories of all processes."""
        self.network.eval()
        costs = self.source.costs(self.plain_student)
        self.network.train()
        return self.accelerator.reduce(costs, "mean").cpu()

    def prepare(self) -> None:
        """Measures what the run is compared with, and checks that the student starts as the teacher."""
        self.weights = window_weights(self.config.window_weights, self.windows.num_windows, self._costs)
        logger.info("window weights, noisy to clean: %s", [round(w, 3) for w in self.weights.tolist()])
        self.buffer.add(self.solve(0))
        probe = self.buffer.solves[0]
        rows = min(len(probe), 4 * self.config.train_batch_size)
        totals = torch.zeros(3, self.windows.num_windows)
        self.network.eval()
        for part in torch.linspace(0, len(probe) - 1, rows).long().split(self.config.train_batch_size):
            batch = probe[part]
            with torch.no_grad():
                losses, index = self._losses(batch, -1, self.plain_student)
                zeros, _ = self._losses(batch, -1, answers_zero)
            totals += per_window(self.windows.num_windows, index, losses.cpu(), zeros.cpu(), torch.ones(len(index)))
        check_start(self.plain_student, self.plain_teacher, batch, self.accelerator.mixed_precision == "no")
        self.network.train()
        loss, zero, count = self.accelerator.reduce(totals.to(self.accelerator.device), "sum").cpu()
        weight = self.weights * count.clamp(min=1)
        self.watch.untrained = (loss / count.clamp(min=1)).tolist()
        logger.info(expectation(self.config, (loss / weight).tolist(), (zero / weight).tolist()))

    def _losses(self, batch: SolvedWindows, micro: int, student: Student) -> tuple[Tensor, Tensor]:
        """(B,) weighted losses and the windows' numbers."""
        config, count = self.config, len(batch)
        total = self.teacher.path.num_train_timesteps
        uniform = torch.stack([self.draws.uniform(f"timestep {i}", micro, count) for i in range(3)])
        discrete = (config.discrete_timesteps, total) if config.discrete_timesteps else None
        timestep = draw_timesteps(
            batch.start, batch.end, uniform, config.timestep_starts, config.timestep_grid, discrete
        )
        index = self.windows.index(batch.start)
        weights = self.weights[index] * sample_weights(
            config.reweighting_scheme, self.windows, batch.start, timestep, total
        )
        return student_loss(student, self.teacher.path, batch, timestep, Loss.of(config), weights), index

    def start(self, resumed: Path | None) -> None:
        """Before the first step: goes on from the checkpoint `resumed`, or measures what the run is compared with."""
        if resumed is None:
            self.prepare()
        else:
            self.resume(resumed)
            if self.step < self.config.max_train_steps:
                by_main(self.accelerator, lambda: begin_branch(self.config.output_dir, self.step))

    def train(self, on_log: Callable[[int, dict], None] | None = None) -> Mapping[str, Tensor]:
        """Runs up to `max_train_steps`, saves, and returns the EMA of the trained weights, whole and on the CPU.

        They are read from the checkpoint as they are asked for; only if it could not be written they are in memory.
        Raises Stopped if a signal ended the run, after saving; TrainingStopped with a diagnosis.
        """
        config = self.config
        progress = tqdm(
            total=config.max_train_steps, initial=self.step, desc="perflow", mininterval=2,
            disable=None if self.accelerator.is_main_process else True,  # a bar for people, none in pipes and logs
        )  # fmt: skip
        log, told = StepLog(self.accelerator, self.weights, self.solve.seconds), 0
        with self.stopping.after_the_step(), progress:
            while self.step < config.max_train_steps and not told:
                norm = self._step(log)
                progress.update()
                log.steps += 1
                last = self.step == config.max_train_steps
                if self.step % config.logging_steps == 0 or last:
                    values = log.take(
                        number_of(norm),
                        self.solve.seconds,
                        learning_rate=float(self.schedule.get_last_lr()[0]),
                        solved=self.buffer.solved,
                        **self.source.describe(),
                        **self.nonfinite.describe(),
                    )
                    losses = " ".join("-" if x is None else f"{x:.4f}" for x in values["loss"])
                    progress.set_postfix(loss=losses)
                    if progress.disable and self.accelerator.is_main_process:  # for a log
                        logger.info("step %d of %d, loss %s", self.step, config.max_train_steps, losses)
                    with self.nonfinite.named():
                        self.watch.look(self.step, log.weighted(values["loss"]), values["grad_norm"])
                    self.nonfinite.looked()
                    self._tell(values, on_log)
                told = self.stopping.agreed()
                if config.validation_steps and self.step % config.validation_steps == 0 and self.validate is not None:
                    told = told or self._validated(self.validate, on_log) or self.stopping.agreed()
                due = config.checkpointing_steps and self.step % config.checkpointing_steps == 0
                if due or last or told:
                    with self.nonfinite.named():  # rather than let broken weights replace a good checkpoint
                        self.watch.finite(self.step, log.losses()[0], number_of(norm))
                    self.save()
                    told = told or self.stopping.agreed()
        if told:
            raise Stopped(told)
        if self.saved is not None and step_of(self.saved) == self.step:
            return read_afresh(self.saved / EMA)
        return full_tensors(self._ema(), keep=self.accelerator.is_main_process)

    def _step(self, log: StepLog) -> Tensor | float | None:
        """One optimiser step; returns the gradient norm, None for a step that was left out."""
        config, accelerator, norm, left_out = self.config, self.accelerator, None, False
        indices, parts = [], []
        for part in range(config.gradient_accumulation_steps):
            micro = self.step * config.gradient_accumulation_steps + part
            batch = self.buffer.batch(config.train_batch_size, micro)
            with accelerator.accumulate(self.network):
                losses, index = self._losses(batch, micro, self.student)
                accelerator.backward(losses.mean())
                indices.append(index)
                parts.append((batch.names, losses.detach()))
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.network.parameters(), config.max_grad_norm)
                    left_out = self.nonfinite.leave_out(self.step + 1, norm, parts)
                if not left_out or accelerator.scaler is not None:  # a scaler leaves such steps out itself
                    self.optimizer.step()
                self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1
        if left_out:
            return None
        for index, (_, losses) in zip(indices, parts, strict=True):
            log.add(index, losses)
        self.nonfinite.add(self.step, norm, parts)
        self.ema.step(self.parameters.values())
        return norm

    def _tell(self, values: dict, on_log: Callable[[int, dict], None] | None) -> None:
        if on_log is not None and self.accelerator.is_main_process:
            on_log(self.step, values)
        to_trackers(self.accelerator, self.step, values, self.config.report_to)

    def _validated(self, validate: Validate, on_log: Callable[[int, dict], None] | None) -> int:
        """Draws and logs; returns the signal that ended it before, 0 for none."""
        self.network.eval()
        try:
            with values_in_place(self.accelerator.unwrap_model(self.network), self.ema.shadow_params):
                values = validate(self.step, self.plain_student)
        except Stopped as stopped:
            return stopped.signal
        finally:
            self.network.train()
        self._tell(values, on_log)
        return 0

    def _ema(self) -> dict[str, Tensor]:
        return dict(zip(self.parameters, self.ema.shadow_params, strict=True))

    def release(self) -> None:
        """Frees networks, optimiser, EMA, windows and encoders: it cannot train any more."""
        self.schedule.optimizer = None  # type: ignore[assignment]  # the accelerator keeps the schedule
        for name in HEAVY:
            setattr(self, name, None)
        if self.config.torch_compile:
            torch.compiler.reset()
        self.accelerator.free_memory()

    def save(self) -> Path | None:
        """A checkpoint of this step; None, with a warning, if it cannot be written: training goes on without."""
        tensors, counts = self.buffer.state()
        state = {
            "buffer": counts,
            "data": self.source.state_dict(),
            "ema_steps": self.ema.optimization_step,
            "weights": self.weights.tolist(),
            "untrained": self.watch.untrained,
            "above_since": self.watch.above_since,
            "skipped": self.nonfinite.skipped,
            "solve_seconds": self.solve.seconds,
            "base_folder": None if self.base is None else str(self.base),
        }
        try:
            self.saved = save_checkpoint(self.accelerator, self.config, self.step, state, self._ema(), tensors)
        except CheckpointNotWritten as error:
            last = f"The last one is {self.saved}." if self.saved else "There is none of this run yet."
            if self.accelerator.is_main_process:
                logger.warning("WARNING: %s %s Free some space; training goes on.", error, last)
            return None
        return self.saved

    def resume(self, folder: Path) -> None:
        """Goes on from a checkpoint."""
        state, ema, windows, changed = load_checkpoint(self.accelerator, self.config, folder)
        for value, name in zip(self.ema.shadow_params, self.parameters, strict=True):
            copy_into(value, ema[name])
        self.ema.optimization_step = state["ema_steps"]
        self.buffer.load_state(windows, state["buffer"], self.accelerator.device)
        self.source.load_state_dict(state["data"])
        self.step, self.solve.seconds = state["step"], state["solve_seconds"]
        self.weights = torch.tensor(state["weights"])
        self.watch.untrained, self.watch.above_since = state["untrained"], state["above_since"]
        self.nonfinite.skipped = state.get("skipped", 0)
        self.saved = folder
        logger.info("resumed from %s at step %d", folder, self.step)
        if serious := [c for c in changed if not c.startswith(("resume_from", "output_dir", "report_to", "logging"))]:
            logger.warning("options that differ from the checkpoint's: %s", "; ".join(serious))
