"""UNet modules under their original-format names, whose numbers count the layers of all blocks before them.

In `input_blocks.i.k`, i counts ResNets and downsamplers behind conv_in (0); k is 0 for a ResNet, 1 for attention. In
`output_blocks.i.k`, i counts ResNets; an upsampler has the last i of its block, and the next k.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from perflow_diffusers.words.shown import shown

_TOP = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_RESNET = {
    "in_layers.0": "norm1",
    "out_layers.0": "norm2",
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_TOP_BACK = {new: old for old, new in _TOP.items()}
_RESNET_BACK = {new: old for old, new in _RESNET.items()}
_KINDS = ("resnets", "attentions")

_OLD = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)")
_OLD_MIDDLE = re.compile(r"middle_block\.(\d+)\.(.+)")
_NEW = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_NEW_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")

#: What a file of LoRA layers may be numbered by, the commonest first; no UNet of these families has more.
_LAYERS = (2, 1, 3)
#: Modules as wide as their block, by the rows of their weight.
_WIDE = re.compile(r"\.(proj_in|proj_out|attn[12]\.to_q|attn1\.to_[kv]|attn[12]\.to_out\.0|out_layers\.3)$")


@shown
@dataclass(frozen=True)
class Blocks:
    """ResNets by down and by up block (the last number holds for all further blocks), and up blocks without attention.

    The defaults are those of SDXL. The up blocks of a model have one ResNet more than its down blocks.
    """

    down: tuple[int, ...] = (2,)
    up: tuple[int, ...] = (3,)
    plain: frozenset[int] = frozenset()


SDXL = Blocks()


def uniform(layers: int, plain: Iterable[int] = ()) -> Blocks:
    """Blocks of a UNet whose config says `layers_per_block`."""
    return Blocks((layers,), (layers + 1,), frozenset(plain))


def blocks_of_model(modules: Iterable[str]) -> Blocks:
    """The blocks of a UNet, from the names of all its modules or weights; SDXL's if it has none."""
    found = _counted(modules)
    down, up = (
        tuple(found[side].get(block, {}).get("resnets", 0) for block in range(max(found[side], default=-1) + 1))
        for side in ("down", "up")
    )
    if not all(down) or not all(up) or not down:
        return SDXL
    return Blocks(down, up, frozenset(block for block in found["up"] if "attentions" not in found["up"][block]))


def blocks_of_layers(modules: Iterable[str]) -> Blocks | None:
    """The blocks of the UNet for which a LoRA with these layers was made; None if they do not tell.

    A LoRA need not have all layers of its model. Blocks that it shows in full agree, and those of a block of two or
    more are no mistake; what is left open does not matter if every layer gets the same name either way.
    """
    modules = list(modules)
    found = _counted(modules)
    down, up = (
        {block: most for block, kinds in found[side].items() if (most := max(kinds.get(kind, 0) for kind in _KINDS))}
        for side in ("down", "up")
    )
    counts = [*down.values(), *(count - 1 for count in up.values())]
    layers = max(counts, default=0)
    sure = layers > 1 or counts.count(1) > 1
    sampled, attended = (
        {block for block, kinds in found["up"].items() if kind in kinds} for kind in ("upsamplers", "attentions")
    )
    plain = frozenset(sampled - attended)
    blocks = uniform(layers if sure else 2, plain)
    listed = Blocks(_filled(down, blocks.down[0]), _filled(up, blocks.up[0]), plain)
    others = [listed, *(uniform(other, plain) for other in (() if sure else _LAYERS))]
    if sampled and not attended:
        others.append(Blocks(blocks.down, blocks.up))
    same = all(to_original(module, other) == to_original(module, blocks) for module in modules for other in others)
    return blocks if same else None


def blocks_of_originals(widths: Mapping[str, int]) -> tuple[Blocks, bool]:
    """The blocks by which original-format module names are numbered, and whether the names leave no doubt.

    `widths` are the rows of the modules' weights. A count fits if downsamplers and upsamplers stand at the ends of
    blocks, nothing else stands at a downsampler's place, and the layers of a block are all as wide. Of several counts
    that fit the commonest is taken; there is doubt if they lead to different modules.
    """
    fitting = [uniform(layers) for layers in _LAYERS if _fits(widths, uniform(layers))]
    if not fitting:
        return SDXL, True
    first = {module: from_original(module, fitting[0]) for module in widths}
    sure = all(from_original(module, other) == first[module] for module in widths for other in fitting[1:])
    return fitting[0], sure


