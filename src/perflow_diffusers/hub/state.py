"""What an accelerated pipeline carries: the accelerator on its UNet, the former scheduler on PeRFlow's.

Neither is kept on the pipeline: copies of a UNet take its accelerator with them, and pipelines that share one agree.
"""

import copy
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging

from perflow_diffusers.errors import MergeError
from perflow_diffusers.hub import guidance
from perflow_diffusers.hub.adapters import faulty_adapter
from perflow_diffusers.hub.artifact import PeRFlowArtifact
from perflow_diffusers.weights.merge.layers import is_lost, layer_of
from perflow_diffusers.weights.read.live import find_network
from perflow_diffusers.weights.scales import Strength
from perflow_diffusers.words.shown import shown

logger = logging.get_logger("diffusers.perflow")  # below diffusers' own, so that its verbosity applies

_ON_UNET = "_perflow_loaded"
_FAULT = "PeRFlowScheduler is drawing, but the weights of {} are not at work as they should be: {}"
_RELOAD = "`unload_perflow(pipe)` puts the former scheduler back; then load the accelerator again."


@shown
@dataclass(frozen=True)
class Loaded:
    """An accelerator in a UNet, on which this is kept.

    `form`: "delta" or "lora"; `attached`: whether it is an adapter, rather than merged. `strength`: its strength, in
    all or in each block. `merges`: numbers of the merges of the UNet that belong to it, None for one that cannot be
    undone. `former`: the scheduler before PeRFlow's.
    """

    artifact: PeRFlowArtifact
    former: Any
    form: str
    attached: bool
    strength: Strength
    merges: tuple[int | None, ...]


class Companion:
    """What PeRFlow's scheduler knows of its pipeline: the former scheduler, and where the weights should be.

    The scheduler calls it at the start of every run: the first run without the weights is warned of, and the first
    with a guidance that is far from the artefact's is logged. It reads no tensor. `weights`: whether `load_perflow`
    put them in, rather than that they came with the pipeline. In a deep copy
    of the pipeline it watches the copy; copied with the scheduler alone, or pickled, it watches no other pipeline.
    """

    def __init__(self, artifact: PeRFlowArtifact, former: Any, pipe: Any, *, weights: bool) -> None:
        self.artifact, self.former, self.weights = artifact, former, weights
        self._said: str | None = None
        self._noticed = artifact.guidance_scale is None  # guidance
        self._copied = False
        self._pipe = _reference(pipe)
        self._unet = _reference(find_network(pipe)) if weights else _nothing

    def __call__(self) -> None:
        """Warn if the weights are not at work, once for each reason, and of a guidance that is far off, once."""
        unet = self._present_unet() if self.weights else None
        fault = None if unet is None else faulty(unet)
        if fault is not None and fault != self._said:
            warnings.warn(_FAULT.format(self.artifact.name or "an accelerator", fault), UserWarning, stacklevel=3)
        self._said = fault
        recommended = self.artifact.guidance_scale
        if not self._noticed and recommended is not None:
            given = guidance.passed_to_caller(lambda caller: companion(caller) is self)
            if given is not None and guidance.is_far(given, recommended):
                self._noticed = True
                name = self.artifact.name or "the accelerator"
                logger.warning(guidance.notice(name, given, recommended, self.artifact.steps))

    def _present_unet(self) -> torch.nn.Module | None:
        """The UNet that this run uses, as far as it can be told: pipelines may share a scheduler."""
        pipe = self._pipe()
        if pipe is not None and companion(pipe) is self:
            try:
                self._unet = _reference(find_network(pipe))  # for when the pipeline is gone, and a twin has its parts
            except MergeError:
                return None
        return self._unet()

    def restored(self) -> Any:
        """The former scheduler; one of their own for copies, whose runs must not meet in one."""
        return copy.deepcopy(self.former) if self._copied else self.former

    def __deepcopy__(self, memo: dict) -> "Companion":
        # Quick, and bound to the same pipeline if that is not copied: some pipelines copy what is in their scheduler
        # for every part of a picture, and put it back.
        twin = object.__new__(Companion)
        vars(twin).update(vars(self), _unet=_nothing, _copied=True)
        pipe = memo.get(id(self._pipe()))
        if pipe is not None:
            twin._pipe = _reference(pipe)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pipe": _nothing, "_unet": _nothing}


def _nothing() -> None:
    """A reference to what is not there; unlike a weak one it can be pickled."""


def _reference(thing: Any) -> Any:
    try:
        return _nothing if thing is None else weakref.ref(thing)
    except TypeError:  # not everything that acts as a pipeline can be referred to
        return _nothing


def loaded(pipe_or_unet: Any) -> Loaded | None:
    """What `load_perflow` put into a UNet, or into that of a pipeline; None also where there is none."""
    try:
        return vars(find_network(pipe_or_unet)).get(_ON_UNET)
    except MergeError:
        return None


def keep(unet: torch.nn.Module, state: Loaded | None) -> None:
    """Note on a UNet what is in it; None that it was taken out again."""
    vars(unet)[_ON_UNET] = state


def was_taken_out(unet: torch.nn.Module) -> bool:
    """Whether an accelerator was in this UNet, and was taken out by `unload_perflow`."""
    return vars(unet).get(_ON_UNET, unet) is None


def companion(pipe: Any) -> Companion | None:
    """What the pipeline's scheduler knows, if `load_perflow` or `set_scheduler` made it."""
    found = getattr(getattr(pipe, "scheduler", None), "_before_run", None)
    return found if isinstance(found, Companion) else None


def faulty(unet: torch.nn.Module) -> str | None:
    """In words, why the accelerator that should be in a UNet is not at work as a whole, and what helps; or None."""
    state = loaded(unet)
    if state is None and was_taken_out(unet):
        return f"they were taken out through another pipeline that shares the UNet. {_RELOAD}"
    if state is None:
        return (
            "the pipeline's UNet is another one than they were loaded into. Load the accelerator again, after "
            "`unload_perflow(pipe, force=True)`, which puts the former scheduler back."
        )
    layers = [layer_of(unet, number) for number in state.merges if number is not None and not is_lost(unet, number)]
    if None in layers:
        return f"they were taken out by `unmerge_delta`. {_RELOAD}"
    # As they are, and as they should be: the strengths of the weights that are merged.
    pairs = (
        (layer.strength.of(edit.name), state.strength.of(edit.name))
        for layer in layers
        if layer is not None
        for edit in layer.plan.edits
    )
    if state.attached:
        return faulty_adapter(unet, state.strength, pairs)
    if layers and not any(strength for strength, _ in pairs):
        return "their strength is 0. `set_perflow_scale(pipe, 1.0)` switches them on."
    return None
