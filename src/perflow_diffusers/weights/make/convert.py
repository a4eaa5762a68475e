"""LoRA files from one layout to the other without loss: `convert_lora(source, out, "diffusers" | "kohya")`."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from perflow_diffusers.errors import WeightSourceError
from perflow_diffusers.families.stable_diffusion import SDXL
from perflow_diffusers.io.documents import parsed
from perflow_diffusers.io.writer import File, Spec, check_file_name, check_target, write_together
from perflow_diffusers.weights.read import keys, lora_names
from perflow_diffusers.weights.read.header_facts import KOHYA_CONFIG, KOHYA_SPELLING, network_facts, without_hashes
from perflow_diffusers.weights.read.locate import RESIDUAL_SUFFIX
from perflow_diffusers.weights.read.lora import RESIDUAL_KEY, open_residual
from perflow_diffusers.weights.read.lora_layers import (
    ADAPTER_METADATA,
    LoraLayer,
    adapter_metadata,
    lora_layers,
    warn_of_bundled,
)
from perflow_diffusers.weights.read.original_names import Blocks, blocks_of_layers, blocks_of_model, uniform
from perflow_diffusers.weights.read.source import WeightSource, check_detached, open_weights
from perflow_diffusers.words.arguments import path_of

Layout = Literal["diffusers", "kohya"]


def convert_lora(
    source: Any, out: str | os.PathLike, layout: Layout, *, unet: Any = None, overwrite: bool = False
) -> Path:
    """Write a LoRA in the layout of diffusers or of kohya (which ComfyUI and the web UIs read), tensor by tensor.

    `source` is anything that `open_weights` takes; its layout may be any that `lora_layers` knows. Every tensor keeps
    its bits and dtype, text encoder layers, `conv_in`, `conv_out` and the time embedding included. In the kohya layout
    alpha is a tensor per layer; in that of diffusers it stands in the header as `lora_adapter_metadata`, and what
    kohya's spelling had (dtype of alpha, prefixes) is noted in the header too: converting there and back gives the
    same tensors under the same names. The header is carried along, without what it says of the old file's bytes, and a
    residual (see `as_delta`) is copied beside `out`. Textual inversions in the file (`bundle_emb`) are left out, with
    a warning.

    SDXL UNet layers get the original-format names that kohya gives them. Their numbers count the layers of all blocks
    before them: of `unet` (anything that `open_weights` takes, of which only names are read), or else of the blocks
    that the LoRA's own layers show. Where these do not tell, names are written that need no count,
    `lora_unet_down_blocks_...`, and read with a warning.

    Raises `WeightSourceError` for what is no LoRA, or one of another family of models, for tensors of unknown name
    (the error names them), for kinds of layers that the layout cannot hold; `WeightWriteError` for an `out` that
    cannot be written. An old file there is then intact.
    """
    target = path_of(out, "out", 'convert_lora(lora, "converted.safetensors", "kohya")')
    given, tensors, header = _converted(source, layout, unet)
    warn_of_bundled(given)
    check_file_name(target)
    check_target(target, given.nbytes, overwrite=overwrite)
    residual = _residual_file(given, target, header)
    specs: dict[str, Spec] = {name: spec for name, (spec, _) in tensors.items()}

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, (_, read) in tensors.items():
            yield name, read()

    files = [*residual, File(target, specs, stream(), header)]
    former = () if RESIDUAL_KEY in header else (target.with_suffix(RESIDUAL_SUFFIX),)
    write_together(files, overwrite=overwrite, former=former)
    return target


def check_convert(source: Any, layout: Layout, *, unet: Any = None) -> str:
    """One sentence on what `convert_lora(source, out, layout, unet=unet)` would write. Raises what it would raise."""
    given, tensors, _ = _converted(source, layout, unet)
    warn_of_bundled(given)
    open_residual(given)
    return f"{given.name} in the layout of {layout}: {len(tensors)} tensors, {given.nbytes / 1e6:.2f} MB"


def _converted(source: Any, layout: Layout, unet: Any) -> tuple[WeightSource, "_Tensors", dict[str, str]]:
    """The source, and the tensors and the header to write."""
    if layout not in get_args(Layout):
        raise WeightSourceError(f"layout={layout!r} is unknown. Pass one of {', '.join(get_args(Layout))}.")
    given = open_weights(source)
    check_detached(given)
    if given.kind != "lora":
        raise WeightSourceError(
            f"{given.name} is not a LoRA, so there is no layout to convert. Make one of a delta with `extract_lora`."
        )
    weights = () if unet is None else _names(unet)
    layers = lora_layers(given, weights)
    naming = _Naming.of(given, layers, weights)
    header = {"format": "pt", **without_hashes(given.metadata)}
    write = _to_kohya if layout == "kohya" else _to_diffusers
    return given, write(given, layers, naming, header), header


def _names(unet: Any) -> tuple[str, ...]:
    """Canonical names of a model's weights; whatever adapters are attached to a live one."""
    state = unet.state_dict() if isinstance(unet, torch.nn.Module) else unet
    return tuple(keys.canonical_map(state if isinstance(state, Mapping) else open_weights(state))[0])


