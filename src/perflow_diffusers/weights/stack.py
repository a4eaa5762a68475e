"""The merges a UNet carries and the one way to write them: w = round(base + sum_i s_i * delta_i), in fp32."""

import shutil
import signal
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from perflow_diffusers.weights import keys
from perflow_diffusers.weights.errors import MergeError
from perflow_diffusers.weights.plan import MergePlan
from perflow_diffusers.weights.source import open_weights
from perflow_diffusers.weights.writer import specs_of, write_safetensors

Backup = Literal["cpu", "disk", "none"]

_ATTRIBUTE = "_perflow_merges"
_CHUNK = 1 << 18  # elements per fp32 temporary on the CPU: stays in its cache
_CHUNK_DEVICE = 1 << 22
_SAMPLES = 64


@dataclass(frozen=True)
class Layer:
    """One merge: a plan and its scale. `number` tells it from others on the same UNet."""

    number: int
    plan: MergePlan
    scale: float


@dataclass(frozen=True)
class Saved:
    """Base bits of weights from before their first merge, by canonical name; `folder` lives as long as this does."""

    tensors: Mapping[str, torch.Tensor]
    nbytes: int
    folder: Path | None = None


@dataclass
class MergeStack:
    """What a UNet carries: layers that can be undone, base bits, samples of what was written, and permanent merges.

    Copies of the UNet share the base bits, which nobody changes. A pickled UNet forgets its merges but for their
    numbers and sources, `lost`.
    """

    layers: list[Layer] = field(default_factory=list)
    base: dict[str, torch.Tensor] = field(default_factory=dict)
    saved: list[Saved] = field(default_factory=list)
    marks: dict[str, torch.Tensor] = field(default_factory=dict)
    permanent: list[MergePlan] = field(default_factory=list)
    count: int = 0
    lost: dict[int, str] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict) -> "MergeStack":
        return MergeStack(
            list(self.layers),
            dict(self.base),
            list(self.saved),
            dict(self.marks),
            list(self.permanent),
            self.count,
            dict(self.lost),
        )

    def __reduce__(self) -> tuple:
        lost = self.lost | {layer.number: layer.plan.source.name for layer in self.layers}
        return _without_base, (self.count, lost)


def _without_base(count: int, lost: dict[int, str]) -> MergeStack:
    """The stack of a UNet that was pickled; new merges get new numbers."""
    return MergeStack(count=count, lost=lost)


def stack_of(unet: torch.nn.Module) -> MergeStack:
    """The stack that a UNet carries; attached to it if there was none."""
    if _ATTRIBUTE not in unet.__dict__:
        unet.__dict__[_ATTRIBUTE] = MergeStack()
    return unet.__dict__[_ATTRIBUTE]


def scale_of(unet: torch.nn.Module, number: int) -> float | None:
    """The present scale of one merge of a UNet, or None if it is not there (any more)."""
    return next((layer.scale for layer in stack_of(unet).layers if layer.number == number), None)


def is_lost(unet: torch.nn.Module, number: int) -> bool:
    """Whether a merge is in the weights, but was pickled with them, so that nothing can undo it."""
    return number in stack_of(unet).lost


