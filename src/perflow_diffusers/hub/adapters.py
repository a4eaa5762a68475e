"""A LoRA as one more PEFT adapter of a network, beside others that stay as they are."""

import inspect
import json
import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import is_peft_available

from perflow_diffusers.errors import ArtifactError
from perflow_diffusers.families import FIRST_LAYERS, is_wider
from perflow_diffusers.hub.network import component_in, live_shapes
from perflow_diffusers.weights import WeightSource, open_weights
from perflow_diffusers.weights.make.convert import convert_lora
from perflow_diffusers.weights.read.live import find_network
from perflow_diffusers.weights.read.lora import RESIDUAL_KEY, as_delta
from perflow_diffusers.weights.read.lora_layers import ADAPTER_METADATA, lora_layers
from perflow_diffusers.weights.scales import Strength

ADAPTER = "perflow"
_REMOVED = (
    f"the LoRA '{ADAPTER}' was removed from the UNet, e.g. by `unload_lora_weights()`. `unload_perflow(pipe)` puts "
    "the former scheduler back; then load the accelerator again."
)


def obstacle(pipe: Any, lora: WeightSource, delta: WeightSource) -> str | None:
    """In words, why a LoRA cannot act as an adapter of this pipeline, though it could be merged; None if it can.

    `delta`: what `as_delta` makes of it for this UNet. Raises `WeightSourceError` for a DoRA.
    """
    if not is_peft_available():
        return "PEFT is not installed"
    if not hasattr(pipe, "load_lora_weights") or not hasattr(pipe, f"load_lora_into_{component_in(pipe)}"):
        return f"{type(pipe).__name__} takes no LoRAs"
    unet = find_network(pipe)
    if any(layer.merged for _, layer in _layers(unet)):  # PEFT then passes over all other adapters of the layer
        return "other LoRAs are fused into its layers"
    if any(layer.disable_adapters for _, layer in _layers(unet)):
        return "its LoRAs are switched off"
    shapes = live_shapes(unet)
    given = (as_delta(lora, shapes) if getattr(delta, "on_base", ()) else delta).shapes  # which refuses a DoRA
    wide = [name for name in FIRST_LAYERS & {*shapes} & {*given} if is_wider(shapes[name], given[name])]
    return f"its first layer has {shapes[wide[0]][1]} inputs, and the LoRA {given[wide[0]][1]}" if wide else None


def attach(pipe: Any, lora: WeightSource, strength: Strength) -> None:
    """Load a LoRA as the adapter "perflow", active beside those that are active now.

    All or nothing. Raises `ArtifactError` if the name is taken. See `obstacle` for what has to be so.
    """
    unet = find_network(pipe)
    if ADAPTER in getattr(unet, "peft_config", {}):
        raise ArtifactError(
            f"An adapter '{ADAPTER}' is on the UNet already. Delete it first: pipe.delete_adapters('{ADAPTER}')."
        )
    active = _active(unet)
    try:
        state, alphas, metadata = _state(pipe, lora)
        with warnings.catch_warnings():
            # PEFT warns of any second adapter, which is what is wanted here.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`|Adapter perflow was active")
            part = component_in(pipe)
            load = getattr(pipe, f"load_lora_into_{part}")
            given = {"network_alphas": alphas} if "network_alphas" in inspect.signature(load).parameters else {}
            given[part] = getattr(pipe, part)
            load(state, adapter_name=ADAPTER, metadata=metadata, _pipeline=pipe, **given)
        others = next(iter(active.values()), [])
        for name, layer in _layers(unet):  # every layer is told all names, as PEFT does it
            layer.set_adapter([*active.get(name, others), ADAPTER], inference_mode=True)
            if ADAPTER in _names(layer):
                layer.set_scale(ADAPTER, strength.of(f"{name}.weight"))
    except BaseException:
        detach(pipe)
        for name, layer in list(_layers(unet)):
            if name in active:
                layer.set_adapter(active[name], inference_mode=True)
            else:
                _unwrap(unet, name, layer)
        raise


