"""PeRFlowScheduler: few-step sampling along a piecewise straight flow, behind the API of a diffusers scheduler.

Symbols: `N` training timesteps, `K` windows, `n` sampling steps; a step is `z' = a z + b out` with two numbers a step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from ..flow import PREDICTION_TYPES, base_of, marginal
from ..flow.chord import check_prediction_type
from .arguments import explicit_points, split_types, windows_of
from .base_config import NETWORK_FACTS, check_is_config, refusal, with_defaults
from .combine import beside, combine, combine_rows
from .run import run_over
from .stepping import Stepping


@dataclass
class PeRFlowSchedulerOutput(BaseOutput):
    """What `PeRFlowScheduler.step` returns; both tensors are like the sample, (B, C, ...).

    Fields: `prev_sample`, the state at the next timestep. `pred_original_sample`, the clean sample that the network's
    output implies under its own parameterisation (`flow.clean_estimate`), good for previews; None while the output
    does not ask for it. It is not the straight line of the window run on to t = 0.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class PeRFlowScheduler(Stepping, SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Sampler for PeRFlow weights (arXiv 2405.07510): the flow is a straight line inside each of K time windows.

    `PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type="ddim_eps")` is all that a pipeline needs.

    The network sees integer timesteps 1..N (N = pure noise, never 0), as the published weights were trained.

    Two types, two keys. `prediction_type` takes one of PeRFlow's types (ddim_eps, diff_eps, velocity), as published
    configs have it, or the base's (epsilon, sample, v_prediction), as stock configs have it. The config then holds the
    base's under `prediction_type`, where every other scheduler looks for it, and PeRFlow's under `perflow_type`. So
    `DDIMScheduler.from_config(perflow.config)` equals `DDIMScheduler.from_config(original.config)`. A base type alone
    is an error, never a guess. Where only PeRFlow's type was ever given, the base's is epsilon for ddim_eps and
    diff_eps (that is what such a network outputs) and None for velocity (other schedulers then refuse to step).

    Args:
        num_train_timesteps: N >= 1.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the noise schedule of the base, as
            in `DDIMScheduler`. With zero terminal SNR only velocity is defined.
        set_alpha_to_one: whether the run ends at no noise at all instead of the schedule's first level.
        prediction_type: one of PeRFlow's types, or the base's together with `perflow_type`.
        t_noise, t_clean: where sampling starts and ends, 1 >= t_noise > t_clean >= 0, rounded to integer timesteps.
        num_time_windows: K >= 1 windows of equal length between them.
        window_boundaries: instead, K + 1 falling integer timesteps from `t_noise * N` to `t_clean * N`.
        perflow_type: how the PeRFlow weights were trained: ddim_eps, diff_eps or velocity.

    Raises:
        ValueError: for values outside these; the message names the argument, the value and the choices.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | np.ndarray | None = None,
        set_alpha_to_one: bool = False,
        prediction_type: str | None = None,
        t_noise: float = 1.0,
        t_clean: float = 0.0,
        num_time_windows: int = 4,
        rescale_betas_zero_snr: bool = False,
        window_boundaries: Sequence[int] | None = None,
        perflow_type: str | None = None,
    ) -> None:
        base_type, self._type = split_types(prediction_type, perflow_type)
        #: The network that the weights were made for: its noise path, its prediction, where it counts from.
        self.base = base_of(self.config)
        self.path = self.base.path
        check_prediction_type(self._type, self.path)
        defaulted = self.config.get("_use_default_values", [])
        known = {*NETWORK_FACTS, "perflow_type"}
        if window_boundaries is not None:
            known.add("num_time_windows")
        count = None if "num_time_windows" in known.intersection(defaulted) else num_time_windows
        self.windows = windows_of(num_train_timesteps, t_noise, t_clean, count, window_boundaries)
        self.register_to_config(
            prediction_type=base_type,
            perflow_type=self._type,
            num_time_windows=self.windows.num_windows,
            window_boundaries=None if window_boundaries is None else list(self.windows.boundaries),
            _use_default_values=[k for k in defaulted if k not in known],
        )
        # The names under which pipelines look the noise schedule up.
        self.timesteps = torch.arange(num_train_timesteps, 0, -1)
        device = self.timesteps.device  # the default one, as in diffusers' schedulers
        self.alphas_cumprod = (self.path.alpha[1:] ** 2).float().to(device)
        self.final_alpha_cumprod = (self.path.alpha[0] ** 2).float().to(device)
        self._no_run()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler from the config of any diffusers scheduler of discrete betas; `kwargs` override it.

        `prediction_type="ddim_eps"` among them is what most pipelines need. The base's own prediction type and noise
        schedule are kept even where the other scheduler had them by default. `return_unused_kwargs`: the result is
        (scheduler, what it did not know). Raises ValueError where nothing says how
        the PeRFlow weights were trained, and for a base of another process (flow matching, EDM, consistency, ...).
        """
        config = kwargs.pop("pretrained_model_name_or_path", config)
        if isinstance(config, str | os.PathLike):  # as diffusers still allows
            return cls.from_pretrained(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        check_is_config(config)
        if not isinstance(config, dict):
            return super().from_config(config, return_unused_kwargs, **kwargs)
        reason = refusal(config, kwargs)
        if reason is not None:
            raise ValueError(reason)
        config = with_defaults(config)
        given = kwargs.get("prediction_type")
        stock_type = config.get("prediction_type") not in PREDICTION_TYPES
        if stock_type and given in PREDICTION_TYPES and kwargs.get("perflow_type") in (None, given):
            kwargs["perflow_type"] = kwargs.pop("prediction_type")
        facts = {k: config[k] for k in NETWORK_FACTS if k in config and k not in kwargs}
        scheduler, unused = cast(tuple, super().from_config(config, return_unused_kwargs=True, **facts, **kwargs))
        # A default of the source stays one, so that the next scheduler does with it what it does with the source's.
        inherited = [k for k in config.get("_use_default_values", []) if k in facts]
        defaulted = [*scheduler.config.get("_use_default_values", []), *inherited]
        scheduler.register_to_config(_use_default_values=defaulted)
        return (scheduler, unused) if return_unused_kwargs else scheduler

    def to_json_string(self) -> str:
        """The config as JSON, without `set_alpha_to_one` unless it was given: schedulers differ in its default."""
        config = json.loads(super().to_json_string())
        if "set_alpha_to_one" in self.config.get("_use_default_values", []):
            del config["set_alpha_to_one"]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def __len__(self) -> int:
        """N, the number of training timesteps."""
        return self.path.num_train_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | np.ndarray | Tensor | None = None,
    ) -> None:
        """Choose the run: `num_inference_steps` n >= 1, or explicit `timesteps`, integers falling inside the windows.

        `self.timesteps`, (n,) int64 on `device`, is what the network is to see. n >= K puts n // K steps into every
        window and one more into the first n % K; n < K joins neighbouring windows (`Windows.grid`), at a loss of
        quality that is warned of once. The last step ends at the last boundary. Resets `begin_index`, `step_index`.
        Raises ValueError unless exactly one of the two is given and in range.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"`num_inference_steps={num_inference_steps}` and `timesteps={timesteps}`; pass exactly one of them."
            )
        if timesteps is None:
            points = self.windows.grid(self._steps_of(num_inference_steps, self.windows.num_windows))
        else:
            points = explicit_points(self.windows, timesteps)
        given = torch.tensor(points[:-1], dtype=torch.int64, device=device)
        run = run_over(points, given, self.windows, self.path, self._type)
        self._begin(run)

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> PeRFlowSchedulerOutput | tuple[Tensor]:
        """Move the sample along its window's straight line to the next timestep: `a * sample + b * model_output`.

        `model_output`, `sample`: (B, C, ...), computed in float32 (float64 for float64 samples) and returned in the
        sample's dtype. `timestep`: a number or one-element tensor of `timesteps`, or one per sample (B,). Elements of
        `timesteps` are known by their address, and copies on a device are counted after the first, so that no step
        waits for a device; a compiled step and one with a timestep per sample look their numbers up by timestep.
        `generator` is part of the API and has no use: the sampler is deterministic. With `return_dict=False` the
        result is `(prev_sample,)`, the fast path. Raises ValueError before `set_timesteps`, after the last step, for a
        number that is not in `timesteps`, and where another thread has set other timesteps since.
        """
        if torch.compiler.is_compiling() or (isinstance(timestep, Tensor) and timestep.numel() > 1):
            rows = self._look_up(timestep, sample)
            prev_sample = combine_rows(sample, model_output, *rows[:2])
            x0 = combine_rows(sample, model_output, *rows[2:]) if return_dict else None
        else:
            a, b, p, q = self._count(timestep)
            prev_sample = combine(sample, model_output, a, b)
            x0 = combine(sample, model_output, p, q) if return_dict else None
        return PeRFlowSchedulerOutput(prev_sample, x0) if return_dict else (prev_sample,)

    def _rows(self, table: Tensor, given: Tensor) -> Tensor:
        index = given.to(torch.int64)
        # Row 0 is no step's: what is no integer from 1 to N ends there, neither rounded nor counted from the end.
        index = torch.where((index == given) & (index > 0) & (index < len(table)), index, 0)
        return table[index.to(table.device)]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Clean samples as PeRFlow states at `timesteps`: the point of the window's chord, `flow.marginal`.

        `original_samples`, `noise`: (B, ...); `timesteps`: integers () or (B,), from the last boundary to the first.
        At a timestep of the run the window is the one its step will follow. On boundaries this is the usual noising.
        Returns the dtype of `original_samples`, computed in float32 or better. Raises ValueError out of range and for
        no timestep at all.
        """
        given = torch.as_tensor(timesteps, device="cpu")
        index = given.to(torch.int64)
        if not torch.equal(index.to(given.dtype), given):
            raise ValueError(f"`timesteps={given.tolist()}`; expected integers.")
        if index.numel() == 0:
            raise ValueError(
                "`timesteps` is empty: there is no step to take. In image to image this means "
                "strength * num_inference_steps < 1: raise one of them."
            )
        start, end = self.windows.of(index)
        for t, (s, e) in self._course.own().run.spans.items():
            start, end = torch.where(index == t, s, start), torch.where(index == t, e, end)
        c_x0, c_noise = (beside(c, original_samples) for c in marginal(self.path, start, end, index))
        return (c_x0 * original_samples + c_noise * noise).to(original_samples.dtype)