def save_bits(weights: Mapping[str, torch.Tensor], backup: Backup) -> Saved:
    """Copy weights to the CPU's memory or to a temporary file (in TMPDIR), which is deleted when no one needs it."""
    nbytes = sum(weight.numel() * weight.element_size() for weight in weights.values())
    if backup == "cpu":
        copies = {
            name: weight.detach().clone() if weight.device.type == "cpu" else weight.detach().cpu()
            for name, weight in weights.items()
        }
        return Saved(copies, nbytes)
    folder = Path(tempfile.mkdtemp(prefix="perflow-backup-"))
    try:
        plain = {name: weight.detach() for name, weight in weights.items()}
        path = write_safetensors(folder / "base.safetensors", specs_of(plain), plain.items())
        saved = Saved(dict(open_weights(path)), nbytes, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(saved, shutil.rmtree, folder, ignore_errors=True)
    return saved


def check_unchanged(stack: MergeStack, weights: Mapping[str, torch.Tensor]) -> None:
    """Compare a sample of each merged weight with what was written; a cast since then is allowed for.

    Raises `MergeError` if someone else changed them, or removed them from the model.
    """
    gone = [name for name in stack.marks if name not in weights]
    if gone:
        raise MergeError(f"{len(gone)} merged weights are no longer in the model: {keys.grouped(gone)}.")
    changed = []
    for name, mark in stack.marks.items():
        weight = weights[name]
        found, expected = _sample(weight), mark.to(weight.dtype)
        if not torch.equal(found.nan_to_num(), expected.nan_to_num()):
            changed.append(name)
    if changed:
        raise MergeError(
            f"{len(changed)} of {len(stack.marks)} merged weights have changed since the merge: "
            f"{keys.grouped(changed)}. Something else wrote to them (fuse_lora, load_state_dict, training), and this "
            "would overwrite it. Undo that first (`pipe.unfuse_lora()`), or pass force=True to `unmerge_delta`: it "
            "restores the weights from before the merge."
        )


def write_layers(
    stack: MergeStack, layers: list[Layer], weights: Mapping[str, torch.Tensor], names: list[str]
) -> None:
    """Make `layers` the stack's: write base + sum over them into the weights `names`, and remember samples.

    All or nothing: an error or an interrupt puts back what the stack said before, and is raised again.
    """
    marks = {}
    with _writing(weights), _interrupts_held() as interrupted:
        try:
            for name in names:
                if interrupted:
                    raise KeyboardInterrupt
                base, device = stack.base[name], weights[name].device
                write_weight(weights[name], base, terms_of(layers, name, base, device))
                marks[name] = _sample(weights[name])
        except BaseException:
            for name in names[: len(marks) + 1]:
                base, device = stack.base[name], weights[name].device
                write_weight(weights[name], base, terms_of(stack.layers, name, base, device))
            raise
        stack.layers = layers
        stack.marks.update(marks)
        drop_unused(stack)


def drop_unused(stack: MergeStack) -> None:
    """Forget base bits and samples of weights that no layer changes any more."""
    used = {edit.name for layer in stack.layers for edit in layer.plan.edits}
    stack.base = {name: bits for name, bits in stack.base.items() if name in used}
    stack.marks = {name: mark for name, mark in stack.marks.items() if name in used}
    stack.saved = [saved for saved in stack.saved if not used.isdisjoint(saved.tensors)]


def add_permanently(plan: MergePlan, scale: float, weights: Mapping[str, torch.Tensor]) -> None:
    """Add a delta without a copy of the base; an interrupt waits until the last weight is written.

    Raises `MergeError` if it fails in the middle: then the model must be loaded again.
    """
    with _writing(weights), _interrupts_held():
        for done, edit in enumerate(plan.edits):
            try:
                weight = weights[edit.name]
                write_weight(weight, None, [(scale, plan.source.near(edit.key, weight.device, weight), edit.channels)])
            except Exception as error:
                raise MergeError(
                    f"Merging failed at weight {done + 1} of {len(plan.edits)} ({edit.name}: {error}), and with "
                    "backup='none' there is no copy to go back to. Load the model again."
                ) from error


Term = tuple[float, torch.Tensor, int | None]


def terms_of(layers: list[Layer], name: str, base: torch.Tensor, device: torch.device) -> Iterator[Term]:
    """(scale, delta, channels) of every layer that changes the weight `name`, with these base bits, oldest first."""
    for layer in layers:
        edit = layer.plan.edit_of.get(name)
        if edit is not None and layer.scale != 0:
            yield layer.scale, layer.plan.source.near(edit.key, device, base), edit.channels


def write_weight(weight: torch.Tensor, base: torch.Tensor | None, terms: Iterator[Term] | list[Term]) -> None:
    """weight <- round(base + sum s * delta), rounded once; base None means what the weight holds now.

    Arithmetic in fp32 (fp64 for fp64 weights), in slices along the first axis: any memory format, small temporaries.
    """
    terms = list(terms)
    exact = torch.promote_types(weight.dtype, torch.float32)
    start = weight if base is None else base
    if not terms:
        weight.copy_(start)
        return
    scale, delta, channels = terms[0]
    if len(terms) == 1 and scale == 1 and channels is None and delta.dtype == weight.dtype == start.dtype:
        if start is not weight:
            weight.copy_(start)
        weight.add_(delta.to(weight.device))  # the same bits as the general way, at the speed of memory
        return
    chunk = _CHUNK if weight.device.type == "cpu" else _CHUNK_DEVICE
    length = weight.shape[0] if weight.dim() else 1
    rows = max(1, chunk * length // max(1, weight.numel()))
    for first in range(0, length, rows):
        part = slice(first, first + rows) if weight.dim() else ...
        total = start[part].to(weight.device, exact, copy=True)
        for scale, delta, channels in terms:
            target = total if channels is None else total[:, :channels]
            target.add_(delta[part].to(weight.device, exact), alpha=scale)
        weight[part].copy_(total)


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """A few elements spread over a weight, on the CPU."""
    index = torch.linspace(
        0, weight.numel() - 1, min(_SAMPLES, weight.numel()), dtype=torch.float64, device="cpu"
    ).long()
    return torch.take(weight.detach(), index.to(weight.device)).cpu()


def _writing(weights: Mapping[str, torch.Tensor]) -> AbstractContextManager:
    """The mode in which these weights may be changed in place."""
    frozen = any(weight.is_inference() for weight in weights.values())
    return torch.inference_mode() if frozen else torch.no_grad()


@contextmanager
def _interrupts_held() -> Iterator[list[int]]:
    """Collect Ctrl-C instead of raising it anywhere; raised at the end if the block did not raise it itself.

    A handler of the program's own is called at the end; the block then does not learn of it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield []
        return
    usual = handler is signal.default_int_handler
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield pressed if usual else []
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed and not usual:
            handler(signal.SIGINT, None)
    if pressed and usual:
        raise KeyboardInterrupt
