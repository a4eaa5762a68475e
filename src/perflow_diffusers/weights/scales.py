"""How strong a delta is, as one number or one for each block of a UNet: `strength_of(scale, names) -> Strength`."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from perflow_diffusers.errors import MergeError
from perflow_diffusers.families import NETWORKS
from perflow_diffusers.words.arguments import is_number
from perflow_diffusers.words.notices import warn_user
from perflow_diffusers.words.shown import shown

#: One number, or numbers by block: see `strength_of`.
Scale = float | Mapping[str, Any]

_SIDES = {side: blocks for network in NETWORKS for side, blocks in network.sides.items()}
_MIDDLES = [network.middle for network in NETWORKS if network.middle]
_FAR = 3.0
_KOHYA = re.compile(r"(IN|M|OUT)\d\d")


@shown
@dataclass(frozen=True)
class Strength:
    """`given` is the scale as it was passed; `of(name)` the number that a weight's delta is multiplied by."""

    given: Scale
    parts: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str) -> float:
        """The number for a canonical name: that of the longest beginning of it that is named, else 1."""
        if isinstance(self.given, float):  # asked for every weight at every run; Mapping's own test is slow
            return self.given
        while name:
            if name in self.parts:
                return self.parts[name]
            name = name.rpartition(".")[0]
        return 1.0

    def __str__(self) -> str:
        if not isinstance(self.given, Mapping):
            return f"{self.given:g}"
        return json.dumps(dict(self.given))


def strength_of(scale: Any, names: Iterable[str]) -> Strength:
    """A scale made out for a model whose weights have these canonical names.

    `scale` is a number, or a mapping of blocks to numbers in the field's ways of naming them: "down", "mid" and "up",
    each a number, or for the sides, as in diffusers' `set_adapters`, a mapping such as `{"block_0": 0.5, "block_1":
    [0.4, 0.8]}` with a number a block or a list with one a layer (its last one is that of the sampler behind); "IN00"
    ... "M00" ... "OUT11" as the web UIs count blocks; or any beginning of a weight's name, such as
    "up_blocks.1.attentions" or "conv_in". What is named more closely wins; what is not named keeps 1.

    Raises `MergeError` for a name that the model has not, with the choices, and for what is not a finite number.
    Warns of a number below -3 or above 3. A `Strength` is returned as it is.
    """
    if isinstance(scale, Strength):
        return scale
    if not isinstance(scale, Mapping):
        number = _number(scale, "scale")
        _warn_if_far(scale, number)
        return Strength(number)
    tree = _Tree(names)
    if not tree.prefixes:
        raise MergeError(f"scale={scale!r:.60} is by block. Here it is one number, for all blocks of a source.")
    parts: dict[str, float] = {}
    for key, value in scale.items():
        for name, number in tree.expand(key, value):
            if parts.setdefault(name, number) != number:
                raise MergeError(
                    f"scale names {name} twice, as {parts[name]:g} and as {number:g} ({key!r}). Keep one."
                )
    _warn_if_far(dict(scale), *parts.values())
    return Strength(dict(scale), parts)


def _warn_if_far(scale: Any, *numbers: float) -> None:
    """No refusal: as in diffusers any number goes, negative ones too, and experiments are none of our business.

    But beyond 3 there is noise: on the miniature, four steps have a pixel error of 0.025 at 1, 0.09 at 1.5, 0.10 at 0,
    0.33 at 2, and 0.63 at 3 as at 100. Such a number is a slip (a percentage, an alpha, a guidance).
    """
    far = [number for number in numbers if abs(number) > _FAR]
    if far:
        warn_user(
            f"scale={scale!r:.80} is far from what makes pictures: 1 is the whole delta, 0 none of it, and {far[0]:g} "
            f"is {abs(far[0]):g} times {'its opposite' if far[0] < 0 else 'as much'}. If it was meant in per cent, "
            "divide it by 100."
        )


def parse_scale(text: str) -> Scale:
    """A scale as people type it: `0.8`, `down=0.8,mid=1,up_blocks.1=0.5`, or the JSON of a mapping.

    Raises `MergeError` for anything else.
    """
    try:
        content = json.loads(text) if text.lstrip().startswith("{") else None
        if isinstance(content, dict):
            return content
        if "=" not in text:
            return float(text)
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        return {name.strip(): float(number) for name, _, number in pairs}
    except ValueError as error:
        raise MergeError(
            f"scale {text!r} cannot be read ({error}). Pass a number, blocks as in 'down=0.8,mid=1', or JSON."
        ) from error