def _state(pipe: Any, lora: WeightSource) -> tuple[Any, Any, Any]:
    """State dict, alphas and metadata of a LoRA, as the pipeline's own loader reads its own layout."""
    shapes = live_shapes(find_network(pipe))
    if any(layer.prefix for layer in lora_layers(lora, shapes)):
        # Our own conversion from kohya's layout: it drops no layer, and keeps alphas and header apart.
        with tempfile.TemporaryDirectory() as scratch:
            said = {key: value for key, value in lora.metadata.items() if key != RESIDUAL_KEY}  # that is merged apart
            path = convert_lora(
                replace(lora, metadata=said), Path(scratch, "lora.safetensors"), "diffusers", unet=shapes
            )
            return _read(pipe, open_weights(path))
    return _read(pipe, lora)


def _read(pipe: Any, lora: WeightSource) -> tuple[Any, Any, Any]:
    wanted = {"return_lora_metadata": True}
    if "return_alphas" in inspect.signature(pipe.lora_state_dict).parameters:  # else they are left in the state dict
        wanted["return_alphas"] = True
    found = pipe.lora_state_dict({name: lora[name].clone() for name in lora}, **wanted)
    said = lora.metadata.get(ADAPTER_METADATA)
    return found[0], found[1] if len(found) == 3 else None, json.loads(said) if said else None


def check_detachable(pipe: Any) -> None:
    """Raises `ArtifactError` if the adapter "perflow" is fused: then taking it out would leave its weights there."""
    unet = find_network(pipe)
    if getattr(unet, "peft_config", None) and any(ADAPTER in layer.merged_adapters for _, layer in _layers(unet)):
        raise ArtifactError(
            "PeRFlow's LoRA is fused into the weights by `pipe.fuse_lora()`. Call `pipe.unfuse_lora()` first, which "
            "restores them but for rounding; weights='delta' is the way to merge it that can be undone exactly."
        )


def detach(pipe: Any) -> None:
    """Delete the adapter "perflow", if it is there; others stay, active or not, and layers that it alone had wrapped
    are unwrapped."""
    unet = find_network(pipe)
    for name, layer in list(_layers(unet)):
        if ADAPTER in layer.active_adapters:  # otherwise PEFT would activate another one in its place
            layer.set_adapter([other for other in layer.active_adapters if other != ADAPTER], inference_mode=True)
        if ADAPTER in _names(layer):
            layer.delete_adapter(ADAPTER)
        if not _names(layer):  # also where someone else deleted it
            _unwrap(unet, name, layer)
    known = getattr(unet, "peft_config", {})
    known.pop(ADAPTER, None)
    if not known and hasattr(unet, "peft_config"):
        unet.unload_lora()  # type: ignore[operator]


def check_adapter(unet: torch.nn.Module) -> None:
    """Raises `ArtifactError` if the adapter "perflow" is not there, or where PEFT would pass over it."""
    layers = [layer for _, layer in _layers(unet)]
    if not any(ADAPTER in _names(layer) for layer in layers):
        raise ArtifactError(f"There is no strength to set: {_REMOVED}")
    if any(layer.merged for layer in layers):
        raise ArtifactError(
            "LoRAs are fused into the layers by `pipe.fuse_lora()`, which hides all others from them. Call "
            "`pipe.unfuse_lora()` first."
        )


def activate(unet: torch.nn.Module, strength: Strength) -> None:
    """Give the adapter "perflow" its strength, and make it active beside those that act now.

    See `check_adapter` for what has to be so.
    """
    for place, layer in _layers(unet):
        others = [] if layer.disable_adapters else [name for name in layer.active_adapters if name != ADAPTER]
        layer.enable_adapters(True)
        layer.set_adapter([*others, ADAPTER], inference_mode=True)
        if ADAPTER in _names(layer):
            layer.set_scale(ADAPTER, strength.of(f"{place}.weight"))


