"""The layers of a LoRA in any layout, with their rank and alpha, and the config that diffusers stores for them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from perflow_diffusers.errors import WeightSourceError
from perflow_diffusers.families import ANY_COMPONENTS
from perflow_diffusers.weights.read import keys, lora_names
from perflow_diffusers.weights.read.adapter_config import ADAPTER_METADATA, AdapterConfig, adapter_configs
from perflow_diffusers.weights.read.original_names import Blocks, blocks_of_model, blocks_of_originals
from perflow_diffusers.weights.read.source import WeightSource, check_detached
from perflow_diffusers.words.notices import warn_user

__all__ = [
    "ADAPTER_METADATA",
    "LoraLayer",
    "adapter_metadata",
    "file_blocks",
    "is_bundled",
    "lora_layers",
    "warn_of_bundled",
]


@dataclass(frozen=True)
class LoraLayer:
    """One layer of a LoRA: what it changes, and the keys of its factors in the source.

    `module` is the dotted name within `component` ("unet", "text_encoder", "text_encoder_2"), of a text encoder as
    transformers' CLIPTextModel calls it (`encoder.layers...`, without `text_model.`); `rank` the inner size of the
    factors, `alpha` such that the change of the weight is up @ down * alpha / rank. `mid` is the middle factor of a
    Tucker decomposition (LoCon), `alpha_key` the tensor that alpha was read from. `prefix` and `original` say how
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

    Raises `WeightSourceError` for unknown, doubled or incomplete factors, for DoRA, LoHa, LoKr and the like (see
    `lora_kin`), and for a config that `adapter_configs` refuses.
    """
    check_detached(source)
    configs = adapter_configs(source, lora_names.KOHYA_PREFIXES)
    parsed = named_tensors(source, weights)
    _refuse_kin(source, parsed)
    places: dict[tuple[str, str], dict[str, tuple[str, lora_names.LoraName]]] = {}
    for key, name in parsed.items():
        parts = places.setdefault(name.place, {})
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


def _blocks(source: WeightSource, weights: list[str]) -> Blocks:
    """The model's, if there is one and the names can be its; those of another model are told later, by module."""
    if weights:
        blocks = blocks_of_model(weights)
        named = {found[0] for key in source if (found := lora_names.original_module(key)) is not None}
        if all(lora_names.from_original(module, blocks) for module in named):
            return blocks
    return file_blocks(source)


def file_blocks(source: WeightSource) -> Blocks:
    """The blocks that original-format names of a LoRA count, by names and shapes; warns if these leave a doubt."""
    widths: dict[str, int] = {}
    for key, shape in source.shapes.items():
        found = lora_names.original_module(key)
        if found is not None and found[1] in ("up", "diff", "alpha"):
            widths.setdefault(found[0], 0)
            if found[1] != "alpha":
                widths[found[0]] = shape[0]
    blocks, sure = blocks_of_originals(widths)
    if not sure:
        warn_user(
            f"{source.name} has too few layers to tell how many each block of its model has; {blocks.down[0]} are "
            "assumed, as in most. Merge it into the model, or name the model (`unet=`), if it is another."
        )
    return blocks


def is_bundled(key: str) -> bool:
    """Whether a tensor belongs to a textual inversion that is bundled with a LoRA, not to a layer."""
    return key.startswith(lora_names.BUNDLED)


def warn_of_bundled(source: WeightSource) -> None:
    """Say that the textual inversions in a LoRA file are left out, if there are any."""
    words = sorted({key.split(".")[1] for key in source if is_bundled(key)})
    if words:
        warn_user(
            f"{source.name} holds {len(words)} textual inversions beside the LoRA ({keys.grouped(words)}), which are "
            "no weights of a layer and are left out. Load them with `pipe.load_textual_inversion(...)`."
        )


