"""The layers of a LoRA in any layout, with their rank and alpha, and the config that diffusers stores for them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from perflow_diffusers.weights import keys, lora_names
from perflow_diffusers.weights.adapter_config import ADAPTER_METADATA, AdapterConfig, adapter_configs
from perflow_diffusers.weights.errors import WeightSourceError
from perflow_diffusers.weights.source import WeightSource, check_detached

__all__ = ["ADAPTER_METADATA", "LoraLayer", "adapter_metadata", "lora_layers"]


@dataclass(frozen=True)
class LoraLayer:
    """One layer of a LoRA: what it changes, and the keys of its factors in the source.

    `module` is the dotted name within `component` ("unet", "text_encoder", "text_encoder_2"); `rank` the inner size of
    the factors, `alpha` such that the change of the weight is up @ down * alpha / rank. `mid` is the middle factor of
    a Tucker decomposition (LoCon), `alpha_key` the tensor that alpha was read from. `prefix` and `original` say how
    kohya spells it: see `lora_names.LoraName`.
    """

    component: str
    module: str
    down: str
    up: str
    mid: str | None
    alpha_key: str | None
    rank: int
    alpha: float
    prefix: str
    original: bool

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def lora_layers(source: WeightSource, weights: Iterable[str] = ()) -> tuple[LoraLayer, ...]:
    """The layers of a LoRA in any layout, for the UNet and the text encoders, sorted by component and module.

    `weights` are the canonical names of the model at hand, if there is one. alpha comes from `.alpha` tensors, else
    from the adapter metadata in the header (or PEFT's `adapter_config.json` beside the file) with PEFT's rules for
    `rank_pattern`, `alpha_pattern` and `use_rslora`, else it is the rank.

    Raises `WeightSourceError` for unknown, doubled or incomplete factors, for DoRA, LoHa, LoKr and the like, and for a
    config that `adapter_configs` refuses.
    """
    check_detached(source)
    configs = adapter_configs(source, lora_names.KOHYA_PREFIXES)
    _refuse_unsupported(source)
    modules = lora_names.flat_names(weights)
    parsed = {key: lora_names.parse(key, modules) for key in source}
    unknown = [key for key, name in parsed.items() if name is None]
    if unknown:
        raise WeightSourceError(
            f"{len(unknown)} tensors of {source.name} are called like nothing in a LoRA of a UNet: "
            f"{keys.grouped(unknown)}. Known are the layouts of diffusers, PEFT and kohya for SD 1.x, 2.x and SDXL."
        )
    places: dict[tuple[str, str], dict[str, tuple[str, lora_names.LoraName]]] = {}
    for key, name in parsed.items():
        if name is None:
            continue
        parts = places.setdefault((name.component, name.module), {})
        if name.role in parts:
            raise WeightSourceError(
                f"{source.name} has more than one tensor for the same factor: {parts[name.role][0]} and {key}. Keep "
                "one adapter in a file."
            )
        parts[name.role] = (key, name)
    incomplete = [".".join(place) for place, parts in places.items() if not {"down", "up"} <= set(parts)]
    if incomplete:
        raise WeightSourceError(
            f"{len(incomplete)} layers of {source.name} lack one of their two factors: {keys.grouped(incomplete)}. "
            "Download the file again."
        )
    plain = AdapterConfig()
    return tuple(_layer(source, places[place], configs.get(place[0], plain)) for place in sorted(places))


def adapter_metadata(modules: Mapping[str, tuple[int, float]], component: str = "unet") -> dict[str, Any]:
    """The config that diffusers stores for LoRA layers: `{"unet.r": ..., "unet.lora_alpha": ..., ...}`.

    `modules` maps a module name to (rank, alpha). The commonest values are the config's, the others its patterns,
    which begin with ^ as diffusers writes them: PEFT takes them for regular expressions for the end of a name.
    """
    ranks = Counter(rank for rank, _ in modules.values())
    alphas = Counter(alpha for _, alpha in modules.values())
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    config = {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {f"^{name}": own for name, (own, _) in modules.items() if own != rank},
        "alpha_pattern": {f"^{name}": _plain(own) for name, (_, own) in modules.items() if own != alpha},
        "target_modules": sorted(modules),
    }
    return {f"{component}.{key}": value for key, value in config.items()}


def _plain(alpha: float) -> float:
    """8 rather than 8.0, as people and most tools write alpha."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _refuse_unsupported(source: WeightSource) -> None:
    for what, pattern in lora_names.UNSUPPORTED.items():
        names = [name for name in source if pattern.search(name)]
        if names:
            raise WeightSourceError(
                f"{source.name} holds {len(names)} {what} tensors ({keys.grouped(names[:1])}), which are no low-rank "
                "products that could be added here. Use it with `pipe.load_lora_weights(...)`, or fuse it into its "
                "base model with the tool that made it and pass `compute_delta(base, fused)`."
            )


def _layer(
    source: WeightSource, parts: Mapping[str, tuple[str, lora_names.LoraName]], config: AdapterConfig
) -> LoraLayer:
    """One layer, its shapes checked."""
    down, up = parts["down"][0], parts["up"][0]
    mid, alpha_key = (parts[role][0] if role in parts else None for role in ("mid", "alpha"))
    name = parts["down"][1]
    shapes = [source.shapes[key] for key in (down, up, mid) if key is not None]
    inner = [shapes[0][:1], shapes[1][1:2]] if mid is None else [shapes[0][:1], shapes[2][1:2]]
    fits = all(len(shape) in (2, 4) for shape in shapes) and inner[0] == inner[1] != (0,)
    fits = fits and all(size == 1 for size in shapes[1][2:])
    if mid is not None:
        fits = fits and shapes[1][1] == shapes[2][0] and all(size == 1 for size in shapes[0][2:])
    if not fits:
        shown = ", ".join(map(str, shapes))
        raise WeightSourceError(
            f"The factors of {name.component}.{name.module} in {source.name} do not belong together (shapes {shown}). "
            "Expected (rank, in, ...) and (out, rank), 1 x 1 behind it. Download the file again."
        )
    wrong = [key for key in (down, up, mid) if key is not None and not source.dtypes[key].is_floating_point]
    if wrong:
        raise WeightSourceError(
            f"{wrong[0]} of {source.name} is {source.dtypes[wrong[0]]}, not floating point. Store it in fp16 or fp32."
        )
    rank = shapes[0][0]
    if alpha_key is None:
        alpha = config.alpha_of(name.module, rank)
    elif source.shapes[alpha_key] in ((), (1,)):
        alpha = float(source[alpha_key].item())
    else:
        raise WeightSourceError(f"{alpha_key} of {source.name} is not one number: {source.shapes[alpha_key]}.")
    return LoraLayer(name.component, name.module, down, up, mid, alpha_key, rank, alpha, name.prefix, name.original)
