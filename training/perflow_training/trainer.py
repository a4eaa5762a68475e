"""The distillation loop: knows backbones, windows and batches, and no model family."""

import json
import logging
import math
import signal
import time
from collections.abc import Callable
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
    copy_into,
    find_checkpoint,
    full_tensors,
    load_checkpoint,
    save_checkpoint,
    use_trained_weights_only,
    whole,
)
from .conditions import Conditions
from .config import TrainingConfig
from .draws import Draws
from .feed import Feed
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
from .student import DTYPES, build_student, make_optimizer, trained
from .watch import Watch, answers_zero, check_start, expectation

logger = logging.getLogger(__name__)
Student = Callable[[Tensor, Tensor, Conditions], Tensor]
Validate = Callable[[int, Backbone], dict[str, float]]
AGREE_EVERY = 10  # steps between asking all processes whether one of them was told to end


class Trainer:
    """Distils `teacher` into a student that starts as its copy, on material from `feed`.

    `validate(step, student)` is called every `validation_steps` with the EMA weights in place; its result is logged.
    """

    def __init__(
        self,
        config: TrainingConfig,
        teacher: Backbone,
        feed: Feed,
        accelerator: Accelerator,
        draws: Draws,
        validate: Validate | None = None,
    ):
        self.config, self.feed, self.accelerator, self.draws, self.validate = (
            config,
            feed,
            accelerator,
            draws,
            validate,
        )
        self.windows = windows_of(config, teacher.path.num_train_timesteps)
        sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        dtype = DTYPES[config.mixed_precision]
        teacher.network.to(accelerator.device)
        if config.lora_rank:  # the student shares the frozen weights
            _cast(teacher.network, dtype)
        network = build_student(teacher.network, config, share=not sharded)
        _cast(teacher.network, dtype).eval().requires_grad_(False)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            plugin = accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.train_batch_size
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
        if config.torch_compile:
            # teacher and student share their code: without this, the second batch size makes all shapes symbolic
            dynamic = None if config.aspect_buckets else False
            self.teacher = replace(self.plain_teacher, network=torch.compile(teacher.network, dynamic=dynamic))
            self.student = replace(self.plain_student, network=torch.compile(self.network, dynamic=dynamic))
        self.buffer = WindowBuffer(self.solve, config.buffer_size, config.reuse, draws, config.solve_batch_size)
        self.solve_seconds = 0.0
        self.step = 0
        self.weights = torch.ones(self.windows.num_windows)
        self.watch = Watch(config, [0.0] * self.windows.num_windows)
        self.stop_asked = False

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
        return solved

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
        check_start(self.plain_student, self.plain_teacher, batch, self.config.mixed_precision == "no")
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

    def train(self, on_log: Callable[[int, dict], None] | None = None) -> dict[str, Tensor] | None:
        """Runs up to `max_train_steps` and returns the EMA of the trained weights, whole and on the CPU.

        None if SIGTERM ended the run: a checkpoint was saved then. Raises TrainingStopped with a diagnosis.
        """
        config, accelerator = self.config, self.accelerator
        resumed = find_checkpoint(config)
        if resumed is None:
            self.prepare()
        else:
            self.resume(resumed)
        handler = self._listen()
        progress = tqdm(
            total=config.max_train_steps, initial=self.step, desc="perflow", mininterval=2,
            disable=not accelerator.is_main_process,
        )  # fmt: skip
        log = _Log(self)
        try:
            while self.step < config.max_train_steps:
                norm = self._step(log)
                progress.update()
                log.steps += 1
                last = self.step == config.max_train_steps
                if self.step % config.logging_steps == 0 or last:
                    values = log.take(norm)
                    progress.set_postfix(loss=" ".join("-" if x is None else f"{x:.4f}" for x in values["loss"]))
                    self.watch.look(self.step, log.weighted(values["loss"]), values["grad_norm"])
                    self._tell(values, on_log)
                if config.validation_steps and self.step % config.validation_steps == 0 and self.validate is not None:
                    self._validated(on_log)
                if self._told_to_stop() and not last:
                    log.check(norm)
                    logger.warning("SIGTERM: saved %s; resume_from_checkpoint=latest goes on.", self.save())
                    return None
                if config.checkpointing_steps and self.step % config.checkpointing_steps == 0:
                    log.check(norm)
                    self.save()
        finally:
            progress.close()
            if handler is not None:
                signal.signal(signal.SIGTERM, handler)
        return self.ema_weights()

    def _step(self, log: "_Log") -> Tensor | float | None:
        """One optimiser step; returns the gradient norm."""
        config, accelerator, norm = self.config, self.accelerator, None
        for part in range(config.gradient_accumulation_steps):
            micro = self.step * config.gradient_accumulation_steps + part
            batch = self.buffer.batch(config.train_batch_size, micro)
            with accelerator.accumulate(self.network):
                losses, index = self._losses(batch, micro, self.student)
                accelerator.backward(losses.mean())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.network.parameters(), config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            log.add(index, losses.detach())
        self.schedule.step()
        self.ema.step(self.parameters.values())
        self.step += 1
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
        self.accelerator.log(flat, step=self.step)

    def _validated(self, on_log: Callable[[int, dict], None] | None) -> None:
        parameters = list(self.parameters.values())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        self.network.eval()
        try:
            values = self.validate(self.step, self.plain_student)
        finally:
            self.network.train()
            self.ema.restore(parameters)
        self._tell(values, on_log)

    def ema_weights(self) -> dict[str, Tensor]:
        """The EMA of the trained parameters by name, whole, on the CPU."""
        return full_tensors(list(self.parameters), self.ema.shadow_params)

    def save(self) -> Path:
        """A checkpoint of this step."""
        tensors, counts = self.buffer.state()
        state = {
            "buffer": counts,
            "data": self.feed.state_dict(),
            "ema_steps": self.ema.optimization_step,
            "weights": self.weights.tolist(),
            "untrained": self.watch.untrained,
            "above_since": self.watch.above_since,
            "solve_seconds": self.solve_seconds,
        }
        windows = {name: tensor.cpu() for name, tensor in tensors.items()}
        return save_checkpoint(self.accelerator, self.config, self.step, state, self.ema_weights(), windows)

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
        logger.info("resumed from %s at step %d", folder, self.step)
        serious = [c for c in changed if not c.startswith(("resume_from", "output_dir", "report_to", "logging"))]
        if serious:
            logger.warning("options that differ from the checkpoint's: %s", "; ".join(serious))

    def _listen(self):
        """SIGTERM asks for a stop after the running step; returns the handler that was there."""
        try:
            return signal.signal(signal.SIGTERM, self._on_sigterm)
        except ValueError:  # not in the main thread: nothing to listen to
            return None

    def _on_sigterm(self, *_) -> None:
        self.stop_asked = True

    def _told_to_stop(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.stop_asked
        if self.step % AGREE_EVERY:
            return False
        flag = torch.tensor(float(self.stop_asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)


class _Log:
    """Losses since the last look, kept on the device: nothing waits for a number in between."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.count = trainer, trainer.windows.num_windows
        self.steps, self.began, self.solved_before = 0, time.perf_counter(), trainer.solve_seconds
        self.sums = torch.zeros(2, self.count, device=trainer.accelerator.device)

    def add(self, index: Tensor, losses: Tensor) -> None:
        place = index.to(losses.device)
        self.sums[0].index_add_(0, place, losses.float())
        self.sums[1].index_add_(0, place, torch.ones_like(losses, dtype=torch.float32))

    def _losses(self) -> tuple[list[float | None], float]:
        """(mean loss of each window, None without samples; number of samples); all processes must call this.

        The windows' weights are taken out, so that the numbers are those of the untrained student that were printed.
        """
        loss, count = self.trainer.accelerator.reduce(self.sums, "sum").cpu()
        mean = (loss / self.trainer.weights / count.clamp(min=1)).tolist()
        return [value if n else None for value, n in zip(mean, count.tolist(), strict=True)], float(count.sum())

    def weighted(self, losses: list[float | None]) -> list[float | None]:
        """The losses as they are trained on."""
        weights = self.trainer.weights.tolist()
        return [None if x is None else x * weight for x, weight in zip(losses, weights, strict=True)]

    def check(self, norm: Tensor | float | None) -> None:
        """Raises TrainingStopped rather than let a checkpoint of broken weights replace a good one."""
        self.trainer.watch.finite(self.trainer.step, self._losses()[0], None if norm is None else float(whole(norm)))

    def take(self, norm: Tensor | float | None) -> dict:
        """The values of one log line; starts anew. The loss of a window without samples is None."""
        trainer = self.trainer
        losses, count = self._losses()
        seconds = time.perf_counter() - self.began
        values = {
            "loss": losses,
            "grad_norm": None if norm is None else float(whole(norm)),
            "learning_rate": trainer.schedule.get_last_lr()[0],
            "solve_seconds": trainer.solve_seconds,
            "solve_share": (trainer.solve_seconds - self.solved_before) / seconds,
            "solved": trainer.buffer.solved,
            "samples_per_second": count / seconds,
            **trainer.feed.describe(),
        }
        self.sums.zero_()
        self.steps, self.began, self.solved_before = 0, time.perf_counter(), trainer.solve_seconds
        return values


def _cast(network: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """`network.to(dtype)`, which diffusers comments on even where nothing is to be done."""
    return network if network.dtype == dtype else network.to(dtype)


def _per_window(count: int, index: Tensor, *rows: Tensor) -> Tensor:
    """(len(rows), count) sums of each row's values by window."""
    sums = torch.zeros(len(rows), count)
    for total, row in zip(sums, rows, strict=True):
        total.index_add_(0, index, row.float())
    return sums


def append_log(path: Path, resumed_at: int) -> Callable[[int, dict], None]:
    """Writes one JSON line a call; lines of steps that a resumed run repeats are taken out first."""
    if resumed_at and path.is_file():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resumed_at]
        path.write_text("".join(f"{line}\n" for line in kept))
    else:
        path.write_text("")

    def on_log(step: int, values: dict) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    return on_log


def _step_of(line: str) -> float:
    """The step of a log line; infinity for the half line that a kill leaves at the end."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
