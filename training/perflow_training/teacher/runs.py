"""A pipeline that is run to be watched: what its network is called with, and the latents from step to step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from perflow_diffusers.families import ANY_COMPONENTS, networks_of, several
from perflow_diffusers.words.shown import shown
from perflow_training.errors import ConfigError
from perflow_training.teacher.conditions import INSIDE

#: what a pipeline's call must take: how many steps, from where, and who is told of each
NEEDED = ("num_inference_steps", "latents", "callback_on_step_end")
Arguments = dict[str, Any]


class _Seen(Exception):
    """The network has been called: nothing more is wanted of this run."""


@shown
@dataclass
class Recording:
    """A run of `count` samples.

    `calls`: the network's arguments by flat name, one a call; `outputs`: what it gave. `latents`: after each step.
    `levels`: the scheduler's sigmas, one more than steps. `mu`: what the pipeline told its scheduler of the size.
    """

    count: int
    calls: list[Arguments] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    levels: Tensor = field(default_factory=lambda: torch.zeros(0))
    mu: float | None = None


class Runs:
    """Runs of `pipe`, each with `arguments` (those of its call that are the same every time).

    `prompts` makes the arguments of captions; by default they are the pipeline's `prompt`. Raises ConfigError for a
    pipeline that has several networks or none, or whose call cannot be followed.
    """

    def __init__(
        self,
        pipe: Any,
        arguments: Mapping[str, Any] | None = None,
        prompts: Callable[[Sequence[str]], Arguments] | None = None,
    ):
        found = networks_of(pipe)
        if not found:
            raise ConfigError(
                f"{type(pipe).__name__} has no `{'` or `'.join(ANY_COMPONENTS)}`, the network that would be trained."
            )
        if len(found) > 1:
            raise ConfigError(
                several(f"The {type(pipe).__name__}", found) + " One network alone can be trained by watching."
            )
        self.pipe, self.prompts = pipe, prompts or (lambda captions: {"prompt": list(captions)})
        self.component, self.network = next(iter(found.items()))
        self.takes = inspect.signature(type(pipe).__call__).parameters
        missing = [name for name in NEEDED if name not in self.takes]
        if missing:
            raise ConfigError(
                f"{type(pipe).__name__}'s call has no `{'`, `'.join(missing)}`, without which it cannot be watched."
            )
        odd = [name for name in arguments or {} if name not in self.takes]
        if odd:
            raise ConfigError(
                f"{type(pipe).__name__}'s call has no `{'`, `'.join(odd)}`. Known: {', '.join(self.takes)}."
            )
        self.arguments = dict(arguments or {})
        self._names = list(inspect.signature(self.network.forward).parameters)
        pipe.set_progress_bar_config(disable=True)

    def record(
        self, captions: Sequence[str], steps: int, given: Arguments, scheduler: Any, seed: int = 0
    ) -> Recording:
        """All that happens in a run of `steps` steps under a copy of `scheduler`, from the noise of `seed`."""
        recording = Recording(len(captions))

        def after(module: nn.Module, args: tuple, kwargs: Arguments, output: Any) -> None:
            recording.calls.append(kept(self._flat(args, kwargs)))
            recording.outputs.append(kept(output[0]))

        with self._hooked(after, before=False), self._under(scheduler, recording) as own:
            generator = torch.Generator().manual_seed(seed)
            self._call(captions, steps, given, lambda _, z: recording.latents.append(kept(z)), generator=generator)
            recording.levels = own.sigmas.detach().double().cpu() if hasattr(own, "sigmas") else torch.zeros(0)
        return recording

    def told(self, captions: Sequence[str], given: Arguments) -> Arguments:
        """The arguments of the network's first call, by flat name; it does not come to compute anything."""
        seen: list[Arguments] = []

        def before(module: nn.Module, args: tuple, kwargs: Arguments) -> None:
            seen.append(kept(self._flat(args, kwargs)))
            raise _Seen

        try:
            with self._hooked(before, before=True), self._under(self.pipe.scheduler):
                self._call(captions, 1, given, lambda *_: None, generator=torch.Generator().manual_seed(0))
        except _Seen:
            return seen[0]
        raise ConfigError(f"{type(self.pipe).__name__} did not call its `{self.component}`.")

    def follow(
        self, captions: Sequence[str], steps: int, every: int, given: Arguments, scheduler: Any, noise: Tensor
    ) -> list[Tensor]:
        """The latents at the start, `noise`, and after every `every` steps of a run under a copy of `scheduler`."""
        states = [noise]
        dtype = noise.dtype

        def note(step: int, z: Tensor) -> None:
            if (step + 1) % every == 0:
                states.append(kept(z).to(dtype))

        with self._under(scheduler):
            self._call(captions, steps, given, note, latents=noise)
        return states

    def _call(
        self, captions: Sequence[str], steps: int, given: Arguments, note: Callable[[int, Tensor], None], **more: Any
    ) -> None:
        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: Arguments) -> Arguments:
            note(step, tensors["latents"])
            return tensors

        wanted = {
            "output_type": "latent",
            **self.arguments,
            **self.prompts(captions),
            **given,
            "num_inference_steps": steps,
            "callback_on_step_end": on_step_end,
            **more,
        }
        with torch.no_grad():
            self.pipe(**{name: value for name, value in wanted.items() if name in self.takes})

    @contextmanager
    def _under(self, scheduler: Any, recording: Recording | None = None) -> Iterator[Any]:
        """The pipeline with a copy of `scheduler`."""
        own, mine = self.pipe.scheduler, copy.deepcopy(scheduler)
        if recording is not None:
            set_timesteps = mine.set_timesteps

            def heard(*args: Any, **kwargs: Any) -> None:
                recording.mu = kwargs.get("mu")
                set_timesteps(*args, **kwargs)

            heard.__signature__ = inspect.signature(set_timesteps)  # type: ignore[attr-defined]  # pipelines look at it
            mine.set_timesteps = heard
        self.pipe.scheduler = mine
        try:
            yield mine
        finally:
            self.pipe.scheduler = own

    @contextmanager
    def _hooked(self, hook: Callable[..., None], *, before: bool) -> Iterator[None]:
        register: Any = self.network.register_forward_pre_hook if before else self.network.register_forward_hook
        handle = register(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _flat(self, args: tuple, kwargs: Arguments) -> Arguments:
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        return dict(_flattened(named))


def _flattened(named: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in named.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{within}{name}{INSIDE}")
        else:
            yield within + name, value


def kept(value: Any) -> Any:
    """A copy that later steps do not change."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {name: kept(one) for name, one in value.items()}
    return type(value)(kept(one) for one in value) if type(value) in (list, tuple) else value


def same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal, down to the last bit of every tensor."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one is other or one == other)