class _Tree:
    """The blocks that a model has, by what its weights are called."""

    def __init__(self, names: Iterable[str]) -> None:
        self.prefixes: set[str] = set()
        for name in names:
            parts = name.split(".")
            self.prefixes.update(".".join(parts[: end + 1]) for end in range(len(parts)))

    def expand(self, key: Any, value: Any) -> list[tuple[str, float]]:
        """(beginning of names, number) of one entry."""
        if key in _SIDES and _SIDES[key] in self.prefixes:
            return self._side(_SIDES[key], key, value)
        middle = next((name for name in _MIDDLES if name in self.prefixes), None)
        if key == "mid" and middle is not None:
            only = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
            return [(middle, _number(only, key))]
        if isinstance(key, str) and _KOHYA.fullmatch(key) and key in (counted := self.counted()):
            return [(name, _number(value, key)) for name in counted[key]]
        if key in self.prefixes:
            return [(key, _number(value, key))]
        raise MergeError(f"scale names {key!r}, which this model has not. {self._choices()}")

    def _side(self, side: str, key: str, value: Any) -> list[tuple[str, float]]:
        if not isinstance(value, Mapping):
            return [(side, _number(value, key))]
        found = []
        for block, number in value.items():
            name = f"{side}.{str(block).removeprefix('block_')}"
            if name not in self.prefixes:
                known = ", ".join(f"block_{number}" for number in range(self._count(side)))
                raise MergeError(f"scale['{key}'] names {block!r}, which this model has not. It has {known}.")
            found += (
                self._layers(name, number) if isinstance(number, list | tuple) else [(name, _number(number, name))]
            )
        return found

    def _layers(self, block: str, numbers: Any) -> list[tuple[str, float]]:
        """One number a layer of a block; a single one is for all."""
        layers = self.layers(block)
        if len(numbers) == 1:
            return [(block, _number(numbers[0], block))]
        if len(numbers) != len(layers):
            raise MergeError(f"scale gives {len(numbers)} numbers for {block}, which has {len(layers)} layers.")
        pairs = zip(layers, numbers, strict=True)
        return [(block, _number(numbers[-1], block))] + [
            (name, _number(number, block)) for names, number in pairs for name in names
        ]

    def layers(self, block: str) -> list[list[str]]:
        """The modules of each layer of a block: a ResNet, and attention where it has one."""
        return [
            [name for name in (f"{block}.{kind}.{place}" for kind in _LAYERS) if name in self.prefixes]
            for place in range(self._count(f"{block}.resnets"))
        ]

    def counted(self) -> dict[str, list[str]]:
        """`{"IN00": ["conv_in"], "IN01": [...], ...}`: the blocks of the original code, as the web UIs count them."""
        inputs, outputs = [["conv_in"]], []
        for place in range(self._count("down_blocks")):
            block = f"down_blocks.{place}"
            inputs += self.layers(block)
            inputs += [[f"{block}.downsamplers"]] if f"{block}.downsamplers" in self.prefixes else []
        for place in range(self._count("up_blocks")):
            block = f"up_blocks.{place}"
            layers = self.layers(block)
            if layers and f"{block}.upsamplers" in self.prefixes:
                layers[-1].append(f"{block}.upsamplers")
            outputs += layers
        found = {f"IN{number:02}": names for number, names in enumerate(inputs)}
        found |= {"M00": ["mid_block"]} if "mid_block" in self.prefixes else {}
        return found | {f"OUT{number:02}": names for number, names in enumerate(outputs)}

    def _count(self, parent: str) -> int:
        number = 0
        while f"{parent}.{number}" in self.prefixes:
            number += 1
        return number

    def _choices(self) -> str:
        tops = sorted({name.split(".")[0] for name in self.prefixes})
        counted = list(self.counted())
        return (
            f"Pass down, mid, up; {counted[0]} to {counted[-1]}; or the beginning of weights' names: "
            f"{', '.join(tops)}, or closer, as in 'up_blocks.1' or 'up_blocks.1.attentions.0'."
        )


_LAYERS = ("resnets", "attentions", "motion_modules")


def _quoted(value: Any) -> str:
    return ", but text" if isinstance(value, str) else ""


def _number(value: Any, what: str) -> float:
    """A strength as a float; raises `MergeError` if it is not a finite number."""
    number = float(value) if is_number(value) else math.nan
    if not math.isfinite(number):
        name = "scale" if what == "scale" else f"scale of {what}"
        raise MergeError(
            f"{name}={value!r} is not a finite number{_quoted(value)}. "
            "Pass 1.0 for the full delta, 0.5 for half of it."
        )
    return number