#: What a tensor will be, and a function that reads it.
_Tensors = dict[str, tuple[Spec, Callable[[], torch.Tensor]]]


def _take(source: WeightSource, key: str) -> tuple[Spec, Callable[[], torch.Tensor]]:
    return (source.shapes[key], source.dtypes[key]), lambda: source[key]


def _to_diffusers(
    source: WeightSource, layers: tuple[LoraLayer, ...], naming: "_Naming", header: dict[str, str]
) -> _Tensors:
    """`unet.<module>.lora_A.weight`, and the config in the header."""
    tucker = [layer.module for layer in layers if layer.mid is not None]
    if tucker:
        raise WeightSourceError(
            f"{len(tucker)} layers of {source.name} have a middle factor (LoCon's Tucker form), e.g. {tucker[0]}, "
            "which the layout of diffusers cannot hold. `merge_delta` takes the file as it is."
        )
    tensors: _Tensors = {}
    for layer in layers:
        name = lora_names.spelled(layer.component, layer.module)
        tensors[f"{name}.lora_A.weight"] = _take(source, layer.down)
        tensors[f"{name}.lora_B.weight"] = _take(source, layer.up)
    if any(layer.prefix for layer in layers):
        header[KOHYA_SPELLING] = json.dumps(_spelling(source, layers, naming))
    kept = header.pop(KOHYA_CONFIG, None)
    if kept is not None:
        header.setdefault(ADAPTER_METADATA, kept)
    if not _says_the_same(source, layers, header):
        config: dict[str, Any] = {}
        for component in lora_names.KOHYA_PREFIXES:
            own = {layer.module: (layer.rank, layer.alpha) for layer in layers if layer.component == component}
            config |= adapter_metadata(own, component) if own else {}
        header[ADAPTER_METADATA] = json.dumps(config, indent=2, sort_keys=True)
    return tensors


def _says_the_same(source: WeightSource, layers: tuple[LoraLayer, ...], header: Mapping[str, str]) -> bool:
    """Whether the config in the header, alone, gives every layer its alpha, as for a file converted before.

    Names of text encoders' layers in it must fit whether or not the model says `text_model.`: PEFT takes the end of a
    name, so they fit without it, and without the ^ of a beginning.
    """
    text = header.get(ADAPTER_METADATA, "")
    if not any(f'"{component}.lora_alpha"' in text for component in lora_names.KOHYA_PREFIXES):
        return False
    if any(
        name.startswith("text_encoder") and re.search(r"text_model|\^", str(value)) for name, value in _items(text)
    ):
        return False
    keys_of: dict[str, str] = {}
    for layer in layers:
        name = lora_names.spelled(layer.component, layer.module)
        keys_of |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
    bare = WeightSource(
        source.name,
        {name: source.shapes[key] for name, key in keys_of.items()},
        {name: source.dtypes[key] for name, key in keys_of.items()},
        source.read,
        header,
    )
    return all(old.alpha == new.alpha for old, new in zip(layers, lora_layers(bare), strict=True))


