"""FlowMatchPeRFlowScheduler: few-step sampling of flow-matching bases, behind the API of diffusers' Euler scheduler.

Symbols: `sigma` in 0..1, the noise level that the network is told; `K` windows; `n` sampling steps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..flow import SigmaWindows
from ..flow.path import like
from .base_config import check_is_config, flow_refusal
from .combine import combine, combine_rows, euler_step
from .run import straight_run
from .scheduling_perflow import PeRFlowSchedulerOutput
from .stepping import Stepping

_NEAR = 2e-3  # pipelines round their default grids to whole timesteps, or begin at .999


class FlowMatchPeRFlowScheduler(Stepping, FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Sampler for PeRFlow weights of flow-matching bases.

    `FlowMatchPeRFlowScheduler.from_config(pipe.scheduler.config, num_time_windows=4)` is all that a pipeline needs.

    On a straight path the PeRFlow step of a network that predicts the velocity *is* Euler's step (arXiv 2405.07510,
    section 3), so what is PeRFlow's here is the grid: n steps are shared out over the K windows that the weights were
    trained with, whatever grid the pipeline passes by default, and the last one ends at the last boundary. It is a
    `FlowMatchEulerDiscreteScheduler` to pipelines that ask, and its config is one's with three more keys; those of
    the stock grid (`shift`, `use_dynamic_shifting`, `use_karras_sigmas`, ...) have no effect and are kept, so that
    `FlowMatchEulerDiscreteScheduler.from_config(ours.config)` is the scheduler that it came from.

    Args:
        num_train_timesteps: N >= 1; the network is told `sigma * N`.
        shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len, shift_terminal,
            use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, time_shift_type: those of the base's scheduler.
        invert_sigmas: the network is told 1 - sigma, and gives data minus noise.
        stochastic_sampling: must be False: PeRFlow's sampler is deterministic.
        num_time_windows: K >= 1 windows from 1 to 0, equally long in the time of `window_shift`.
        window_boundaries: instead, K + 1 falling noise levels in 0..1, noisy to clean.
        window_shift: the shift > 0 that the weights were trained with, in whose time the steps inside a window are
            even. By default `shift`; with dynamic shifting it has to be known (exp(mu) of the training's resolution),
            or else `window_boundaries`, whose steps are then even in sigma.
        reshift: move the windows with the `mu` that the pipeline passes for its resolution. By default they stay as
            trained, and `mu` has no effect.

    Raises:
        ValueError: for values outside these; the message names the argument, the value and the choices.
    """

    config: Any  # diffusers keeps it

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        num_time_windows: int | None = None,
        window_boundaries: Sequence[float] | None = None,
        window_shift: float | None = None,
        reshift: bool = False,
    ) -> None:
        if not isinstance(num_train_timesteps, int) or num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps={num_train_timesteps!r}`; expected an integer >= 1.")
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"`time_shift_type={time_shift_type!r}`; expected 'exponential' or 'linear'.")
        if stochastic_sampling:
            raise ValueError(
                "`stochastic_sampling=True`, and PeRFlow's sampler is deterministic. Pass `stochastic_sampling=False` "
                "unless the base needs it: then it is a few-step model already."
            )
        self.windows = _windows(num_time_windows, window_boundaries, window_shift, shift, use_dynamic_shifting)
        cast(Any, self).register_to_config(
            num_time_windows=self.windows.num_windows,
            window_boundaries=list(self.windows.boundaries),
            window_shift=self.windows.shift,
        )
        self._shift = shift
        start = self.windows.boundaries[0]
        levels = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float64) / num_train_timesteps
        self.sigmas = (levels * start).float()
        self.timesteps = self.sigmas * num_train_timesteps
        self.sigma_max, self.sigma_min = self.sigmas[0].item(), self.sigmas[-1].item()
        self._no_run()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler from the config of a flow-matching base's scheduler; `kwargs` override it.

        `config`: that of `FlowMatchEulerDiscreteScheduler` and its kin, or of a sampler with `use_flow_sigmas`, whose
        `flow_shift` is the shift. `return_unused_kwargs`: the result is (scheduler, what it did not know). Raises
        ValueError for a base of another process, and where dynamic shifting leaves the windows unknown.
        """
        config = kwargs.pop("pretrained_model_name_or_path", config)
        if isinstance(config, str | os.PathLike):  # as diffusers still allows
            return cls.from_pretrained(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        check_is_config(config)
        if isinstance(config, dict):
            reason = flow_refusal(config)
            if reason is not None:
                raise ValueError(reason)
            if "shift" not in config and config.get("flow_shift") is not None:
                kwargs.setdefault("shift", config["flow_shift"])
            if not {"num_time_windows", "window_boundaries"}.isdisjoint(kwargs):
                # Windows are given as a whole: those of another accelerator say nothing about these.
                former = ("num_time_windows", "window_boundaries", "window_shift")
                config = {key: value for key, value in config.items() if key not in former}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        """N, the number of training timesteps."""
        return int(self.config.num_train_timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | np.ndarray | Tensor | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | np.ndarray | Tensor | None = None,
    ) -> None:
        """Choose the run: n steps over the windows, or noise levels of one's own inside them.

        `num_inference_steps` n >= 1; `sigmas`, (n,) falling in 0..1, in the even time that `window_shift` shifts, as
        diffusers' scheduler takes them; `timesteps`, (n,), as the network is told them (N * sigma, falling). The even
        grid from 1 that pipelines pass by themselves stands for n alone: the windows' own grid is taken, and `mu` has
        no effect unless `reshift` is set. Then `self.timesteps` is (n,) float32 on `device`, `self.sigmas` (n + 1,)
        with the last boundary. Raises ValueError for what is out of range, and for lengths that contradict each other.
        """
        if timesteps is None and sigmas is None and num_inference_steps is None:
            raise ValueError("No number of steps: pass `num_inference_steps`, `sigmas` or `timesteps`.")
        given = {"sigmas": _numbers("sigmas", sigmas), "timesteps": _numbers("timesteps", timesteps)}
        counts = {name: len(numbers) for name, numbers in given.items() if numbers is not None}
        if num_inference_steps is not None:
            counts["num_inference_steps"] = self._steps_of(num_inference_steps, 1)
        if len(set(counts.values())) > 1:
            raise ValueError(f"Different numbers of steps: {counts}. Pass one of them, or equally many.")
        windows, n = self.windows, next(iter(counts.values()))
        if self.config.reshift and mu is not None:
            windows = windows.reshifted(math.exp(mu) if self.config.time_shift_type == "exponential" else float(mu))
        told, even = given["timesteps"], given["sigmas"]
        if told is not None:
            told = [1 - t / len(self) if self.config.invert_sigmas else t / len(self) for t in told]
        chosen = told if even is None else even
        if chosen is None or _is_default(chosen):
            levels = windows.grid(self._steps_of(n, windows.num_windows))
        else:
            levels = windows.chosen([windows.shifted(u) for u in chosen] if told is None else told)
        sigmas32 = torch.tensor(levels, dtype=torch.float32, device="cpu")
        seen = 1.0 - sigmas32 if self.config.invert_sigmas else sigmas32
        self._begin(straight_run(sigmas32, seen, (seen[:-1] * len(self)).to(device)))
        self.sigmas = seen.to(device)

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> PeRFlowSchedulerOutput | tuple[Tensor]:
        """Move the sample to the next noise level: `sample + (sigma' - sigma) * model_output`.

        `model_output`, `sample`: (B, ...), any rank, computed in float32 or better and returned in the dtype of
        `model_output`, as diffusers' Euler scheduler does; equal to it to the last bit in float32 on the same grid.
        `timestep`: an element of `timesteps` or its value, or one per sample (B,). `per_token_timesteps`, (B, L): each
        token moves from its own level to the next lower one of the run. `s_churn`, `s_tmin`,
        `s_tmax`, `s_noise` and `generator` are part of the API and have no use: the sampler is deterministic. With
        `return_dict=False` the result is `(prev_sample,)`. Raises ValueError as `PeRFlowScheduler.step` does, and for
        integer tensors, which are places rather than timesteps.
        """
        if isinstance(timestep, Tensor) and not timestep.is_floating_point():
            raise ValueError(
                f"`timestep` is an integer tensor ({timestep.dtype}). Pass an element of `scheduler.timesteps`, which "
                "are floating point here, and no place among them."
            )
        x0: Tensor | None = None
        if per_token_timesteps is not None:
            self._count(timestep)
            prev_sample = sample.float() + self._to_next_level(per_token_timesteps) * model_output
        elif torch.compiler.is_compiling() or (isinstance(timestep, Tensor) and timestep.numel() > 1):
            rows = self._look_up(timestep, sample)
            prev_sample = combine_rows(sample, model_output, *rows[:2]).to(model_output.dtype)
            x0 = combine_rows(sample, model_output, *rows[2:]) if return_dict else None
        else:
            _, b, p, q = self._count(timestep)
            prev_sample = euler_step(sample, model_output, b)
            x0 = combine(sample, model_output, p, q) if return_dict else None
        return PeRFlowSchedulerOutput(prev_sample, x0) if return_dict else (prev_sample,)

    def _rows(self, table: Tensor, given: Tensor) -> Tensor:
        known, index = _places(given.to(table.device, table.dtype), table[:, 0])  # NaN, the last row's, equals nothing
        return table[torch.where(known, index, len(table) - 1), 1:]

    def _to_next_level(self, per_token: Tensor) -> Tensor:
        """How far each token (B, L) is from the next lower level of the run, (B, L, 1)."""
        sigma = per_token / len(self)
        levels = self.sigmas.to(sigma.device)[:, None, None]
        lower = ((levels < sigma[None] - 1e-6) * levels).amax(dim=0)
        return (sigma - lower)[..., None]

    def scale_noise(  # type: ignore[override]
        self, sample: Tensor, timestep: float | Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """Clean samples at `timestep`: `sigma * noise + (1 - sigma) * sample`, for image to image and inpainting.

        `sample`, `noise`: (B, ...); `timestep`: () or (B,), N * sigma, from `timesteps` or any in between. The result
        has the dtype of `sample`. Raises ValueError without noise.
        """
        if noise is None:
            raise ValueError("`noise=None`; expected a tensor like `sample`.")
        given = torch.as_tensor(timestep, device=sample.device).reshape(-1).float()
        seen, levels = (table.to(given.device) for table in (self.timesteps, self.sigmas))
        known, index = _places(given, seen)
        # A step's own level, not rounded twice on the way through its timestep.
        sigma = torch.where(known, levels[index], given / len(self))
        if self.config.invert_sigmas:
            sigma = 1 - sigma
        sigma = like(sigma, sample)
        return sigma * noise + (1.0 - sigma) * sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: float | Tensor) -> Tensor:
        """`scale_noise` under the name and in the order that other schedulers have.

        `original_samples`, `noise`: (B, ...); `timesteps`: () or (B,), N * sigma.
        """
        return self.scale_noise(original_samples, timesteps, noise)


def _places(times: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Which of `times` (B,) are `among` (n,) to the last bit, and where; nothing waits for a device."""
    same = times[:, None] == among[None]
    return same.any(1), same.int().argmax(1)


def _windows(
    count: int | None, given: Sequence[float] | None, shift: float | None, base_shift: float, dynamic: bool
) -> SigmaWindows:
    """The windows that the config's arguments describe."""
    if given is None:
        if shift is None and dynamic:
            raise ValueError(
                "The base shifts its time with the resolution (`use_dynamic_shifting`), so that `num_time_windows` "
                "alone does not say where windows lie. Pass `window_boundaries`, or the `window_shift` that the "
                "weights were trained with (exp(mu) of their resolution); both are in the weights' settings."
            )
        return SigmaWindows.uniform(4 if count is None else count, base_shift if shift is None else shift)
    if isinstance(given, str):
        raise ValueError(f"`window_boundaries={given!r}`; expected a list, such as [1.0, 0.9, 0.75, 0.5, 0.0].")
    usual = 1.0 if dynamic else base_shift
    try:
        windows = SigmaWindows(tuple(given), usual if shift is None else shift)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`window_boundaries={given}`, `window_shift={shift}`: {error}") from None
    if count not in (None, windows.num_windows):
        raise ValueError(
            f"`num_time_windows={count}` and `window_boundaries` of {windows.num_windows} windows; leave one out."
        )
    return windows


def _numbers(name: str, given: Any) -> list[float] | None:
    """A list of numbers, however it was passed."""
    if given is None:
        return None
    try:
        numbers = [float(number) for number in (given.tolist() if isinstance(given, Tensor | np.ndarray) else given)]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"`{name}={given}`; expected a list of falling numbers.")
    return numbers


def _slow_first(n: int, share: float = 0.025) -> np.ndarray:
    """The n levels of video pipelines that take half of the steps in the noisiest `share`, the rest on a parabola.

    Both pieces and their slopes meet; the parabola would be at 0 after n steps.
    """
    half = n // 2
    rest, rate = n - half, share / half
    step = np.arange(n, dtype=np.float64)
    bend = np.maximum(step - half, 0)
    return 1 - rate * step - (half - share * n) / (half * rest**2) * bend**2


def _is_default(sigmas: list[float]) -> bool:
    """Whether pipelines pass these when nobody chose another: even from 1 to 1 / n or to 0, or slow at first."""
    n, first, last = len(sigmas), sigmas[0], sigmas[-1]
    if n > 1 and np.abs(np.asarray(sigmas) - _slow_first(n)).max() <= 1e-6:
        return True
    if abs(first - 1) > _NEAR or (n > 1 and last > _NEAR and abs(last - 1 / n) > _NEAR):
        return False
    even = np.linspace(first, last, n)
    return bool(np.abs(np.asarray(sigmas) - even).max() <= _NEAR)
