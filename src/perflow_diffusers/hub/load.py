"""Everything that an accelerator needs in one call, and back: `load_perflow`, `unload_perflow`.

Its strength or its scheduler alone: `set_perflow_scale`, `set_scheduler`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers.utils import logging

from perflow_diffusers.errors import ArtifactError, MergeError
from perflow_diffusers.families.published import published
from perflow_diffusers.hub.adapters import activate, attach, check_adapter, check_detachable, detach, obstacle
from perflow_diffusers.hub.artifact import PeRFlowArtifact
from perflow_diffusers.hub.family import (
    check_component,
    check_family,
    check_pipeline,
    check_process,
    warn_of_scheduler,
)
from perflow_diffusers.hub.find import find
from perflow_diffusers.hub.network import live_shapes, live_weights, shape_misfit
from perflow_diffusers.hub.recognise import published_pipeline, settings_of
from perflow_diffusers.hub.settings import AnyScheduler, short
from perflow_diffusers.hub.state import Companion, Loaded, companion, keep, loaded, was_taken_out
from perflow_diffusers.io.names import HubOptions, Where
from perflow_diffusers.weights import MergeHandle, WeightSource, merge_delta, open_weights
from perflow_diffusers.weights.merge.layers import Backup, acting_plans, is_lost, layer_of, stack_of
from perflow_diffusers.weights.merge.undo import rescale_merge, undo_merge
from perflow_diffusers.weights.merge.within import WITHIN, share_within
from perflow_diffusers.weights.read.live import find_network
from perflow_diffusers.weights.read.locate import SHORT_NAMES
from perflow_diffusers.weights.read.lora import Rebuilt, as_delta
from perflow_diffusers.weights.scales import Scale, Strength, strength_of
from perflow_diffusers.words.arguments import is_number

logger = logging.get_logger("diffusers.perflow")  # below diffusers' own, so that its verbosity applies

#: What a user may ask for.
FORMS = ("auto", "delta", "lora")


def load_perflow(
    pipe: Any,
    source: Any,
    weights: str = "auto",
    scale: Scale = 1.0,
    strict: bool = True,
    *,
    backup: Backup = "cpu",
    **where: Unpack[HubOptions],
) -> PeRFlowArtifact:
    """Make a pipeline a few-step one: its weights, its scheduler, and what to sample with, all from the artefact.

    `source`: a folder, a `.safetensors` file, a Hub id, a short name, or an artefact. `weights`: "delta" is merged
    into the network (see `merge_delta`, also for `backup`), "lora" attached as the adapter "perflow" beside others
    (merged, too, where it cannot be: a pipeline without LoRAs, more input channels, other LoRAs fused or switched
    off), "auto" the delta if there is one. `scale`: strength of the weights, a number or numbers by block (see
    `set_perflow_scale`). The scheduler is made from the pipeline's own and the artefact's settings. `where`:
    `revision`, `variant`, `subfolder`, `token`, `local_files_only`, `cache_dir`, `force_download`, as in diffusers.

    Returns the artefact: sample with its `steps` and `guidance_scale`. One line of the log says them and what was
    chosen, at warning level, because the pipeline's own guidance is another; the first call with a guidance far from
    the artefact's gets a line, too. `diffusers.logging.set_verbosity_error()` silences both.

    All or nothing: if anything fails, the pipeline is as before. `ArtifactError`, `MergeError` or `WeightSourceError`
    (all ValueErrors) for an artefact that cannot be trusted, or is of another family: network, noise schedule, base
    prediction, or weights that share nothing with its base's. A fine-tune of the base is the normal use and only
    logged. `strict=False` turns the last three into warnings of the log. What cannot be checked, because the artefact
    or the pipeline does not say it, is logged, too.
    """
    unet = check_pipeline(pipe)
    _check_free(pipe)
    if _is_itself(pipe, source):
        artifact = settings_of(pipe)
        _set_scheduler(pipe, artifact, pipe.scheduler)
        return artifact
    if weights not in FORMS:
        strength = f" The strength goes by name: scale={weights!r}." if is_number(weights) else ""
        raise ArtifactError(f"weights={weights!r} is unknown. Pass one of {', '.join(FORMS)}.{strength}")
    found = None if isinstance(source, PeRFlowArtifact) else find(source, weights, Where(**where))
    artifact = source if found is None else PeRFlowArtifact.of(found)
    form = _form(artifact, weights)
    if isinstance(source, str) and (source in SHORT_NAMES or published(source) is not None):
        what = "a local path, which wins over the known name" if Path(source).exists() else artifact.name
        logger.info(f"'{source}' is {what}.")
    given = open_weights(artifact.files[form] if found is None else found.opened.get(form, artifact.files[form]))
    return _load(pipe, artifact, form, given, _strength(scale, unet), strict, backup)


def _check_free(pipe: Any) -> None:
    """Raise `ArtifactError` for a pipeline that has an accelerator, and say which."""
    state, mine = loaded(pipe), companion(pipe)
    if state is None and mine is not None and not mine.weights:
        raise ArtifactError(
            "PeRFlow is in this pipeline's own weights, and `set_scheduler` gave it the scheduler of "
            f"{mine.artifact.name}: there is nothing to load. For another accelerator load the base; "
            "`unload_perflow(pipe)` puts the former scheduler back."
        )
    present = state or mine
    if present is not None:
        raise ArtifactError(
            f"{present.artifact.name} is loaded into this pipeline. Call `unload_perflow(pipe)` first, or "
            "`set_perflow_scale(pipe, 0.8)` to change its strength. (Pipelines that share a UNet share what is loaded "
            "into it.)"
        )


def _check_not_within(artifact: PeRFlowArtifact, delta: WeightSource, unet: torch.nn.Module) -> None:
    """Raise `ArtifactError` for weights that have the accelerator already: merged, fused, or saved with it."""
    merged = [plan.source for plan in acting_plans(stack_of(unet))]
    by_hand = any(delta.files and source.files == delta.files for source in merged)
    attached = False
    within: float | None = 1.0 if by_hand else None
    if not by_hand and artifact.base_sample:
        within = share_within(artifact.base_sample, delta, unet)
        if within is None or within < WITHIN:
            within = share_within(artifact.base_sample, delta, unet, attached=True)
            attached = True
    if within is None or within < WITHIN:
        return
    how = "was merged into this UNet by `merge_delta`" if by_hand else "is in this UNet's weights"
    first = "Call `unmerge_delta(pipe)` first, or" if merged else "Load the base again, or"
    if attached:
        how, first = "is attached to this UNet as a LoRA", "Call `pipe.unload_lora_weights()` first, or"
    raise ArtifactError(
        f"{artifact.name} {how} already, and loading it would apply it twice. Nothing was changed. {first} "
        f"`set_scheduler(pipe, {str(artifact.name)!r})`, which gives the pipeline the scheduler alone. "
        "(strict=False loads it all the same.)"
    )


def _load(
    pipe: Any,
    artifact: PeRFlowArtifact,
    form: str,
    given: WeightSource,
    strength: Strength,
    strict: bool,
    backup: Backup,
) -> PeRFlowArtifact:
    """`given`: the weights of this form, opened; all that is done with them reads this one source."""
    unet = find_network(pipe)
    check_process(artifact, pipe.scheduler.config)
    delta = as_delta(given, live_shapes(unet) if given.kind == "lora" else None, on_base=True)
    check_component(artifact, delta, pipe)
    check_family(artifact, pipe, unet, strict)
    if strict:
        _check_not_within(artifact, delta, unet)
    scheduler = artifact.make_scheduler(pipe.scheduler.config)
    merges: list[MergeHandle] = []
    attached, why = False, None
    try:
        if form == "lora":
            why = obstacle(pipe, given, delta)
        if form == "lora" and why is None:
            _check_shapes(artifact, delta, unet)
            residual = _residual(delta, unet)
            attach(pipe, given, strength)
            attached = True
            if residual is not None:
                merges.append(merge_delta(pipe, residual, strength, backup=backup))
        else:
            merges.append(merge_delta(pipe, delta, strength, backup=backup))
        former = pipe.scheduler
        scheduler._before_run = Companion(artifact, former, pipe, weights=True)
        pipe.scheduler = scheduler
    except BaseException:
        if attached:
            detach(pipe)
        for merge in reversed(merges):
            merge.undo()
        raise
    keep(unet, Loaded(artifact, former, form, attached, strength, tuple(merge.number for merge in merges)))
    how = form if why is None else f"merged {form}"
    note = "" if why is None else f" (not attached: {why})"
    logger.warning(_summary(artifact, f"{how} x {strength}{note}", scheduler))
    return artifact


def unload_perflow(pipe: Any, *, force: bool = False) -> None:
    """Take out what `load_perflow` did: every bit of the weights, and the former scheduler, are as before.

    Other LoRAs stay as they are. It works on copies of the pipeline and of its UNet. Of pipelines that share a UNet
    one takes the weights out; called on the others, it then puts their schedulers back.

    Raises `ArtifactError` if nothing is loaded, if its LoRA was fused, or if the UNet is another one now (`force=True`
    then puts the former scheduler back, which is all there is to do); `MergeError` if something else changed the
    weights since (`force=True` overwrites it), or if they were pickled. Then nothing is changed.
    """
    check_pipeline(pipe)
    state, mine = loaded(pipe), companion(pipe)
    if state is None and mine is None:
        raise ArtifactError("Nothing is loaded into this pipeline by `load_perflow`. Was it loaded into another one?")
    if state is None and mine is not None and mine.weights and not force and not was_taken_out(find_network(pipe)):
        raise ArtifactError(
            f"{mine.artifact.name} is no longer in this pipeline: its UNet is another one than that which it was "
            "loaded into. Nothing was changed. Pass force=True to put the former scheduler back all the same."
        )
    if state is not None:
        _take_out(pipe, find_network(pipe), state, force)
        keep(find_network(pipe), None)
    if mine is not None:
        pipe.scheduler = mine.restored()
    elif state is not None:
        pipe.scheduler = state.former


def _take_out(pipe: Any, unet: torch.nn.Module, state: Loaded, force: bool) -> None:
    """Undo merges and attachment."""
    name = state.artifact.name
    if state.attached:
        check_detachable(pipe)
    for number in reversed(state.merges):
        # None and what was pickled are there to say that they cannot be undone; what is gone was undone by hand.
        if number is None or is_lost(unet, number) or layer_of(unet, number) is not None:
            undo_merge(unet, number, name, force=force)
    if state.attached:
        detach(pipe)


def set_perflow_scale(pipe: Any, scale: Scale) -> None:
    """Set the strength of what `load_perflow` put into a pipeline, all of it: 1 is full, 0 none.

    `scale`: a number, or numbers by block as `merge_delta` takes them: `{"down": 0.8, "mid": 1, "up": {"block_1":
    [0.4, 0.6, 0.8]}}`, "IN00" ... "OUT11", or beginnings of weights' names; what is not named is at 1.

    A merged accelerator is rescaled from the base's bits, without drift. An attached LoRA is rescaled with the biases
    and norms that are merged beside it, and made active beside the LoRAs that act now; those that are switched off
    stay so. This is the one way that reaches all parts: `set_adapters`, `disable_lora` and
    `cross_attention_kwargs={"scale": ...}` of diffusers act on adapters alone.

    Raises `ArtifactError` if nothing is loaded, for a scale that is no finite number or names no block of the UNet,
    and if its LoRA was removed or LoRAs are fused; `MergeError` as `unload_perflow` does. Then nothing is changed.
    """
    unet, state = find_network(pipe), loaded(pipe)
    if state is None:
        raise ArtifactError("Nothing is loaded into this pipeline by `load_perflow`, so there is no strength to set.")
    strength = _strength(scale, unet)
    if state.attached:
        check_adapter(unet)
    for number in state.merges:
        rescale_merge(unet, number, state.artifact.name, strength)
    if state.attached:
        activate(unet, strength)
    keep(unet, replace(state, strength=strength))


def set_scheduler(pipe: Any, source: Any = None, **where: Unpack[HubOptions]) -> AnyScheduler:
    """Give a pipeline that has PeRFlow in its weights the right scheduler; returns it.

    Published pipelines are recognised by their name (a Hub id, or a local folder of that name), exported ones by the
    file that `export_pipeline` wrote. `source`: an artefact whose settings to take instead (folder, file, Hub id).
    `where`: as in `load_perflow`, of `source`, or else of the repository that the pipeline came from.
    `unload_perflow(pipe)` puts the former scheduler back. Raises `ArtifactError` for a pipeline that is not
    recognised.
    """
    check_pipeline(pipe)
    state, mine = loaded(pipe), companion(pipe)
    if state is not None:
        raise ArtifactError(f"{state.artifact.name} is loaded, with its scheduler. Call `unload_perflow(pipe)` first.")
    given = source is not None
    artifact = PeRFlowArtifact.from_pretrained(source, "none", **where) if given else settings_of(pipe, Where(**where))
    return _set_scheduler(pipe, artifact, pipe.scheduler if mine is None else mine.restored())


def _set_scheduler(pipe: Any, artifact: PeRFlowArtifact, former: Any) -> AnyScheduler:
    check_process(artifact, former.config)
    scheduler = artifact.make_scheduler(former.config)
    warn_of_scheduler(artifact, former.config)
    scheduler._before_run = Companion(artifact, former, pipe, weights=False)
    pipe.scheduler = scheduler
    logger.warning(_summary(artifact, "weights as they are", scheduler))
    return scheduler


def _is_itself(pipe: Any, source: Any) -> bool:
    """Whether the source is the published pipeline that the pipeline was loaded from."""
    entry = published(str(source)) if isinstance(source, str) and not Path(source).exists() else None
    return entry is not None and entry.form == "pipeline" and published_pipeline(pipe) == entry


def _form(artifact: PeRFlowArtifact, wanted: str) -> str:
    order = ("delta", "lora") if wanted == "auto" else (wanted,)
    for form in order:
        if form in artifact.files:
            return form
    has = ", ".join(form for form in FORMS if form in artifact.files)
    raise ArtifactError(
        f"{artifact.name} has no {' or '.join(order)}; it has {has or 'settings only'}. "
        + ("Pass weights='auto'." if has else "Add weights: `artifact.with_files(delta=...)`.")
    )


def _strength(scale: Any, unet: torch.nn.Module) -> Strength:
    """The scale made out for this UNet; raises `ArtifactError` for what is no scale, or none of it."""
    try:
        return strength_of(scale, live_shapes(unet) if isinstance(scale, Mapping) else ())
    except MergeError as error:
        raise ArtifactError(f"{error} Nothing was changed.") from error


def _check_shapes(artifact: PeRFlowArtifact, delta: WeightSource, unet: torch.nn.Module) -> None:
    _ = artifact.lora_file  # says that one in memory has to be written first
    wrong = shape_misfit(delta, unet)
    if wrong is not None:
        raise ArtifactError(
            f"{artifact.name} does not fit the UNet: {wrong}. Nothing was changed. Take the LoRA of this family."
        )


def _residual(delta: WeightSource, unet: torch.nn.Module) -> WeightSource | None:
    """What a LoRA cannot carry, as a delta that leaves all other weights alone."""
    source = delta.residual if isinstance(delta, Rebuilt) else None
    if not source:
        return None
    others = " ".join(weight for weight in live_weights(unet) if weight not in source)
    return replace(source, metadata={**source.metadata, "identical": others})


def _summary(artifact: PeRFlowArtifact, what: str, scheduler: AnyScheduler) -> str:
    """A warning though nothing is wrong: the pipeline's own guidance is another, and only its caller can pass this."""
    guidance = "" if artifact.guidance_scale is None else f", guidance_scale={artifact.guidance_scale:g}"
    return (
        f"PeRFlow from {artifact.name}: sample with num_inference_steps={artifact.steps_in_words}{guidance} ({what}; "
        f"{type(scheduler).__name__}({artifact.prediction_type}, boundaries {short(scheduler.windows.boundaries)}))."
    )