def _items(text: str) -> Iterable[tuple[str, Any]]:
    """The fields of a config as it stands in a header; none if it is damaged, which `lora_layers` says."""
    try:
        config = parsed(text)
    except ValueError:
        return ()
    return config.items() if isinstance(config, dict) else ()


def _spelling(source: WeightSource, layers: tuple[LoraLayer, ...], naming: "_Naming") -> dict[str, Any]:
    """Prefixes, original-format names, dtype and shape of alpha (None: no alpha): the commonest, and exceptions."""
    alphas = {layer: _alpha_kind(source, layer) for layer in layers}
    common = Counter(json.dumps(kind) for kind in alphas.values()).most_common(1)[0][0]
    usual = replace(naming, names={})
    return {
        "prefixes": naming.prefixes,
        "original": naming.original,
        "names": {
            place: name
            for layer in layers
            if (place := _place(layer)) in naming.names and (name := naming.names[place]) != _kohya_name(layer, usual)
        },
        "alpha": json.loads(common),
        "alphas": {_place(layer): kind for layer, kind in alphas.items() if json.dumps(kind) != common},
    }


def _place(layer: LoraLayer) -> str:
    return f"{layer.component}.{layer.module}"


def _alpha_kind(source: WeightSource, layer: LoraLayer) -> list[Any] | None:
    if layer.alpha_key is None:
        return None
    return [str(source.dtypes[layer.alpha_key]).removeprefix("torch."), list(source.shapes[layer.alpha_key])]


def _to_kohya(
    source: WeightSource, layers: tuple[LoraLayer, ...], naming: "_Naming", header: dict[str, str]
) -> _Tensors:
    """`lora_unet_<module with underscores>.lora_down.weight`, `.lora_up.weight` and `.alpha`."""
    kohya = any(layer.prefix for layer in layers)
    spelling = _spelling(source, layers, naming) if kohya else _noted_spelling(source)
    tensors: _Tensors = {}
    for layer in layers:
        name = _kohya_name(layer, naming)
        if name is None or f"{name}.lora_down.weight" in tensors:
            raise WeightSourceError(
                f"{_place(layer)} of {source.name} has no name in the kohya layout that could be read back. Known are "
                "the layers of UNets of SD 1.x, 2.x, SDXL, and of CLIP text encoders."
            )
        tensors[f"{name}.lora_down.weight"] = _take(source, layer.down)
        tensors[f"{name}.lora_up.weight"] = _take(source, layer.up)
        if layer.mid is not None:
            tensors[f"{name}.lora_mid.weight"] = _take(source, layer.mid)
        alpha = _alpha_tensor(source, layer, spelling)
        if alpha is not None:
            tensors[f"{name}.alpha"] = (tuple(alpha.shape), alpha.dtype), partial(torch.clone, alpha)
    header.pop(KOHYA_SPELLING, None)
    if ADAPTER_METADATA in header:
        header[KOHYA_CONFIG] = header.pop(ADAPTER_METADATA)
    header.setdefault("ss_network_module", "networks.lora")
    ranks, alphas = (Counter(getattr(layer, what) for layer in layers) for what in ("rank", "alpha"))
    header.update(network_facts(header, ranks, alphas))
    return tensors


@dataclass(frozen=True)
class _Naming:
    """How kohya calls the layers of a LoRA.

    `prefixes` by component; `original` whether UNet layers are called as in original-format checkpoints, whose numbers
    count `blocks`; `names` are those that are known from the source, by component and module.
    """

    prefixes: Mapping[str, str]
    original: bool
    blocks: Blocks
    names: Mapping[str, str]

    @classmethod
    def of(cls, source: WeightSource, layers: tuple[LoraLayer, ...], weights: tuple[str, ...]) -> "_Naming":
        """As the source has it, as its header notes it, or as is usual for the family. `weights` are the model's."""
        unet = [layer.module for layer in layers if layer.component == "unet"]
        blocks = blocks_of_model(weights) if weights else blocks_of_layers(unet)
        given = {_place(layer): layer for layer in layers if layer.prefix}
        noted = _noted_spelling(source)
        sdxl = _is_sdxl(source, layers)
        prefixes = {
            component: usual[-1] if sdxl else usual[0] for component, usual in lora_names.KOHYA_PREFIXES.items()
        }
        if given:
            prefixes |= {layer.component: layer.prefix for layer in given.values()}
            original = any(layer.original and "_block" in layer.module for layer in given.values())
            names = {place: layer.down.rpartition(".lora_")[0] for place, layer in given.items()}
            return cls(prefixes, original, blocks or Blocks(), names)
        prefixes |= {key: value for key, value in noted.get("prefixes", {}).items() if key in prefixes}
        original = bool(noted.get("original", sdxl and blocks is not None))
        return cls(prefixes, original, blocks or Blocks(), noted.get("names", {}))


