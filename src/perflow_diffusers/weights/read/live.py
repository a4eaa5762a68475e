"""The weights of a live model under canonical names, and the adapters that may act beside them."""

import os
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from perflow_diffusers.errors import MergeError, WeightSourceError
from perflow_diffusers.families import ANY_COMPONENTS, network_in, sole_network
from perflow_diffusers.weights.read import keys
from perflow_diffusers.words.arguments import in_words

_PLAIN_PARTS = ("base_layer", "original_module")


def find_unet(pipe_or_unet: Any) -> torch.nn.Module:
    """The UNet of a pipeline, or the module itself, without wrappers of torch.compile, data parallelism, PEFT.

    Raises `MergeError` if there is none.
    """
    module: Any = pipe_or_unet if isinstance(pipe_or_unet, torch.nn.Module) else network_in(pipe_or_unet)
    if not isinstance(module, torch.nn.Module):
        raise MergeError(_no_unet(pipe_or_unet))
    return unwrapped(module)


def find_network(pipe_or_network: Any) -> torch.nn.Module:
    """The network of a pipeline of any family (`unet` or `transformer`), or the module itself, without wrappers.

    Raises `MergeError` if there is none, and if there are several.
    """
    if isinstance(pipe_or_network, torch.nn.Module):
        return unwrapped(pipe_or_network)
    found = sole_network(pipe_or_network, MergeError)
    return find_unet(pipe_or_network if found is None else found)  # compiled modules have no truth value


def _no_unet(given: Any) -> str:
    """Why there is no UNet in what was passed, and what to pass."""
    if isinstance(given, type):
        return (
            f"The class {given.__name__} has no UNet: load one first, `pipe = {given.__name__}.from_pretrained(...)`, "
            "and pass that."
        )
    if given is None:
        return "None has no UNet. Load a pipeline first, `pipe = DiffusionPipeline.from_pretrained(...)`, and pass it."
    if isinstance(given, str | os.PathLike | int | float | Mapping) or (
        callable(given) and hasattr(given, "__name__")
    ):
        return (
            f"{in_words(given)} has no UNet. The pipeline (or its UNet), loaded, comes first, and the rest after it: "
            "`load_perflow(pipe, source)`, `merge_delta(pipe, source)`, `set_perflow_scale(pipe, 0.5)`."
        )
    others = [part for part in ("transformer", "prior") if getattr(given, part, None) is not None]
    missing = [name for name in ANY_COMPONENTS if hasattr(given, name)]
    has = f" (it has a `{others[0]}`)" if others else f" (its `{missing[0]}` is None)" if missing else ""
    return (
        f"{type(given).__name__} has no UNet{has}. Pass a UNet or a transformer, or a pipeline that has one loaded; "
        "published accelerators are for the UNets of Stable Diffusion 1.x, 2.x and SDXL."
    )


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The model inside wrappers of torch.compile, of data parallelism, and of PEFT (`PeftModel`, `LoraModel`)."""
    while True:
        inner: Any = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
        if _is_peft_model(module):
            inner = getattr(module, "base_model", module).model  # type: ignore[union-attr]
        if not isinstance(inner, torch.nn.Module):
            return module
        module = inner


def live_weights(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor], tuple[tuple[str, str], ...]]:
    """`{canonical name: tensor}` of a model without the tensors of its adapters, and the pairs of names that collide.

    The tensors are the model's own (parameters, not copies). Entries of a quantiser's that are no tensors are in it.
    """
    state = module.state_dict(keep_vars=True)
    wrappers = {name for name, _ in _wrappers(module)}
    own = [name for name in state if not _is_adapters(name, wrappers)] if wrappers else list(state)
    names, collisions = keys.canonical_map(own)
    return {name: state[key] for name, key in names.items()}, collisions


def check_runs_on_its_weights(model: torch.nn.Module) -> None:
    """Raise `WeightSourceError` if adapters make a model compute with other numbers than those in its weights.

    Fused adapters are in the weights; disabled ones, and those of scale 0 or fresh from their initialisation, do
    nothing. All of these are fine, attached or not.
    """
    inner = unwrapped(model)
    acting: dict[str, int] = {}
    leaving: dict[str, int] = {}
    for _, layer in _wrappers(inner):
        for name in layer.merged_adapters if layer.disable_adapters else ():
            leaving[name] = leaving.get(name, 0) + 1  # PEFT takes them out of the weights at the next call
        for name in _acting(layer):
            acting[name] = acting.get(name, 0) + 1
    kind = type(inner).__name__
    if acting:
        wrapped = _is_peft_model(model)
        fuse = "`model.merge_and_unload()`" if wrapped else "`fuse_lora()` of the pipeline or the model"
        unload = "`model.unload()`" if wrapped else "`pipe.unload_lora_weights()`, `unet.unload_lora()`"
        raise WeightSourceError(
            f"{kind} has adapters attached that act beside its weights: {_counted(acting)}. What is read from it "
            f"would lack them. Call {fuse} first to put them into the weights, or unload them ({unload})."
        )
    if leaving:
        raise WeightSourceError(
            f"{kind} has adapters that are fused into its weights and disabled: {_counted(leaving)}. PEFT takes them "
            "out of the weights at the next call. Call `pipe.unfuse_lora()` first, or enable them again."
        )


def acting_differences(model: torch.nn.Module, wanted: Collection[str]) -> dict[str, torch.Tensor]:
    """What acting LoRAs add beside the weights, for the `wanted` canonical names, as whole tensors.

    Adapters whose difference PEFT cannot give apart from the weights are left out.
    """
    layers = {
        f"{name}.weight": layer for name, layer in _wrappers(unwrapped(model)) if hasattr(layer, "get_delta_weight")
    }
    found = {}
    for name, key in keys.canonical_map(layers)[0].items():
        acting = _acting(layers[key]) if name in wanted else []
        plain = [one for one in acting if _is_plain_lora(layers[key], one)]
        if plain:
            with torch.no_grad():
                found[name] = torch.stack([layers[key].get_delta_weight(one).float() for one in plain]).sum(0)
    return found


def replaced_modules(model: torch.nn.Module) -> list[str]:
    """Modules in whose place PEFT runs a trained copy (`modules_to_save`): changes of them would do nothing."""
    other = sys.modules.get("peft.utils.other")
    return [
        name
        for name, layer in _wrappers(model)
        if other is not None and isinstance(layer, other.AuxiliaryTrainingWrapper) and _acting(layer)
    ]


def _counted(layers: dict[str, int]) -> str:
    return ", ".join(f"'{name}' (in {count} layers)" for name, count in layers.items())


def _wrappers(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers around layers of a model; none, and nothing is imported, if PEFT is not in use."""
    tuners, other = (sys.modules.get(name) for name in ("peft.tuners.tuners_utils", "peft.utils.other"))
    if tuners is None or other is None:
        return
    kinds = (tuners.BaseTunerLayer, other.AuxiliaryTrainingWrapper)
    yield from ((name, layer) for name, layer in module.named_modules() if isinstance(layer, kinds))


