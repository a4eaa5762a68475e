"""What PEFT's adapter configs say of the tensors beside them; a field that would be misread is an error.

Every field of PEFT's configs for LoRA, LoHa and LoKr (0.21) is in one of three tables: read here, of no bearing on
what the tensors mean, or refused unless it is off. PEFT's source is the judge.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from perflow_diffusers.errors import WeightSourceError
from perflow_diffusers.families import ANY_COMPONENTS
from perflow_diffusers.io.documents import parsed
from perflow_diffusers.weights.read.source import WeightSource
from perflow_diffusers.words.shown import shown

#: Header key under which diffusers stores the LoRA configs of a pipeline's parts, as JSON.
ADAPTER_METADATA = "lora_adapter_metadata"

#: The kinds of adapters whose change can be computed, as PEFT names them.
COMPUTED = ("LORA", "LOHA", "LOKR")

#: Fields whose value is used: the kind, the strength, and what init did to the base weights.
READ = frozenset(
    {
        "alpha",
        "alpha_pattern",
        "init_lora_weights",
        "lora_alpha",
        "lora_bias",
        "peft_type",
        "r",
        "rank_pattern",
        "use_dora",
        "use_rslora",
    }
)

#: Fields that say how to train, load or find layers; the tensors mean the same whatever they are. Sub-configs of one
#: `init_lora_weights` or variant count only if that is chosen; `velora_config` changes the backward pass alone;
#: `fan_in_fan_out` matters for transformers' Conv1D, which no UNet has.
FREE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "decompose_both",
        "decompose_factor",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "module_dropout",
        "peft_version",
        "qalora_group_size",
        "rank_dropout",
        "rank_dropout_scale",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_effective_conv2d",
        "velora_config",
    }
)

#: Fields that must be off, and what they do when they are on.
REFUSED = {
    "bias": "trains biases and stores them whole, not as differences",
    "modules_to_save": "stores whole modules, not differences",
    "trainable_token_indices": "stores whole rows of an embedding",
    "target_parameters": "changes parameters that are no layer's weight",
    "layer_replication": "is for a model whose layers were repeated",
    "megatron_config": "is for Megatron's parallel layers",
    "alora_invocation_tokens": "is active for some tokens only, so it is no change of weights",
    "arrow_config": "chooses among several adapters by the input, so it is no change of weights",
    "use_qalora": "is for weights in groups of a quantiser",
    "monteclora_config": "adds sampled noise to the factors",
    "use_bdlora": "stores the blocks of block-diagonal factors",
    "kasa_config": "drops singular values of the base weights and has a factor between the two of a LoRA",
}

_NOT_MERGED = frozenset({"alora_invocation_tokens", "arrow_config", "use_qalora"})  # PEFT raises, by its source
# PEFT's `save_pretrained` turns these into plain LoRAs when it is asked to.
_CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")
_HARMLESS_INITS = (None, True, False, "true", "false", "gaussian", "eva", "orthogonal", "mica")
_FUSE = "merge it into its base with PEFT (`merge_and_unload()`) and pass `compute_delta(base, merged)`"
_WHOLE_NAME = re.compile(r"\^[\w.]+")

_Patterns = tuple[tuple[int | None, re.Pattern[str], float], ...]


@shown
@dataclass(frozen=True)
class AdapterConfig:
    """What the config of one part of a pipeline says of strengths; `kind` is PEFT's, "" if there is no config.

    `alpha` and `rank` are those of all layers that no pattern names, None if the config does not say; `rslora` whether
    alpha is divided by the root of the rank, `dora` whether every layer has a magnitude.
    """

    kind: str = ""
    alpha: float | None = None
    rank: int | None = None
    alphas: _Patterns = ()
    ranks: _Patterns = ()
    rslora: bool = False
    dora: bool = False

    def alpha_of(self, module: str, rank: int) -> float:
        """alpha such that the strength is alpha / rank, by PEFT's rules: the first pattern that fits wins."""
        alpha = _matching(self.alphas, module, self.alpha)
        if alpha is None:
            return float(rank)
        return float(alpha) * (rank**0.5 if self.rslora else 1.0)

    def rank_of(self, module: str) -> int | None:
        """The rank of a layer whose tensors do not tell it; None if the config does not either."""
        rank = _matching(self.ranks, module, self.rank)
        return None if rank is None else int(rank)


def adapter_configs(source: WeightSource, components: Iterable[str]) -> dict[str, AdapterConfig]:
    """The configs of a LoRA file by component, from its header, or in PEFT's own layout from the file beside it.

    Raises `WeightSourceError` for a config that cannot be read, and for one that makes the tensors something else than
    a change of the base's weights: a kind of adapter that is not in `COMPUTED`, an `init_lora_weights` that changed
    the base too, a field of `REFUSED` that is on, or a field that is unknown and not at its default.
    """
    try:
        given = _given_configs(source, tuple(components))
        return {component: _read(source, component, config) for component, config in given.items() if config}
    except WeightSourceError:
        raise
    except (ValueError, TypeError, AttributeError, OSError, re.error) as error:
        raise WeightSourceError(
            f"The LoRA config of {source.name} cannot be read ({error}). Download or write the file again."
        ) from error


