"""What a merge changes, as values: an edit a weight, a plan of all edits, a plan and its strength as a layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from perflow_diffusers.weights.read import keys
from perflow_diffusers.weights.read.source import WeightSource
from perflow_diffusers.weights.scales import Strength
from perflow_diffusers.words.shown import LongDict, html_table, shorten, shown


@shown
@dataclass(frozen=True)
class Edit:
    """One weight (canonical `name`) that gets a source's tensor `key`, on its first `channels` inputs if given."""

    name: str
    key: str
    channels: int | None = None


@shown
@dataclass(frozen=True)
class MergePlan:
    """What a merge will change; it exists only if everything fits.

    `edits` are the weights to change, `untouched` the model's weights that the delta leaves alone (canonical names),
    `skipped` what was left out on request, `largest` the largest absolute value in the delta (of a LoRA or packed
    delta a bound of it, if that is small; infinite if it depends on the base) and `peaks` the same by weight,
    `fingerprint` the same for the same delta wherever it was read from.
    """

    source: WeightSource
    edits: tuple[Edit, ...]
    untouched: tuple[str, ...]
    skipped: tuple[str, ...]
    peaks: Mapping[str, float]
    fingerprint: str

    def __post_init__(self) -> None:
        shorten(self)

    def __str__(self) -> str:
        others = [f"{len(getattr(self, what))} {what}" for what in ("untouched", "skipped") if getattr(self, what)]
        padded = ", ".join(edit.name for edit in self.edits if edit.channels is not None)
        others += [f"on the first input channels of {padded}"] if padded else []
        largest = f"largest number {self.largest:.3g}"
        return f"{self.source.name} changes {len(self.edits)} weights; {'; '.join([*others, largest])}"

    def _repr_html_(self) -> str:
        blocks = keys.by_block([*self.edit_of, *self.untouched])
        rows = [
            (
                block,
                sum(name in self.edit_of for name in names),
                sum(name not in self.edit_of for name in names),
                f"{max((self.peaks.get(name, 0.0) for name in names), default=0.0):.2e}",
            )
            for block, names in blocks.items()
        ]
        return html_table(str(self), ("block", "changed", "untouched", "largest number"), rows)

    @property
    def largest(self) -> float:
        """The largest absolute value of all."""
        return max(self.peaks.values(), default=0.0)

    @cached_property
    def edit_of(self) -> dict[str, Edit]:
        """The edit of each weight that changes."""
        return LongDict({edit.name: edit for edit in self.edits})


@dataclass(frozen=True)
class Layer:
    """One merge: a plan and its strength. `number` tells it from others on the same UNet."""

    number: int
    plan: MergePlan
    strength: Strength
