"""What is known of a model family, as data: `Network` (names and layers) and `Family` (sizes, noise, widths)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from perflow_diffusers.words.shown import shown


@shown
@dataclass(frozen=True, eq=False)
class Network:
    """How the networks of one class are called in pipelines and files, and what their modules are called.

    `component`: the attribute of a pipeline that holds one, and the folder of its weights. `class_name`: of diffusers.
    `signature`: the keys of its config that its accelerators share. `first_layer`: the weight whose number of input
    channels differs among models of a family (inpainting). `text_layer`: how the weight ends whose columns are the
    width of the text embedding. `roots`: what names of modules begin with; `words`: what they consist of, each kept
    whole where underscores stand for dots; `extensions`: patterns of modules that people add and no delta has to know.
    `kohya_prefixes`: how kohya's names of its LoRAs begin, the usual one first. `lora_targets`: the layers that a LoRA
    of everything has. `kernels`: kernel sizes of convolutions by the last part of their names. `sides`: what users
    call the numbered blocks (None: the block in the middle, which has no number).
    """

    component: str
    class_name: str
    signature: tuple[str, ...]
    first_layer: str
    text_layer: str
    roots: tuple[str, ...]
    words: tuple[str, ...]
    extensions: tuple[str, ...]
    kohya_prefixes: tuple[str, ...]
    lora_targets: tuple[str, ...]
    kernels: Mapping[str, int] = field(default_factory=dict)
    sides: Mapping[str, str] = field(default_factory=dict)
    middle: str = ""

    def text_width(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """Width of the text embedding of a model whose weights have these shapes; None if it takes none."""
        widths = (shape[1] for name, shape in shapes.items() if name.endswith(self.text_layer) and len(shape) == 2)
        return next(widths, None)


@shown
@dataclass(frozen=True, eq=False)
class Family:
    """Models that share a network: `name` in words, told by the `text_width` of their embeddings.

    `config`: of the network, what differs from its class's defaults ({} if original-format files are left to
    diffusers); `noise`: the noise schedule in the words of diffusers' schedulers.
    """

    name: str
    network: Network
    text_width: int
    config: Mapping[str, Any] = field(default_factory=dict)
    noise: Mapping[str, Any] = field(default_factory=dict)


def is_wider(have: tuple[int, ...], given: tuple[int, ...]) -> bool:
    """Whether two convolutions differ in nothing but more input channels of the first."""
    return len(have) == len(given) == 4 and have[1] > given[1] and (have[0], *have[2:]) == (given[0], *given[2:])
