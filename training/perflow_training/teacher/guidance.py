"""How the guidance of a pipeline is switched off and on, found out by trying what its call takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from perflow_diffusers.words.shown import shown
from perflow_training.errors import ConfigError
from perflow_training.teacher.runs import Arguments, Runs, same

CAPTIONS = ("a", "a red house by the sea", "two dogs", "a man", "a cup of tea on a table")


@shown
@dataclass(frozen=True)
class Guided:
    """How guidance is switched: `off` are the arguments of a run of one call a step, one row a sample.

    `name`: of the argument that scales it, None where there is none. `classifier_free`: whether it costs a second row
    or call; otherwise the scale is told to the network. `negative`: whether an empty negative prompt must be passed.
    `default`: the scale that the pipeline takes by itself.
    """

    off: Mapping[str, Any]
    name: str | None = None
    classifier_free: bool = False
    negative: bool = False
    default: float | None = None

    def on(self, scale: float | None, count: int) -> Arguments:
        """The arguments of a run of `count` samples with this scale; None: the pipeline's own."""
        if scale is None or self.name is None:
            return {}
        return {self.name: scale, **({"negative_prompt": [""] * count} if self.negative else {})}

    def sampled_with(self, scale: float | None) -> float | None:
        """The scale to sample a student with: what switches guidance off, or what the network was told in training.

        `scale` as of `on`; None where there is nothing to be said.
        """
        if self.classifier_free:
            return next((float(value) for value in self.off.values()), 1.0)
        return (self.default if scale is None else scale) if self.name is not None else None

    def one_call(self, scale: float | None) -> Arguments:
        """Those of a student's run: one call a step, and a scale that the network is told is told still."""
        told = {} if self.classifier_free or scale is None or self.name is None else {self.name: scale}
        return {**self.off, **told}


def guidance_of(runs: Runs, scheduler: Any, scale: float | None) -> Guided:
    """How the pipeline is run without guidance, and with `scale`."""
    names = [name for name in ("true_cfg_scale", "guidance_scale") if name in runs.takes]

    def costs(given: Arguments) -> int:
        """How many rows a sample a step asks of the network."""
        run = runs.record(CAPTIONS[:3], 1, given, scheduler)
        return sum(max((_count(v) for v in call.values()), default=0) for call in run.calls) // 3

    def usual(name: str) -> float | None:
        default = runs.takes[name].default
        return float(default) if isinstance(default, int | float) else None

    plain = costs({})
    off: Arguments | None = {} if plain == 1 else None
    for value in (1.0, 0.0):
        for name in names:
            if off is None and costs({name: value}) == 1:
                off = {name: value}
    if off is None:
        raise ConfigError(
            f"{type(runs.pipe).__name__} calls its network for {plain} rows a sample and step, and neither 1 nor 0 "
            f"for {' or '.join(f'`{name}`' for name in names) or 'a guidance scale'} makes it one. It cannot be "
            "trained by watching."
        )
    if plain > 1:
        return Guided(off, next(iter(off)), classifier_free=True, default=usual(next(iter(off))))
    if not names:
        return Guided(off)
    probe = 3.0 if scale is None else scale
    for name in reversed(names):
        told = [runs.told(CAPTIONS[:1], {name: value}) for value in (probe, probe + 1)]
        if not same(*(list(one.values()) for one in told)):
            return Guided({}, name, default=usual(name))
    for name in names:
        negative = "negative_prompt" in runs.takes and not set(runs.prompts([""])) & {"negative_prompt_embeds"}
        given = {name: probe, **({"negative_prompt": [""] * 3} if negative else {})}
        if costs(given) > 1:
            return Guided({name: 1.0}, name, classifier_free=True, negative=negative)
    if scale not in (None, 1.0):
        raise ConfigError(
            f"`solve_guidance={scale:g}` changes nothing in {type(runs.pipe).__name__}: its network is not guided. "
            "Set it to null."
        )
    return Guided({})


def _count(value: Any) -> int:
    """How long the first axis of something is that looks like states."""
    if isinstance(value, Tensor):
        return len(value) if value.ndim > 2 else 0
    listed = isinstance(value, list) and value and isinstance(value[0], Tensor) and value[0].ndim > 2
    return len(value) if listed else 0
