"""What a merge did, for people."""

from dataclasses import dataclass

from perflow_diffusers.weights.scales import Scale, Strength
from perflow_diffusers.words.shown import shorten, shown


@shown
@dataclass(frozen=True)
class MergeReport:
    """What a merge did: counts of weights, names of special ones, bytes of the backup, seconds it took.

    `kept` is the share of the change that is in the weights after they were rounded to their dtype, 0 to 1:
    1 - |kept - wanted|^2 / |wanted|^2 with wanted = the sum of scale x delta over all merges on the UNet, and kept =
    what the weights changed by, estimated from 64 places of each changed weight.
    """

    source: str
    scale: Scale
    changed: int
    untouched: tuple[str, ...]
    padded: tuple[str, ...]
    skipped: tuple[str, ...]
    backup: str
    backup_bytes: int
    seconds: float
    kept: float = 1.0

    def __post_init__(self) -> None:
        shorten(self)

    def __str__(self) -> str:
        text = f"merged {self.source} x {Strength(self.scale)} into {self.changed} weights in {self.seconds:.2f} s"
        for names, what in (
            (self.padded, "on the first input channels of {}"),
            (self.skipped, "{} skipped"),
            (self.untouched, "{} other weights untouched"),
        ):
            if names:
                shown = ", ".join(names) if what != "{} other weights untouched" else str(len(names))
                text += "; " + what.format(shown)
        if self.kept < 0.99:
            text += f"; {100 * self.kept:.0f} % of it kept by the weights' dtype"
        kept = {"none": "no backup, cannot be undone"}.get(self.backup, f"backup on {self.backup}")
        return f"{text}; {kept}" + (f" ({self.backup_bytes / 2**20:.0f} MiB)" if self.backup_bytes else "")
