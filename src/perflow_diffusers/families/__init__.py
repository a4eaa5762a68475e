"""Model families as data: what their networks are called and made of. A new family is a row of `FAMILIES`."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from perflow_diffusers.families.family import Family, Network, is_wider
from perflow_diffusers.families.stable_diffusion import REFINER, SD1, SD2, SDXL, T5

__all__ = [
    "ANY_COMPONENTS",
    "COMPONENTS",
    "FAMILIES",
    "FIRST_LAYERS",
    "NETWORKS",
    "TEXT_LAYERS",
    "TRANSFORMER_PREFIXES",
    "Family",
    "Network",
    "component_of",
    "family_in_words",
    "family_of",
    "is_wider",
    "network_in",
    "networks_of",
    "several",
    "sole_network",
]

#: All that are known; accelerators are published for the first three.
FAMILIES: tuple[Family, ...] = (SD1, SD2, SDXL, REFINER, T5)
#: Their networks, each once.
NETWORKS: tuple[Network, ...] = tuple(dict.fromkeys(family.network for family in FAMILIES))
#: What pipelines call these networks, and the folders that their weights are in.
COMPONENTS: tuple[str, ...] = tuple(network.component for network in NETWORKS)
#: And those of networks of any family: their weights are merged and compared by names and shapes alone.
ANY_COMPONENTS: tuple[str, ...] = (*COMPONENTS, "transformer", "transformer_2")
#: How names of LoRAs begin that are for a transformer: those of diffusers (for a second one, too) and of kohya.
TRANSFORMER_PREFIXES = ("transformer.", "lora_transformer_")

_BLOCK = re.compile(r"(?P<root>(\w*_)?(blocks|layers))\.\d+\.")

#: Their weights of the first layer, which have more inputs in inpainting and other models of a family.
FIRST_LAYERS = frozenset(network.first_layer for network in NETWORKS)
#: How the names of their weights end that read the text embedding: their columns are its width.
TEXT_LAYERS = tuple(network.text_layer for network in NETWORKS)


def network_in(pipe: Any) -> Any:
    """The network that a pipeline denoises with, whatever it is called; None for what has none of `NETWORKS`."""
    return next((part for name in COMPONENTS if (part := getattr(pipe, name, None)) is not None), None)


def networks_of(pipe: Any) -> dict[str, Any]:
    """The networks that a pipeline denoises with, of whatever family, by what it calls them."""
    return {name: part for name in ANY_COMPONENTS if (part := getattr(pipe, name, None)) is not None}


def sole_network(pipe: Any, error: type[Exception]) -> Any:
    """The network that a pipeline denoises with, of whatever family; None for what has none of `ANY_COMPONENTS`.

    Raises `error` for a pipeline that has several.
    """
    found = networks_of(pipe)
    if len(found) > 1:
        raise error(several(f"The {type(pipe).__name__}", found))
    return next(iter(found.values()), None)


def component_of(names: Iterable[str]) -> str:
    """What a pipeline calls the network whose weights have these canonical `names`, some or all of them.

    A `transformer` has numbered blocks that are none of a UNet's; everything else is taken for a UNet.
    """
    roots = {root for network in NETWORKS for root in network.roots}
    blocks = (_BLOCK.match(name) for name in names)
    other = any(block is not None and block["root"] not in roots for block in blocks)
    return "transformer" if other else COMPONENTS[0]


def several(pipe_or_folder: str, names: Any) -> str:
    """That there are several networks where one was asked for, in words; `names` are theirs."""
    listed = ", ".join(f"`{name}`" for name in names)
    return f"{pipe_or_folder} has several networks ({listed}), each with weights of its own. Pass one of them."


def family_of(shapes: Mapping[str, tuple[int, ...]]) -> Family | None:
    """The family of a model whose weights have these shapes, by canonical name; None if none is known."""
    return next((one for one in FAMILIES if one.network.text_width(shapes) == one.text_width), None)


def family_in_words(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The same for people, who also want to hear what an unknown one has."""
    found = family_of(shapes)
    if found is not None:
        return found.name
    widths = [width for network in NETWORKS if (width := network.text_width(shapes)) is not None]
    return f"a UNet with text embeddings of width {widths[0]}" if widths else "a model without cross attention"