def from_original(module: str, blocks: Blocks = SDXL) -> str | None:
    """diffusers' name of a UNet module that is spelled as in original-format checkpoints; None if there is none."""
    if module in _TOP:
        return _TOP[module]
    if match := _OLD_MIDDLE.fullmatch(module):
        kind, layer = _KINDS[int(match[1]) % 2], int(match[1]) // 2
        return f"mid_block.{kind}.{layer}.{_RESNET.get(match[2], match[2])}"
    match = _OLD.fullmatch(module)
    if match is None:
        return None
    index, place, rest = int(match[2]), int(match[3]), match[4]
    side = "down" if match[1] == "input_blocks" else "up"
    if side == "down" and index == 0:
        return None
    block, layer, size = _find(blocks, side, index)
    if rest == ("op" if side == "down" else "conv"):
        fits = (layer, place) == (size, 0) if side == "down" else layer == size - 1 and place in (1, 2)
        return f"{side}_blocks.{block}.{side}samplers.0.conv" if fits else None
    if place >= len(_KINDS) or layer >= size:
        return None
    return f"{side}_blocks.{block}.{_KINDS[place]}.{layer}.{_RESNET.get(rest, rest)}"


def to_original(module: str, blocks: Blocks = SDXL) -> str | None:
    """The inverse of `from_original`; None if there is no such name."""
    if module in _TOP_BACK:
        return _TOP_BACK[module]
    if match := _NEW_MIDDLE.fullmatch(module):
        return f"middle_block.{2 * int(match[2]) + _KINDS.index(match[1])}.{_RESNET_BACK.get(match[3], match[3])}"
    match = _NEW.fullmatch(module)
    if match is None:
        return None
    side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    start, size = _start(blocks, side, block), _size(blocks, side, block)
    if kind == "downsamplers":
        return f"input_blocks.{start + size}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{start + size - 1}.{1 if block in blocks.plain else 2}.conv"
    name = "input_blocks" if side == "down" else "output_blocks"
    return f"{name}.{start + layer}.{_KINDS.index(kind)}.{_RESNET_BACK.get(rest, rest)}"


def _size(blocks: Blocks, side: str, block: int) -> int:
    """ResNets of a block."""
    counts = blocks.down if side == "down" else blocks.up
    return counts[min(block, len(counts) - 1)]


def _start(blocks: Blocks, side: str, block: int) -> int:
    """Number of the first layer of a block; `input_blocks.0` is conv_in."""
    extra = 1 if side == "down" else 0
    return extra + sum(_size(blocks, side, before) + extra for before in range(block))


def _find(blocks: Blocks, side: str, index: int) -> tuple[int, int, int]:
    """The block to which a number belongs, the layer there (the block's size: its downsampler), and the size."""
    block = 0
    while index >= _start(blocks, side, block + 1):
        block += 1
    return block, index - _start(blocks, side, block), _size(blocks, side, block)


def _filled(seen: Mapping[int, int], rest: int) -> tuple[int, ...]:
    """The counts of blocks that were seen, `rest` for all others."""
    return (*(seen.get(block, rest) for block in range(max(seen, default=-1) + 1)), rest)


def _counted(modules: Iterable[str]) -> dict[str, dict[int, dict[str, int]]]:
    """By side, block and kind of layer: one more than the highest number that is named."""
    found: dict[str, dict[int, dict[str, int]]] = {"down": {}, "up": {}}
    for module in modules:
        if match := _NEW.fullmatch(module):
            kinds = found[match[1]].setdefault(int(match[2]), {})
            kinds[match[3]] = max(kinds.get(match[3], 0), int(match[4]) + 1)
    return found


def _fits(widths: Mapping[str, int], blocks: Blocks) -> bool:
    """Whether names and widths of original-format modules can be those of such blocks."""
    wide: dict[str, int] = {}
    for module, width in widths.items():
        name = from_original(module, blocks)
        if name is None and _OLD.fullmatch(module):
            return False
        if name is not None and _WIDE.search(module) and _NEW.fullmatch(name):
            block = ".".join(name.split(".")[:2])
            if wide.setdefault(block, width) != width:
                return False
    return True