def faulty_adapter(unet: torch.nn.Module, strength: Strength, rest: Iterable[tuple[float, float]]) -> str | None:
    """In words, why the adapter "perflow" has not its strength on all of its layers, and what helps; or None.

    `rest`: pairs of strengths of what is merged beside it, that which it has and that which it should have.
    """
    right = f"`set_perflow_scale(pipe, {strength})` puts it right, beside the other LoRAs."
    named = [(name, layer) for name, layer in _wrappers(unet) if ADAPTER in layer.scaling]
    if not named:
        return _REMOVED
    wanted = [(layer, strength.of(f"{name}.weight")) for name, layer in named if ADAPTER not in layer.merged_adapters]
    loose = [layer for layer, _ in wanted]
    if any(layer.merged for layer in loose):
        return "other LoRAs are fused into its layers, which hides it from them. Call `pipe.unfuse_lora()`."
    if any(layer.disable_adapters for layer in loose):
        return f"its LoRA is switched off, e.g. by `disable_lora()`. {right}"
    if any(ADAPTER not in layer.active_adapters for layer in loose):
        return f"its LoRA is not active: another one was loaded or chosen after it. {right}"
    pairs = [*((_strength(layer, number), number) for layer, number in wanted), *rest]
    if pairs and all(should == 0 for _, should in pairs):
        return "its strength is 0. `set_perflow_scale(pipe, 1.0)` switches it on."
    others = [pair for pair in pairs if not math.isclose(*pair, rel_tol=1e-4)]
    if others:
        return (
            f"parts of it act at the strength {others[0][0]:g} instead of {others[0][1]:g}: `set_adapters` and a "
            f"call with `cross_attention_kwargs={{'scale': ...}}` reach only its LoRA, and the latter may leave 1. "
            f"{right}"
        )
    return None


def _strength(layer: Any, expected: float) -> float:
    """What the adapter counts for in a layer, as a multiple of its own alpha / rank; `expected` if nobody can tell."""
    rank = layer.r[ADAPTER]
    own = layer.lora_alpha[ADAPTER] / (math.sqrt(rank) if layer.use_rslora.get(ADAPTER, False) else rank)
    scaling = layer.scaling[ADAPTER]
    if isinstance(scaling, torch.Tensor):  # prepared for hotswapping; reading it would wait for the device
        return expected
    return scaling / own if own else 0.0


def other_adapters(pipe: Any) -> list[str]:
    """Names of the adapters of the UNet and the text encoders besides ours."""
    names = [name for part in _modules(pipe) for name in getattr(part, "peft_config", None) or {}]
    return [name for name in dict.fromkeys(names) if name != ADAPTER]


def drop_empty_wrappers(pipe: Any) -> None:
    """Put plain layers back where deleted adapters left PEFT's wrappers, whose names no loader knows."""
    if not is_peft_available():
        return
    for part in _modules(pipe):
        for name, layer in list(_layers(part)):
            if not _names(layer):
                _unwrap(part, name, layer)


def _modules(pipe: Any) -> list[torch.nn.Module]:
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [find_network(pipe), *(part for part in parts if part is not getattr(pipe, component_in(pipe)))]


def _unwrap(unet: torch.nn.Module, name: str, layer: Any) -> None:
    """Put the plain layer back where PEFT's wrapper is."""
    parent, _, last = name.rpartition(".")
    setattr(unet.get_submodule(parent), last, layer.get_base_layer())


def _layers(unet: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in unet.named_modules() if isinstance(module, BaseTunerLayer))


def _wrappers(unet: torch.nn.Module) -> list[tuple[str, Any]]:
    """PEFT's layers by name: many times faster than `named_modules`, for this is asked at every run."""
    from peft.tuners.lora import LoraLayer

    found: list[tuple[str, Any]] = []
    pending = [("", unet)]
    while pending:
        parent, module = pending.pop()
        for part, child in module._modules.items():
            if isinstance(child, LoraLayer):
                found.append((parent + part, child))
            elif child is not None and child._modules:
                pending.append((f"{parent}{part}.", child))
    return found


def _active(unet: torch.nn.Module) -> dict[str, list[str]]:
    return {name: list(layer.active_adapters) for name, layer in _layers(unet)}


def _names(layer: Any) -> set[str]:
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part)}
