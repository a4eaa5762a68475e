"""The distillation loop: knows backbones, windows and batches, and no model family."""

import copy
import logging
import math
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from perflow_diffusers.flow import Windows

from .backbone import Backbone, student_of
from .buffer import SolvedWindows, WindowBuffer
from .config import TrainingConfig
from .objective import draw_timesteps, measure_window_weights, solve_from_data, solve_trajectories, student_loss

logger = logging.getLogger(__name__)


class Trainer:
    """Distils `teacher` into a student that starts as its copy.

    `conditions(n)` draws n prompt embeddings (n, L, D); `latents(n)` draws n data latents with their embeddings, for
    starting points on noised data; `uncond` (1, L, D) is the empty prompt.
    """

    def __init__(
        self,
        config: TrainingConfig,
        teacher: Backbone,
        shape: tuple[int, ...],
        conditions: Callable[[int], torch.Tensor],
        uncond: torch.Tensor,
        latents: Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ):
        self.config, self.shape, self.conditions, self.latents, self.uncond = (
            config,
            shape,
            conditions,
            latents,
            uncond,
        )
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        self.windows = (
            Windows(tuple(config.window_boundaries))
            if config.window_boundaries
            else Windows.uniform(config.num_time_windows, teacher.path.num_train_timesteps)
        )
        network = copy.deepcopy(teacher.network).train().requires_grad_(True)
        teacher.network.eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=config.learning_rate,
            betas=(0.9, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
        )
        self.schedule = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.network, self.optimizer, self.schedule = self.accelerator.prepare(network, self.optimizer, self.schedule)
        self.ema = EMAModel(network.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
        self.teacher, student = teacher, self.network
        if config.torch_compile:
            self.teacher = Backbone(torch.compile(teacher.network), teacher.path, teacher.prediction, -1)
            student = torch.compile(self.network)
        self.student = student_of(teacher, student)
        self.buffer = WindowBuffer(
            self.solve, config.buffer_size, config.reuse, torch.Generator().manual_seed(config.seed)
        )
        self.solve_seconds = 0.0

    def solve(self) -> SolvedWindows:
        """Windows of one batch of trajectories, the share `data_starts` of the time of noised data instead."""
        began, count = time.perf_counter(), self.config.solve_batch_size
        noise = torch.randn(count, *self.shape)
        if torch.rand(()) < self.config.data_starts and self.latents is not None:
            latents, cond = self.latents(count)
            solved = solve_from_data(self.teacher, self.windows, self.config, latents, noise, cond, self.uncond)
        else:
            cond = self.conditions(count)
            solved = solve_trajectories(self.teacher, self.windows, self.config, noise, cond, self.uncond)
        self.solve_seconds += time.perf_counter() - began
        return solved

    def window_weights(self) -> torch.Tensor:
        """(K,) loss weights as the config asks: equal, given, or measured on one batch of trajectories."""
        asked = self.config.window_weights
        if asked == "equal":
            return torch.ones(self.windows.num_windows)
        if asked == "measured":
            count = self.config.solve_batch_size
            noise, cond = torch.randn(count, *self.shape), self.conditions(count)
            self.network.eval()
            measured = measure_window_weights(
                self.student, self.teacher, self.windows, self.config, noise, cond, self.uncond
            )
            self.network.train()
            return measured
        given = torch.tensor(asked, dtype=torch.float32)
        return given / given.mean()

    def train(self, on_log: Callable[[int, dict], None] | None = None) -> torch.nn.Module:
        """Runs `max_train_steps` and returns the student's network with its EMA weights."""
        config = self.config
        weights = self.window_weights()
        logger.info("window weights, noisy to clean: %s", [round(w, 3) for w in weights.tolist()])
        progress = tqdm(range(1, config.max_train_steps + 1), desc="perflow", mininterval=2)
        window_loss = torch.zeros(self.windows.num_windows)
        window_count = torch.zeros(self.windows.num_windows)
        for step in progress:
            batch = self.buffer.batch(config.train_batch_size)
            timestep = draw_timesteps(batch.start, batch.end, config.timestep_starts, config.timestep_grid)
            index = self.windows.index(batch.start)
            with self.accelerator.autocast():
                losses = student_loss(self.student, self.teacher, batch, timestep, config, weights[index])
            self.accelerator.backward(losses.mean())
            self.accelerator.clip_grad_norm_(self.network.parameters(), config.max_grad_norm)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.ema.step(self.network.parameters())
            window_loss.index_add_(0, index, losses.detach())
            window_count.index_add_(0, index, torch.ones(len(index)))
            if step % config.logging_steps == 0 or step == config.max_train_steps:
                means = (window_loss / window_count.clamp(min=1)).tolist()
                if not all(map(math.isfinite, means)):
                    raise FloatingPointError(
                        f"The loss is not finite at step {step}. Lower learning_rate, or use mixed_precision=no."
                    )
                progress.set_postfix(loss=" ".join(f"{value:.4f}" for value in means))
                if on_log is not None:
                    on_log(step, {"loss": means, "solve_seconds": self.solve_seconds, "solved": self.buffer.solved})
                window_loss.zero_()
                window_count.zero_()
        network = self.accelerator.unwrap_model(self.network)
        self.ema.copy_to(network.parameters())
        return network.eval()
