"""All that can be wrong with a merge, found before a weight changes: `plan_merge(unet, source) -> MergePlan`."""

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import torch

from perflow_diffusers.errors import MergeError
from perflow_diffusers.families import FIRST_LAYERS, NETWORKS, family_in_words, is_wider
from perflow_diffusers.weights.merge.edits import Edit, Layer, MergePlan
from perflow_diffusers.weights.merge.sums import check_sums
from perflow_diffusers.weights.read import keys
from perflow_diffusers.weights.read.complete import is_complete_beside
from perflow_diffusers.weights.read.live import find_network, live_weights, replaced_modules
from perflow_diffusers.weights.read.lora import as_delta
from perflow_diffusers.weights.read.source import WeightSource, open_weights
from perflow_diffusers.weights.scales import Scale, strength_of

ConvIn = Literal["pad", "skip"]


def plan_merge(pipe_or_unet: Any, source: Any, *, scale: Scale = 1.0, conv_in: ConvIn = "pad") -> MergePlan:
    """Check that a delta fits a UNet and say what merging it would change; changes nothing.

    `source` is anything that `open_weights` takes: a delta in any format, or a LoRA, which may cover only some of the
    weights. Reads a delta once, to see that every number is finite; of a LoRA only the factors are read for that, so
    each product is computed once a merge. `conv_in` says what happens to a `conv_in.weight` with more input channels
    than the delta's (inpainting, 8-channel models): "pad" adds the delta to the first ones, which are the noisy
    latent; "skip" leaves it as it is. `scale`: a number, or numbers by block (see `strength_of`).

    Raises `MergeError` (a ValueError) if the model is offloaded, quantised, fused or no UNet; if keys are missing,
    unknown or misshapen; if the delta is empty, not finite, or complete weights; if a sum overflows their dtype;
    `WeightSourceError` for a LoRA of a kind that cannot be computed (OFT, ...), or that is damaged. Warns of layers
    for text encoders.
    """
    weights = usable_weights(find_network(pipe_or_unet))
    strength = strength_of(scale, weights)
    plan = plan_weights(weights, source, conv_in=conv_in)
    check_sums([Layer(0, plan, strength)], {}, weights, plan.edit_of)
    return plan


def plan_weights(weights: Mapping[str, torch.Tensor], source: Any, *, conv_in: ConvIn = "pad") -> MergePlan:
    """`plan_merge` for weights that are at hand under their canonical names; errors as there, but for the sums."""
    if conv_in not in ("pad", "skip"):
        raise MergeError(f"conv_in={conv_in!r} is unknown. Pass 'pad' or 'skip'.")
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    delta = as_delta(_checked_source(source), shapes, on_base=True)
    names = _checked_names(delta)
    _refuse_complete_weights(delta, names, weights)
    edits, skipped = _edits(delta, names, weights, conv_in)
    peaks, fingerprint = _scan(delta, edits)
    touched = {edit.name for edit in edits}
    untouched = tuple(name for name in weights if name not in touched)
    return MergePlan(delta, edits, untouched, skipped, peaks, fingerprint)