def _kohya_name(layer: LoraLayer, naming: _Naming) -> str | None:
    """Name of a layer with underscores; None if it could not be read back."""
    name = naming.names.get(_place(layer)) or _usual_name(layer, naming)
    if name is None:
        return None
    read = (lora_names.parse(f"{name}.alpha", blocks=blocks) for blocks in (naming.blocks, *map(uniform, (2, 1, 3))))
    return name if any(found and found.place == (layer.component, layer.module) for found in read) else None


def _usual_name(layer: LoraLayer, naming: _Naming) -> str | None:
    if layer.component != "unet":
        module: str | None = lora_names.spelled(layer.component, layer.module).partition(".")[2]
    elif naming.original or layer.module.startswith("add_embedding."):  # no reader knows it by diffusers' name
        module = lora_names.to_original(layer.module, naming.blocks)
    else:
        module = layer.module
    return None if module is None else naming.prefixes[layer.component] + module.replace(".", "_")


def _noted_spelling(source: WeightSource) -> dict[str, Any]:
    try:
        noted = parsed(source.metadata.get(KOHYA_SPELLING, "{}"))
        return noted if isinstance(noted, dict) else {}
    except ValueError:
        return {}


def _alpha_tensor(source: WeightSource, layer: LoraLayer, spelling: Mapping[str, Any]) -> torch.Tensor | None:
    """alpha as it was, as it was noted, or in the first of the factors' dtype, fp32 and fp64 that holds its value."""
    if layer.alpha_key is not None:
        return source[layer.alpha_key]
    if "alpha" in spelling:
        kind = spelling.get("alphas", {}).get(_place(layer), spelling["alpha"])
        if kind is None:
            return None
        return torch.full(tuple(kind[1]), layer.alpha, dtype=getattr(torch, kind[0]))
    for dtype in (source.dtypes[layer.down], torch.float32):
        if dtype.itemsize > 1 and torch.tensor(layer.alpha, dtype=dtype).item() == layer.alpha:
            return torch.tensor(layer.alpha, dtype=dtype)
    return torch.tensor(layer.alpha, dtype=torch.float64)


def _is_sdxl(source: WeightSource, layers: tuple[LoraLayer, ...]) -> bool:
    """Judged by the width of the text embedding, the second text encoder, and modules that only SDXL has."""
    return any(
        layer.component == "text_encoder_2"
        or layer.module.startswith("add_embedding.")
        or (layer.module.endswith(("attn2.to_k", "attn2.to_v")) and source.shapes[layer.down][1] == SDXL.text_width)
        or (layer.component == "unet" and ".transformer_blocks.1." in layer.module)
        for layer in layers
    )


def _residual_file(source: WeightSource, target: Path, header: dict[str, str]) -> list[File]:
    """The residual under the name that goes with `target`, if the LoRA has one that is not there already."""
    residual = open_residual(source)
    if not residual:
        return []
    path = target.with_name(target.name.removesuffix(".safetensors") + RESIDUAL_SUFFIX)
    header[RESIDUAL_KEY] = path.name
    if residual.files == (path,):
        return []
    specs = {name: (shape, residual.dtypes[name]) for name, shape in residual.shapes.items()}
    return [File(path, specs, ((name, residual[name]) for name in residual), residual.metadata)]