def adapter_metadata(modules: Mapping[str, tuple[int, float]], component: str = "unet") -> dict[str, Any]:
    """The config that diffusers stores for LoRA layers: `{"unet.r": ..., "unet.lora_alpha": ..., ...}`.

    `modules` maps a module name to (rank, alpha). The commonest values are the config's, the others its patterns. PEFT
    takes these for regular expressions for the end of a name; the network's begin with ^ as diffusers writes them.
    Text encoders' layers may have `text_model.` before their names, or not, in the model that loads them.
    """
    ranks = Counter(rank for rank, _ in modules.values())
    alphas = Counter(alpha for _, alpha in modules.values())
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    start = "^" if component in ANY_COMPONENTS else ""
    config = {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {f"{start}{name}": own for name, (own, _) in modules.items() if own != rank},
        "alpha_pattern": {f"{start}{name}": _plain(own) for name, (_, own) in modules.items() if own != alpha},
        "target_modules": sorted(modules),
    }
    return {f"{component}.{key}": value for key, value in config.items()}


def _plain(alpha: float) -> float:
    """8 rather than 8.0, as people and most tools write alpha."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _refuse_unknown(source: WeightSource, unknown: list[str]) -> None:
    """Refuse tensors whose names are none of a LoRA for these models, and say whose they are."""
    if not unknown:
        return
    known = "Known are the layouts of diffusers, PEFT, kohya and ComfyUI for UNets of SD 1.x, 2.x, SDXL, and for CLIP."
    if other := lora_names.other_model(unknown):
        what, found = other
        way_out = (
            "Put `text_encoder.` or `text_encoder_2.` before its names."
            if what == lora_names.UNNAMED_TEXT
            else "Use it with the pipeline or the tool that it was made for."
        )
        raise WeightSourceError(
            f"{source.name} is a LoRA for {what}: {len(found)} tensors, {keys.grouped(found[:1])}. {known} {way_out}"
        )
    raise WeightSourceError(
        f"{len(unknown)} tensors of {source.name} are called like nothing in a LoRA of a UNet: "
        f"{keys.grouped(unknown)}. {known}"
    )


def named_tensors(source: WeightSource, weights: Iterable[str] = ()) -> dict[str, lora_names.LoraName]:
    """What every tensor of a LoRA file is; `weights` are the canonical names of the model at hand.

    Raises `WeightSourceError` for names of no known layout, and for kinds of tensors that cannot be computed.
    """
    for what, pattern in lora_names.UNSUPPORTED.items():
        names = [name for name in source if pattern.search(name)]
        if names:
            raise WeightSourceError(
                f"{source.name} holds {len(names)} {what} tensors ({keys.grouped(names[:1])}), which are no changes "
                "that could be added here. Fuse it into its base model with the tool that made it, and pass "
                "`compute_delta(base, fused)`."
            )
    weights = list(weights)
    modules = lora_names.flat_names(weights)
    blocks = _blocks(source, weights)
    parsed = {key: lora_names.parse(key, modules, blocks) for key in source if not is_bundled(key)}
    _refuse_unknown(source, [key for key, name in parsed.items() if name is None])
    return {key: name for key, name in parsed.items() if name is not None}


def _refuse_kin(source: WeightSource, parsed: Mapping[str, lora_names.LoraName]) -> None:
    """Refuse LoHa, LoKr, DoRA, ... where low-rank pairs are wanted."""
    kin = {key: lora_names.KIN_ROLES[name.role] for key, name in parsed.items() if name.role in lora_names.KIN_ROLES}
    for what, count in Counter(kin.values()).most_common():
        first = next(key for key in kin if kin[key] == what)
        raise WeightSourceError(
            f"{source.name} holds {count} {what} tensors ({first}), which are no low-rank pairs: only those can be "
            "converted and combined. `merge_delta` and `merge_files` compute them from the file as it is."
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
    alpha = config.alpha_of(name.module, rank) if alpha_key is None else number(source, alpha_key)
    return LoraLayer(*name.place, down, up, mid, alpha_key, rank, alpha, name.prefix, name.original)


def number(source: WeightSource, key: str) -> float:
    """The value of a tensor that holds one number; raises `WeightSourceError` if it holds more."""
    if source.shapes[key] not in ((), (1,)):
        raise WeightSourceError(f"{key} of {source.name} is not one number: {source.shapes[key]}.")
    return float(source[key].item())
