"""The merges a UNet carries and the one way to write them: w = round(base + sum_i s_i * delta_i), in fp32."""

import shutil
import signal
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from perflow_diffusers.errors import MergeError
from perflow_diffusers.io.writer import specs_of, write_safetensors
from perflow_diffusers.weights.merge.edits import Layer, MergePlan
from perflow_diffusers.weights.merge.sums import Kept, check_sums, sample, terms_of, write_weight
from perflow_diffusers.weights.read import keys
from perflow_diffusers.weights.read.source import WeightSource, open_weights
from perflow_diffusers.words.shown import shown

Backup = Literal["cpu", "disk", "none"]

_ATTRIBUTE = "_perflow_merges"


@shown
@dataclass(frozen=True)
class Saved:
    """Base bits of weights from before their first merge, by canonical name; `folder` lives as long as this does."""

    tensors: Mapping[str, torch.Tensor]
    nbytes: int
    folder: Path | None = None


@shown
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


def layer_of(unet: torch.nn.Module, number: int) -> Layer | None:
    """One merge of a UNet, with its present strength; None if it is not there (any more)."""
    return next((layer for layer in stack_of(unet).layers if layer.number == number), None)


def acting_plans(stack: MergeStack) -> list[MergePlan]:
    """What is merged at another strength than 0, for good or not."""
    on = [one.plan for one in stack.layers if any(one.strength.of(name) for name in one.plan.edit_of)]
    return on + stack.permanent


def is_lost(unet: torch.nn.Module, number: int) -> bool:
    """Whether a merge is in the weights, but was pickled with them, so that nothing can undo it."""
    return number in stack_of(unet).lost


def before_merges(unet: torch.nn.Module) -> WeightSource:
    """The weights of a UNet as they were before its merges, from the bits that are kept to undo them.

    Raises `MergeError` if a merge was made without them, or was pickled; else what `open_weights` raises.
    """
    source, stack = open_weights(unet), stack_of(unet)
    lasting = [*(plan.source.name for plan in stack.permanent), *stack.lost.values()]
    if lasting:
        raise MergeError(
            f"{', '.join(lasting)} is merged into this model, and the weights from before were not kept "
            "(backup='none', or a model that was pickled since). Load the base again."
        )
    dtypes = {**source.dtypes, **{name: bits.dtype for name, bits in stack.base.items()}}
    return replace(source, dtypes=MappingProxyType(dtypes), read=_Before(source.read, dict(stack.base)))


@dataclass(frozen=True)
class _Before:
    """Reads the base bits of a merged weight, and any other weight as it is."""

    read: Callable[[str], torch.Tensor]
    base: Mapping[str, torch.Tensor]

    def __call__(self, name: str) -> torch.Tensor:
        return self.base[name] if name in self.base else self.read(name)


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
        found, expected = sample(weight), mark.to(weight.dtype)
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
) -> Kept:
    """Make `layers` the stack's: write base + sum over them into the weights `names`, and remember samples.

    All or nothing: sums that overflow are refused first, and an error or an interrupt puts back what the stack said
    before, and is raised again. Returns what share of the sums over layers the weights kept.
    """
    check_sums(layers, stack.base, weights, names)
    marks, kept = {}, Kept()
    with _writing(weights), _interrupts_held() as interrupted:
        try:
            for name in names:
                if interrupted:
                    raise KeyboardInterrupt
                weight, base = weights[name], stack.base[name]
                terms = list(terms_of(layers, name, base, weight.device))
                write_weight(weight, base, terms)
                marks[name] = kept.add(weight, sample(base), terms)
        except BaseException:
            for name in names[: len(marks) + 1]:
                base, device = stack.base[name], weights[name].device
                write_weight(weights[name], base, terms_of(stack.layers, name, base, device))
            raise
        stack.layers = layers
        stack.marks.update(marks)
        drop_unused(stack)
    return kept


def drop_unused(stack: MergeStack) -> None:
    """Forget base bits and samples of weights that no layer changes any more."""
    used = {edit.name for layer in stack.layers for edit in layer.plan.edits}
    stack.base = {name: bits for name, bits in stack.base.items() if name in used}
    stack.marks = {name: mark for name, mark in stack.marks.items() if name in used}
    stack.saved = [saved for saved in stack.saved if not used.isdisjoint(saved.tensors)]


def add_permanently(layer: Layer, weights: Mapping[str, torch.Tensor]) -> Kept:
    """Add a delta without a copy of the base; an interrupt waits until the last weight is written.

    Returns what share of it the weights kept. Raises `MergeError` if it fails in the middle: then the model must be
    loaded again.
    """
    plan, kept = layer.plan, Kept()
    with _writing(weights), _interrupts_held():
        for done, edit in enumerate(plan.edits):
            try:
                weight = weights[edit.name]
                before, terms = sample(weight), list(terms_of([layer], edit.name, weight, weight.device))
                write_weight(weight, None, terms)
                kept.add(weight, before, terms)
            except Exception as error:
                raise MergeError(
                    f"Merging failed at weight {done + 1} of {len(plan.edits)} ({edit.name}: {error}), and with "
                    "backup='none' there is no copy to go back to. Load the model again."
                ) from error
    return kept


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