def _given_configs(source: WeightSource, components: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Fields and values by component, as they are written."""
    beside = source.files[0].with_name("adapter_config.json") if source.files else None
    if text := source.metadata.get(ADAPTER_METADATA):
        given = parsed(text)
    elif beside and beside.is_file() and any(name.startswith("base_model.model.") for name in source):
        return {"unet": dict(parsed(beside.read_text(encoding="utf-8")).items())}
    else:
        return {}
    configs: dict[str, dict[str, Any]] = {component: {} for component in components}
    named = {name.partition(".")[0] for name in source} & set(ANY_COMPONENTS)
    for name, value in given.items():
        component, dot, key = name.partition(".")
        if not dot:  # `save_lora_adapter` writes the config of a lone UNet, without its name
            configs["unet"][name] = value
        elif component in configs:
            configs[component][key] = value
        elif component in named:  # a transformer's, whose tensors are in the file
            configs["unet"][key] = value
    return configs


def _read(source: WeightSource, component: str, config: Mapping[str, Any]) -> AdapterConfig:
    """The config of one component, if it means what the tensors alone would mean."""
    kind = str(config.get("peft_type") or "LORA").rpartition(".")[2].upper()
    if kind not in COMPUTED:
        raise WeightSourceError(
            f"{source.name} is an adapter of PEFT's kind {kind}, whose change of the weights is not computed here "
            f"(those of {', '.join(COMPUTED)} are). To use it, {_FUSE}."
        )
    _check_init(source, config.get("init_lora_weights"))
    for name, value in config.items():
        if name in READ or name in FREE or _is_off(value) or _is_default(kind, name, value):
            continue
        if name in REFUSED:
            what = f"has {name}={_shown(value)}, which {REFUSED[name]}"
        else:
            what = f"has {name}={_shown(value)}, a setting of PEFT that is not known here and may change its meaning"
        way_out = "Use it with PEFT, which cannot merge it either" if name in _NOT_MERGED else f"To use it, {_FUSE}"
        raise WeightSourceError(f"{source.name} ({component}) {what}. {way_out}.")
    alpha = config.get("lora_alpha", config.get("alpha"))
    rank = config.get("r")
    return AdapterConfig(
        kind,
        None if alpha is None else float(alpha),
        None if rank is None else int(rank),
        _compiled(config.get("alpha_pattern") or {}),
        _compiled(config.get("rank_pattern") or {}),
        bool(config.get("use_rslora")),
        bool(config.get("use_dora")),
    )


def _check_init(source: WeightSource, init: Any) -> None:
    """Refuse an initialisation after which the base is another one; what is known of it decides the way out."""
    name = init.lower() if isinstance(init, str) else init
    if name in _HARMLESS_INITS:
        return
    if isinstance(name, str) and name.startswith(_CONVERTIBLE):
        raise WeightSourceError(
            f"{source.name} was trained with init_lora_weights={init!r}, which took the first factors out of the base "
            "weights: added to the plain base it gives something else. Save it as a plain LoRA with PEFT, "
            "`model.save_pretrained(folder, path_initial_model_for_weight_conversion=...)` (the folder of the adapter "
            f"before training), or {_FUSE}."
        )
    raise WeightSourceError(
        f"{source.name} was trained with init_lora_weights={init!r}, which "
        + ("replaced the base weights by quantised ones" if name == "loftq" else "may have changed the base weights")
        + f": added to the plain base it may give something else. To use it, {_FUSE}."
    )


def _is_off(value: Any) -> bool:
    return value in (None, False, "none", "") or (isinstance(value, list | dict) and not value)


def _is_default(kind: str, name: str, value: Any) -> bool:
    """Whether a field that is not known here has the default of the PEFT that is installed, if that knows it."""
    if name in REFUSED:
        return False
    try:
        import peft  # takes seconds, and is optional: only for configs of a newer PEFT than this table
    except ImportError:
        return False
    configs = {"LORA": peft.LoraConfig, "LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig}
    return any(field.name == name and field.default == value for field in fields(configs[kind]))


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _matching(patterns: _Patterns, module: str, otherwise: float | None) -> float | None:
    for length, pattern, value in patterns:
        if length in (None, len(module)) and pattern.match(module):
            return value
    return otherwise


def _compiled(patterns: Mapping[str, Any]) -> _Patterns:
    """(length of the names it can match if it is a whole name, pattern as PEFT applies it, value), in order."""
    return tuple(
        (
            len(text) - 1 if _WHOLE_NAME.fullmatch(text) else None,
            re.compile(rf"(.*\.)?({text})$"),
            float(value),
        )
        for text, value in patterns.items()
    )
