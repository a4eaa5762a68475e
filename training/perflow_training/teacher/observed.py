"""A teacher that is learnt by watching its pipeline: how its network is called, and its own trajectories.

A short run says which argument is the latent, how the time is told, what the output means and which arguments belong
to a sample; replaying another run with what was learnt proves it, or the pipeline is refused in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from perflow_diffusers import FlowMatchPeRFlowScheduler
from perflow_diffusers.flow import NoisePath, SigmaWindows, flow_facts
from perflow_diffusers.schedulers.base_config import flow_refusal
from perflow_diffusers.words.shown import shown
from perflow_training.errors import ConfigError
from perflow_training.teacher.backbone import Backbone
from perflow_training.teacher.call import Call, Form
from perflow_training.teacher.conditions import Conditions
from perflow_training.teacher.guidance import CAPTIONS, Guided, guidance_of
from perflow_training.teacher.runs import Arguments, Recording, Runs, same

EXACT = {torch.float32: 1e-4, torch.float64: 1e-6}  # relative differences that are rounding
COARSE = 0.03  # of networks in 16 bits


@shown
@dataclass(frozen=True, eq=False)
class Observed:
    """A pipeline's network as a teacher.

    Fields: `runs`, of the pipeline; `call`; `rows`, the names of arguments that are one a sample; `guided`; `shape`, a
    sample's latents; `shift` > 0, of the time in which the pipeline's steps are even (1 for a diffusion); `flow`,
    whether it is a flow-matching base; `residual`, by how much the replay differed, relative.
    """

    runs: Runs
    call: Call
    rows: tuple[str, ...]
    guided: Guided
    shape: tuple[int, ...]
    shift: float
    flow: bool
    residual: float

    def conditions(self, captions: Sequence[str], scale: float | None = None) -> Conditions:
        """What the network is told of `captions` where nothing guides; `scale` as of `follow`."""
        told = self.runs.told(captions, self.guided.one_call(scale))
        return conditions_of(told, self.rows, self.call)

    def follow(
        self, captions: Sequence[str], noise: Tensor, windows: SigmaWindows, steps: int, scale: float | None
    ) -> list[Tensor]:
        """The teacher's states (B, ...) at the boundaries, from `noise` on: the pipeline's own run with guidance.

        `steps`, Euler's, a window; `scale`, of the guidance, None for the pipeline's own.
        """
        given = self.guided.on(scale, len(captions))
        count = windows.num_windows * steps
        return self.runs.follow(captions, count, steps, given, self.scheduler(windows), noise)

    def scheduler(self, windows: SigmaWindows) -> FlowMatchPeRFlowScheduler:
        """The sampler of students of these `windows`, whose finer grids are the teacher's."""
        return FlowMatchPeRFlowScheduler.from_config(
            self.runs.pipe.scheduler.config, window_boundaries=list(windows.boundaries), window_shift=windows.shift
        )

    def backbone(self) -> Backbone:
        """The network as training calls it."""
        return flow_backbone(self.runs.network, self.call)


def flow_backbone(network: torch.nn.Module, call: Call) -> Backbone:
    """A network that is told noise levels, time being these, and gives the velocity dz / dsigma."""
    return Backbone(network, NoisePath.straight(1), "flow", call=call)


def is_flow(pipe: Any) -> bool:
    """Whether a pipeline's scheduler says that its base was trained by flow matching."""
    return flow_refusal(dict(pipe.scheduler.config)) is None


def watch(
    pipe: Any,
    arguments: Mapping[str, Any] | None = None,
    prompts: Callable[[Sequence[str]], Arguments] | None = None,
    scale: float | None = None,
) -> Observed:
    """Learns how `pipe` calls its network, in two short runs; `arguments` and `prompts` as `Runs` has them.

    `scale`: the guidance that is wanted; that there is a way to have it is checked. Raises ConfigError, in words, for
    what cannot be learnt: a latent that is not found, several arguments that move, an output that is no velocity, a
    network that answers differently to the same, and a replay that is not exact.
    """
    runs = Runs(pipe, arguments, prompts)
    flow = is_flow(pipe)
    scheduler = _scheduler(pipe.scheduler, flow)
    guided = guidance_of(runs, scheduler, scale)
    off = dict(guided.off)
    first = runs.record(CAPTIONS[:3], 4, off, scheduler)
    other = runs.record(CAPTIONS[3:], 7, off, scheduler, seed=1)
    call = _call(runs, first, flow, scheduler)
    rows = _rows(first, other, call)
    residual = _replayed(runs, call, rows, other)
    shift = _shift(pipe.scheduler, first.mu) if flow else 1.0
    return Observed(runs, call, rows, guided, tuple(first.latents[0].shape[1:]), shift, flow, residual)