def usable_weights(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The live weights of a UNet under canonical names, fit to be changed in place.

    Raises `MergeError` if in-place changes would be lost or wrong: offloaded, quantised, fp8, sharded, fused.
    """
    _check_modules(unet)
    weights, collisions = live_weights(unet)
    if collisions:
        raise MergeError(f"Two tensors of the model have one canonical name: {collisions[0]}. Unload one adapter.")
    check_addable(weights)
    return weights


def check_addable(weights: Mapping[str, Any]) -> None:
    """Refuse (with `MergeError`) weights to which a delta cannot be added in place."""
    checks = (
        (lambda w: not isinstance(w, torch.Tensor), "packed by a quantiser", _QUANTISED),
        (lambda w: w.is_meta, "offloaded or not loaded (meta tensors)", _OFFLOADED),
        (lambda w: w.dtype.itemsize == 1 and w.is_floating_point(), "stored as fp8 (layerwise casting)", _FP8),
        (lambda w: not w.is_floating_point() or _is_wrapped(w), "quantised or sharded", _QUANTISED),
    )
    for is_bad, what, remedy in checks:
        bad = [name for name, weight in weights.items() if is_bad(weight)]
        if bad:
            raise MergeError(f"{len(bad)} weights of the model are {what}, e.g. {bad[0]}. {remedy}")


_OFFLOADED = (
    "Merge before `enable_sequential_cpu_offload` or device_map, or call `pipe.remove_all_hooks()` first and offload "
    "again afterwards."
)
_FP8 = "Merge first and enable layerwise casting afterwards, or load the model in fp16 or bf16."
_QUANTISED = (
    "Adding to them is lost or wrong. Load the model in fp16 or bf16, merge, and quantise afterwards "
    "(`unet.dequantize()` helps where the quantiser has it), or use the accelerator as a LoRA."
)


def _is_wrapped(weight: torch.Tensor) -> bool:
    """Whether a weight is a tensor subclass whose numbers are elsewhere (torchao, GGUF, bitsandbytes, DTensor)."""
    return type(weight) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _check_modules(unet: torch.nn.Module) -> None:
    """Refuse hooks, processors and adapters that keep copies of the weights elsewhere."""
    if copies := replaced_modules(unet):
        raise MergeError(
            f"PEFT runs trained copies in place of {keys.grouped(copies)} (`modules_to_save`), which a merge would "
            "miss. Merge into the model before, or after `model.merge_and_unload()`."
        )
    for name, module in unet.named_modules():
        if type(getattr(module, "processor", None)).__name__.startswith("Fused"):
            raise MergeError(
                f"The QKV projections of {name} are fused into copies that a merge would miss. Call "
                "`pipe.unfuse_qkv_projections()` first, merge, and fuse again."
            )
        if "group_offloading" in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}):
            raise MergeError(
                "The model is under group offloading, which keeps its own copies of the weights. Merge before "
                "`enable_group_offload`, or remove its hooks first."
            )


def _checked_source(source: Any) -> WeightSource:
    """What is opened, if there is anything in it, and in a layout that a delta can have."""
    delta = open_weights(source)
    if len(delta) == 0:
        raise MergeError(f"{delta.name} is empty: there is nothing to merge.")
    if keys.is_original_format(delta):
        raise MergeError(
            f"{delta.name} is a complete checkpoint in the original format, not a delta. Make one with "
            "`compute_delta(base, tuned)`, or load it as a pipeline of its own with `from_single_file`."
        )
    return delta


def _checked_names(delta: WeightSource) -> Mapping[str, str]:
    """`{canonical name: key}` of a delta."""
    names, collisions = delta.canonical
    if collisions:
        shown = ", ".join(f"{first} and {second}" for first, second in collisions[:3])
        raise MergeError(f"{delta.name} has more than one tensor for the same weight: {shown}. Keep one of each.")
    wrong = [f"{key} ({delta.dtypes[key]})" for key in names.values() if not delta.dtypes[key].is_floating_point]
    if wrong:
        raise MergeError(
            f"{delta.name} holds tensors that are not floating point: {', '.join(wrong[:4])}. Convert the delta to "
            "fp16, bf16 or fp32 first."
        )
    return names


def _refuse_complete_weights(
    delta: WeightSource, names: Mapping[str, str], weights: Mapping[str, torch.Tensor]
) -> None:
    """Refuse a model that is passed where its difference to the base belongs, whatever its header says."""
    if is_complete_beside(delta, names, weights):
        raise MergeError(
            f"{delta.name} holds complete weights, not a delta: its norms and layers are as large as the model's. "
            "Make the delta with `compute_delta(base, tuned)`, or pass the folder to `from_pretrained` to use it as "
            "it is. If it was made by `shrink_delta` or `extract_lora`, these were given a model."
        )


def _edits(
    delta: WeightSource, names: Mapping[str, str], weights: Mapping[str, torch.Tensor], conv_in: ConvIn
) -> tuple[tuple[Edit, ...], tuple[str, ...]]:
    """Pair every tensor of the delta with its weight; all that does not fit is told in one error."""
    identical = set(delta.metadata.get("identical", "").split())
    unknown = [name for name in names if name not in weights]
    expected = [name for name in weights if name not in identical and not keys.is_extension(name)]
    missing = [name for name in expected if name not in names and not delta.partial]
    edits, skipped, misshapen = [], [], []
    for name, key in names.items():
        if name not in weights:
            continue
        have, given = tuple(weights[name].shape), delta.shapes[key]
        if have == given:
            edits.append(Edit(name, key))
        elif name in FIRST_LAYERS and is_wider(have, given):
            if conv_in == "pad":
                edits.append(Edit(name, key, channels=given[1]))
            else:
                skipped.append(name)
        else:
            misshapen.append(f"{name} ({given} for {have})")
    if unknown or missing or misshapen:
        raise MergeError(_mismatch(delta, names, weights, unknown, missing, misshapen))
    owners: dict[int, str] = {}
    for edit in edits:
        other = owners.setdefault(id(weights[edit.name]), edit.name)
        if other != edit.name:
            raise MergeError(f"{other} and {edit.name} of the model are one tensor, which would get the delta twice.")
    return tuple(edits), tuple(skipped)


def _mismatch(
    delta: WeightSource,
    names: Mapping[str, str],
    weights: Mapping[str, torch.Tensor],
    unknown: list[str],
    missing: list[str],
    misshapen: list[str],
) -> str:
    """Grouped lists and the likely cause."""
    given = family_in_words({name: delta.shapes[key] for name, key in names.items()})
    have = family_in_words({name: tuple(weight.shape) for name, weight in weights.items()})
    parts = [f"{delta.name} does not fit the model; nothing was changed."]
    for what, found in (("Missing in the delta", missing), ("Not in the model", unknown), ("Misshapen", misshapen)):
        if found:
            parts.append(f"{what} ({len(found)}): {keys.grouped(found)}.")
    if len(unknown) == len(names):
        parts.append(
            "Not one name is common: these are the weights of something else than a "
            f"{' or '.join(network.class_name for network in NETWORKS)}."
        )
    elif given != have:
        parts.append(f"The delta is for {given}, the model is {have}: take the delta of that family.")
    elif misshapen:
        parts.append("The delta was made for a model of the same family with other layer sizes: check its base model.")
    else:
        parts.append("The delta is incomplete or from another version of the model: make or download it again.")
    return " ".join(parts)


def _scan(delta: WeightSource, edits: tuple[Edit, ...]) -> tuple[dict[str, float], str]:
    """Largest absolute values and a fingerprint of the content; refuses NaN and Inf."""
    extremes = sorted((edit.name, *delta.extremes(edit.key)) for edit in edits)
    peaks = {name: max(abs(low), abs(high)) for name, low, high in extremes}
    bad = [name for name, peak in peaks.items() if not peak < float("inf")]
    if bad:
        raise MergeError(
            f"{delta.name} has NaN or Inf in {len(bad)} tensors: {keys.grouped(bad)}. Nothing was changed. It is "
            "damaged, or overflowed when it was stored in fp16: make or download it again."
        )
    on_base = getattr(delta, "on_base", ())  # how large these are is known beside the base only
    peaks |= {edit.name: float("inf") for edit in edits if edit.key in on_base}
    return peaks, hashlib.sha256(repr(extremes).encode()).hexdigest()
