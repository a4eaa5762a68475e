"""The distillation loop: knows backbones, windows and batches, and no model family."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from .backbone import Backbone
from .buffer import SolvedWindows, WindowBuffer
from .checkpoint import (
    EMA,
    CheckpointNotWritten,
    copy_into,
    full_tensors,
    load_checkpoint,
    save_checkpoint,
    use_trained_weights_only,
)
from .compiling import can_compile
from .conditions import Conditions
from .config import TrainingConfig
from .draws import Draws
from .feed import Feed
from .lazy import read_afresh
from .log import StepLog
from .nonfinite import NonFinite
from .objective import (
    Guidance,
    draw_timesteps,
    guidance_of,
    measure_window_costs,
    sample_weights,
    solve_from_data,
    solve_trajectories,
    student_loss,
    windows_of,
)
from .processes import by_main
from .run_folder import begin_branch, step_of
from .stopping import Stopped, Stopping
from .student import DTYPES, build_student, make_optimizer, trained, values_in_place
from .watch import Watch, answers_zero, check_start, expectation

logger = logging.getLogger(__name__)
Student = Callable[[Tensor, Tensor, Conditions], Tensor]
HEAVY = (
    "network", "optimizer", "schedule", "parameters", "ema", "plain_teacher", "plain_student", "teacher", "student",
    "buffer", "feed", "validate",
)  # fmt: skip
Validate = Callable[[int, Backbone], dict[str, float]]


class Trainer:
    """Distils `teacher` into a student that starts as its copy, on material from `feed`.

    `validate(step, student)` is called every `validation_steps` with the EMA weights in place; its result is logged.
    It may raise Stopped. `stopping` says when the run is to end.
    """

    def __init__(
        self,
        config: TrainingConfig,
        teacher: Backbone,
        feed: Feed,
        accelerator: Accelerator,
        draws: Draws,
        validate: Validate | None = None,
        stopping: Stopping | None = None,
    ):
        self.config, self.feed, self.accelerator, self.draws, self.validate = (
            config,
            feed,
            accelerator,
            draws,
            validate,
        )
        self.windows = windows_of(config, teacher.path.num_train_timesteps)
        sharded = accelerator.distributed_type == DistributedType.FSDP
        dtype = DTYPES[accelerator.mixed_precision]
        teacher.network.to(accelerator.device)
        if config.lora_rank:  # the student shares the frozen weights
            _cast(teacher.network, dtype)
        network = build_student(teacher.network, config, share=not sharded)
        _cast(teacher.network, dtype).eval().requires_grad_(False)
        self.network, self.optimizer = accelerator.prepare(network, make_optimizer(network, config))
        # not prepared: accelerate would step it once for each process, and the schedule would depend on their number
        self.schedule = get_scheduler(
            config.lr_scheduler,
            getattr(self.optimizer, "optimizer", self.optimizer),
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        accelerator.register_for_checkpointing(self.schedule)
        use_trained_weights_only(accelerator)
        self.parameters = trained(accelerator.unwrap_model(self.network))
        self.ema = EMAModel(
            self.parameters.values(), decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True
        )
        self.plain_teacher = replace(teacher, dtype=dtype)
        self.plain_student = teacher.student(self.network)
        self.teacher, self.student = self.plain_teacher, self.plain_student
        if config.torch_compile and can_compile(accelerator.device):
            # teacher and student share their code: without this, the second batch size makes all shapes symbolic
            dynamic = None if config.aspect_buckets else False
            self.teacher = replace(self.plain_teacher, network=torch.compile(teacher.network, dynamic=dynamic))
            self.student = replace(self.plain_student, network=torch.compile(self.network, dynamic=dynamic))
        self.buffer = WindowBuffer(self.solve, config.buffer_size, config.reuse, draws, config.solve_batch_size)
        self.solve_seconds = 0.0
        self.step = 0
        self.weights = torch.ones(self.windows.num_windows)
        self.watch = Watch(config, [0.0] * self.windows.num_windows)
        self.nonfinite = NonFinite(accelerator, config.skip_nonfinite)
        self.stopping = stopping or Stopping()
        self.base: Path | None = None  # the folder that the teacher was read from, for the export
        self.saved: Path | None = None  # the checkpoint of this run that was written last

    def solve(self, number: int) -> SolvedWindows:
        """Windows of solve `number`: trajectories, or noised data in the share `data_starts` of the solves."""
        began, count = self._now(), self.config.solve_batch_size
        from_data = self.draws.shared("kind", number) < self.config.data_starts
        material = self.feed.draw(count, number, from_data)
        cond, guidance, noise = self._conditions(material.cond, number, material.shape)
        arguments = (self.teacher, self.windows, self.config)
        if from_data:
            window = (self.draws.uniform("start", number, count) * self.windows.num_windows).long()
            latents = material.latents.to(noise.device)
            solved = solve_from_data(*arguments, latents, noise, window, cond, self.feed.uncond, guidance)
        else:
            solved = solve_trajectories(*arguments, noise, cond, self.feed.uncond, guidance)
        self.solve_seconds += self._now() - began
        return replace(solved, names=material.names)

    def _conditions(self, cond, number: int, shape) -> tuple:
        """(conditions with dropped captions, guidance, noise) of a solve."""
        count = len(cond)
        dropped = self.draws.uniform("caption", number, count) < self.config.caption_dropout
        guidance: Guidance = guidance_of(self.config, self.draws.uniform("guidance", number, count))
        noise = self.draws.normal("noise", number, (count, *shape)).to(self.accelerator.device)
        return cond.drop(dropped, self.feed.uncond), guidance, noise

    def _now(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # a solve is hundreds of network calls: this costs nothing beside it
        return time.perf_counter()

    def window_weights(self) -> Tensor:
        """(K,) loss weights as the config asks: equal, given, or measured on one batch of trajectories."""
        asked = self.config.window_weights
        if asked == "equal":
            return torch.ones(self.windows.num_windows)
        if asked == "measured":
            material = self.feed.draw(self.config.solve_batch_size, -1, False)
            cond, guidance, noise = self._conditions(material.cond, -1, material.shape)
            self.network.eval()
            costs = measure_window_costs(
                self.plain_student, self.plain_teacher, self.windows, self.config, noise, cond, self.feed.uncond,
                guidance,
            )  # fmt: skip
            self.network.train()
            final, loss = self.accelerator.reduce(costs, "mean").cpu()
            given = final / loss
        else:
            given = torch.tensor(asked, dtype=torch.float32)
        return given / given.mean()

    def prepare(self) -> None:
        """Measures what the run is compared with, and checks that the student starts as the teacher."""
        self.weights = self.window_weights()
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
            totals += _per_window(self.windows.num_windows, index, losses.cpu(), zeros.cpu(), torch.ones(len(index)))
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
        weights = self.weights[index] * sample_weights(config, self.windows, batch.start, timestep, total)
        return student_loss(student, self.teacher.path, batch, timestep, config, weights), index

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
        log, told = StepLog(self), 0
        with self.stopping.after_the_step(), progress:
            while self.step < config.max_train_steps and not told:
                norm = self._step(log)
                progress.update()
                log.steps += 1
                last = self.step == config.max_train_steps
                if self.step % config.logging_steps == 0 or last:
                    values = log.take(norm)
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
                    told = told or self._validated(on_log) or self.stopping.agreed()
                due = config.checkpointing_steps and self.step % config.checkpointing_steps == 0
                if due or last or told:
                    with self.nonfinite.named():
                        log.check(norm)
                    self.save()
                    told = told or self.stopping.agreed()
        if told:
            raise Stopped(told)
        saved = self.saved is not None and step_of(self.saved) == self.step
        return read_afresh(self.saved / EMA) if saved else self.ema_weights()

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
        flat = {}
        for name, value in values.items():
            if isinstance(value, list):
                flat |= {f"{name}/window_{i}": item for i, item in enumerate(value, 1) if item is not None}
            elif value is not None:
                flat[name] = value
        try:
            self.accelerator.log(flat, step=self.step)
        except OSError as error:  # a full disk is no reason to end a run
            logger.warning("`report_to=%s` could not be written to (%s).", self.config.report_to, error)

    def _validated(self, on_log: Callable[[int, dict], None] | None) -> int:
        """Draws and logs; returns the signal that ended it before, 0 for none."""
        self.network.eval()
        try:
            with values_in_place(self.accelerator.unwrap_model(self.network), self.ema.shadow_params):
                values = self.validate(self.step, self.plain_student)
        except Stopped as stopped:
            return stopped.signal
        finally:
            self.network.train()
        self._tell(values, on_log)
        return 0

    def ema_weights(self) -> dict[str, Tensor]:
        """The EMA of the trained parameters by name, whole, on the CPU of the main process; {} on the others."""
        return full_tensors(self._ema(), keep=self.accelerator.is_main_process)

    def _ema(self) -> dict[str, Tensor]:
        return dict(zip(self.parameters, self.ema.shadow_params, strict=True))

    def release(self) -> None:
        """Frees networks, optimiser, EMA, windows and encoders: it cannot train any more."""
        self.schedule.optimizer = None  # the accelerator keeps the schedule
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
            "data": self.feed.state_dict(),
            "ema_steps": self.ema.optimization_step,
            "weights": self.weights.tolist(),
            "untrained": self.watch.untrained,
            "above_since": self.watch.above_since,
            "skipped": self.nonfinite.skipped,
            "solve_seconds": self.solve_seconds,
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
        self.feed.load_state_dict(state["data"])
        self.step, self.solve_seconds = state["step"], state["solve_seconds"]
        self.weights = torch.tensor(state["weights"])
        self.watch.untrained, self.watch.above_since = state["untrained"], state["above_since"]
        self.nonfinite.skipped = state.get("skipped", 0)
        self.saved = folder
        logger.info("resumed from %s at step %d", folder, self.step)
        serious = [c for c in changed if not c.startswith(("resume_from", "output_dir", "report_to", "logging"))]
        if serious:
            logger.warning("options that differ from the checkpoint's: %s", "; ".join(serious))


def _cast(network: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """`network.to(dtype)`, which diffusers comments on even where nothing is to be done."""
    return network if network.dtype == dtype else network.to(dtype)


def _per_window(count: int, index: Tensor, *rows: Tensor) -> Tensor:
    """(len(rows), count) sums of each row's values by window."""
    sums = torch.zeros(len(rows), count)
    for total, row in zip(sums, rows, strict=True):
        total.index_add_(0, index, row.float())
    return sums