def conditions_of(told: Arguments, rows: Sequence[str], call: Call) -> Conditions:
    """What a call was told, without latent and time."""
    mine = {name: value if isinstance(value := told[name], Tensor) else tuple(value) for name in rows}
    return Conditions(mine, {name: v for name, v in told.items() if name not in (*rows, call.latent, call.time)})


def _scheduler(own: Any, flow: bool) -> Any:
    """One that shows the network the latents as they are, and whose step is one of the network's own output."""
    config = dict(own.config)
    if not flow:
        return DDIMScheduler.from_config(config)
    return FlowMatchEulerDiscreteScheduler.from_config({**config, **flow_facts(config)})


def _shift(own: Any, mu: float | None) -> float:
    config = own.config
    if config.get("use_dynamic_shifting") and mu is not None:
        return float(mu) if config.get("time_shift_type") == "linear" else math.exp(mu)
    return float(flow_facts(config).get("shift", 1.0))


def _as_state(value: Any, count: int) -> tuple[Tensor, bool] | None:
    """(tensor (B, ...), whether it was a list) of an argument that can be a state."""
    if isinstance(value, Tensor) and value.ndim > 1 and len(value) == count:
        return value, False
    if isinstance(value, list | tuple) and len(value) == count and all(isinstance(one, Tensor) for one in value):
        shapes = {one.shape for one in value}
        return (torch.stack(list(value)), True) if len(shapes) == 1 else None
    return None


def _form(value: Any, state: Tensor) -> tuple[Form, Tensor] | None:
    """(how it looks, what it is) if a value can be a state like `state` (B, ...)."""
    found = _as_state(value, len(state))
    form = None if found is None else Form.between(state.shape[1:], found[0].shape[1:], found[1])
    return None if form is None else (form, form.back(value))


def _call(runs: Runs, run: Recording, flow: bool, scheduler: Any) -> Call:
    steps = len(run.latents)
    what = type(runs.pipe).__name__
    if steps != len(run.levels) - 1 and flow:
        raise ConfigError(
            f"{what} takes {steps} of {len(run.levels) - 1} steps: it starts on a picture. Train on the text-to-image "
            "pipeline of the same base, and merge the result into this one."
        )
    if len(run.calls) != steps:
        raise ConfigError(
            f"{what} calls its network {len(run.calls) / steps:g} times a step without guidance. It cannot be trained "
            "by watching."
        )
    latent, sees = _latent(runs, run)
    moving = [name for name in run.calls[0] if name != latent and _moves(name, run)]
    time = [name for name in moving if _is_time(run.calls[0][name], run.count)]
    if len(time) != 1 or len(moving) > 1:
        others = [name for name in moving if name not in time[:1]]
        listed = ", ".join(f"`{name}`" for name in (moving if len(time) != 1 else others)) or "none"
        raise ConfigError(
            f"{what} tells its network anew in every step: {listed}. One number a sample, the time, is expected "
            "beside the latents: inputs that follow from the state, as a ControlNet's, cannot be kept. Train on the "
            "text-to-image pipeline of the same network, and merge the result into this one."
        )
    slope, offset, whole = _told(what, time[0], run, flow, scheduler)
    says, sign = _output(what, run, flow)
    given = run.calls[0][time[0]]
    return Call(latent, time[0], slope, offset, whole, max(0, given.ndim - 1), sees, says, sign)


def _latent(runs: Runs, run: Recording) -> tuple[str, Form]:
    for name, value in run.calls[1].items():
        found = _form(value, run.latents[0])
        if found is not None and torch.equal(found[1], run.latents[0].to(found[1].dtype)):
            return name, found[0]
    shapes = {name: tuple(v.shape) for name, v in run.calls[1].items() if isinstance(v, Tensor) and v.ndim > 2}
    raise ConfigError(
        f"None of the arguments of `{runs.component}` is the latents of {type(runs.pipe).__name__}, "
        f"{tuple(run.latents[0].shape)}; there are {shapes}. Where a picture or a mask is joined to them, train on "
        "the text-to-image pipeline of the same base, and merge the result into this one."
    )


def _moves(name: str, run: Recording) -> bool:
    return any(name not in call or not same(call[name], run.calls[0][name]) for call in run.calls[1:])