def _is_peft_model(module: torch.nn.Module) -> bool:
    peft, tuners = sys.modules.get("peft"), sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and tuners is not None and isinstance(module, peft.PeftModel | tuners.BaseTuner)


def _is_adapters(name: str, wrappers: set[str]) -> bool:
    """Whether a tensor of a state dict lies in a wrapper, but not in the layer that it wraps."""
    parts = name.split(".")
    inside = (part for place, part in enumerate(parts) if place and ".".join(parts[:place]) in wrappers)
    return any(part not in _PLAIN_PARTS for part in inside)


def _acting(layer: Any) -> list[str]:
    """Names of the adapters of a wrapper that change what it computes, beside the weights of the wrapped layer."""
    if layer.disable_adapters or layer.merged_adapters:  # with one adapter fused PEFT ignores the others
        return []
    parts = (getattr(layer, part) for part in layer.adapter_layer_names)
    there = {name for part in parts if hasattr(part, "keys") for name in part}
    return [name for name in layer.active_adapters if name in there and not _is_idle(layer, name)]


def _is_plain_lora(layer: Any, name: str) -> bool:
    """Whether an adapter is a LoRA of two factors that are there."""
    if name not in getattr(layer, "lora_A", {}) or getattr(layer, "lora_variant", {}).get(name) is not None:
        return False
    return not any(factor.weight.is_meta for factor in (layer.lora_A[name], layer.lora_B[name]))


def _is_idle(layer: Any, name: str) -> bool:
    """Whether an adapter surely adds zero: a LoRA of scale 0, or whose second factor is zero."""
    if getattr(layer, "lora_variant", {}).get(name) is not None or name not in getattr(layer, "lora_B", {}):
        return False
    if layer.scaling.get(name) == 0:
        return True
    return not any(tensor.is_meta or bool(tensor.any()) for tensor in layer.lora_B[name].parameters())