def _is_time(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.numel() in (1, count) and value.numel() == max(1, *value.shape, 1)


def _told(what: str, name: str, run: Recording, flow: bool, scheduler: Any) -> tuple[float, float, bool]:
    """(slope, offset, whether rounded) of the time: as a line over noise levels, or over path indices."""
    told = torch.stack([call[name].double().flatten()[0].cpu() for call in run.calls])
    if not flow:
        return 1.0, 0.0, not run.calls[0][name].is_floating_point()
    levels = run.levels[: len(told)]
    levels = 1 - levels if scheduler.config.get("invert_sigmas") else levels
    tolerance = 1e-4 if run.calls[0][name].dtype in (*EXACT, torch.int64) else 0.01
    slope, offset = (_meant(float(x), tolerance) for x in _line(levels, told))
    apart = float((slope * levels + offset - told).abs().max() / max(abs(slope), 1e-9))
    if apart > tolerance:
        raise ConfigError(
            f"What {what} tells its network as `{name}` is no line over the noise level (up to {apart:.2g} apart)."
        )
    return slope, offset, not run.calls[0][name].is_floating_point()


def _line(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y[:, None]).solution.flatten()


def _meant(number: float, tolerance: float) -> float:
    """The number without what rounding has added: one of two digits, or a whole one, where such a one is near."""
    for near in (0.0, float(f"{number:.2g}"), float(round(number))):
        if abs(number - near) <= tolerance * max(1.0, abs(number)):
            return near
    return number


def _output(what: str, run: Recording, flow: bool) -> tuple[Form, float]:
    """How the output looks, and the sign that makes it dz / dsigma."""
    found = _form(run.outputs[0], run.latents[0])
    if found is None:
        raise ConfigError(
            f"The network of {what} gives something of another shape than its latents, {tuple(run.latents[0].shape)}: "
            "a learned variance, or a prediction for more than the latents. It cannot be trained by watching."
        )
    form = found[0]
    if not flow:
        return form, 1.0
    outs = [form.back(one).double() for one in run.outputs]
    states = [one.double() for one in run.latents]
    spans = run.levels.diff().tolist()
    moved = [(states[j] - states[j - 1], outs[j] * spans[j]) for j in range(1, len(states))]
    sign = 1.0 if sum(float((step * euler).sum()) for step, euler in moved) > 0 else -1.0
    # 16 bits round the states, and by as much what is left of two that are close
    rounding = 2 * torch.finfo(run.latents[0].dtype).eps
    for state, (step, euler) in zip(states[1:], moved, strict=True):
        apart = float((step - sign * euler).norm())
        if apart > 1e-3 * float(step.norm()) + rounding * float(state.norm()):
            raise ConfigError(
                f"The output of {what}'s network is not the velocity of its latents, nor minus it: "
                f"{apart / float(step.norm()):.2g} apart. PeRFlow's step is Euler's on that velocity, so it cannot be "
                "trained."
            )
    return form, sign


def _rows(first: Recording, other: Recording, call: Call) -> tuple[str, ...]:
    """The arguments that have as many rows as there are samples, in both runs."""

    def long(value: Any, count: int) -> bool:
        if isinstance(value, Tensor):
            return value.ndim > 0 and len(value) == count
        return isinstance(value, list | tuple) and len(value) == count

    return tuple(
        name
        for name, value in first.calls[0].items()
        if name not in (call.latent, call.time)
        and long(value, first.count)
        and name in other.calls[0]
        and long(other.calls[0][name], other.count)
    )


@torch.no_grad()
def _replayed(runs: Runs, call: Call, rows: tuple[str, ...], run: Recording) -> float:
    """The largest relative difference of the outputs of a run, called again with what was learnt.

    First step by step, then with samples of different steps in one call.
    """
    what, network = type(runs.pipe).__name__, runs.network
    cond, worst, steps = conditions_of(run.calls[0], rows, call), 0.0, len(run.latents)
    states = torch.stack([call.sees.back(one[call.latent]) for one in run.calls])
    told = torch.stack([one[call.time].double().flatten().expand(run.count) for one in run.calls])
    wanted = torch.stack([call.says.back(one) * call.sign for one in run.outputs])
    times = (told - call.offset) / call.slope
    limit = EXACT.get(wanted.dtype, COARSE)
    sample = torch.arange(run.count)
    for places in [torch.full_like(sample, j) for j in range(steps)] + [(sample + 1) % steps]:
        z, time, there = states[places, sample], times[places, sample], wanted[places, sample]
        got = call(network, z, time, cond)
        apart = float((got - there).norm() / there.norm())
        worst = max(worst, apart)
        if apart < limit:
            continue
        if len(set(places.tolist())) > 1:
            raise ConfigError(
                f"The network of {what} takes one time for all samples: with a time each it is {apart:.2g} apart "
                f"(relative; expected below {limit:g}). It cannot be trained by watching."
            )
        again = float((call(network, z, time, cond) - got).norm() / there.norm())
        if again > limit / 10:
            raise ConfigError(
                f"The network of {what} answers differently when it is asked the same again ({again:.2g} apart, "
                "relative): dropout, or a random choice in it. Switch that off."
            )
        raise ConfigError(
            f"What was learnt by watching {what} does not reproduce its network's output: step {int(places[0]) + 1} "
            f"of another run is {apart:.2g} apart (relative; expected below {limit:g}). Something else changes "
            "from step to step: a hook, a cache, or state that the network keeps."
        )
    return worst
