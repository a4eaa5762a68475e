"""Early warnings: what an untrained student should look like, and when a run should not go on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perflow_diffusers.words.shown import shown
from perflow_training.buffer import SolvedWindows
from perflow_training.config import TrainingConfig
from perflow_training.teacher.backbone import Backbone
from perflow_training.teacher.conditions import Conditions

SHOWN = 8  # names in a message


class TrainingStopped(RuntimeError):
    """A run that cannot become good; the message is the diagnosis."""


class NotFinite(TrainingStopped):
    """A loss or a gradient that is no number."""


@torch.no_grad()
def check_start(student: Backbone, teacher: Backbone, batch: SolvedWindows, exact: bool) -> float:
    """The relative difference of the untrained student's output to the teacher's for the same input.

    Raises TrainingStopped unless it is rounding: below 1e-4, or 5 % where one of them computes in 16 bits (`exact`
    false).
    """
    timestep = batch.start
    same = replace(student, index_offset=teacher.index_offset)
    wanted, got = (net(batch.z_start, timestep, batch.cond).float() for net in (teacher, same))
    finite = wanted.isfinite().flatten(1).all(1) & batch.z_end.isfinite().flatten(1).all(1)
    if not finite.all():
        bad = [batch.names[i] for i in (~finite).nonzero().flatten().tolist()] if batch.names else []
        some = 0 < len(bad) < len(finite)
        which = f" It is so for {listed(bad)} alone: take them out of the data." if some else ""
        raise TrainingStopped(
            f"Before the first step the teacher's own answer or solve is not finite.{which} Its weights may be "
            "damaged, or its numbers too large for `mixed_precision` fp16: take bf16 or no."
        )
    difference = float((got - wanted).norm() / wanted.norm())
    limit = 1e-4 if exact else 0.05
    if not difference < limit:
        raise TrainingStopped(
            f"Before the first step the student's output differs from the teacher's by {difference:.2%}; expected "
            f"less than {limit:.2%}. The student was not made from this teacher, or a LoRA does not start at zero."
        )
    return difference


def listed(names: Sequence[str]) -> str:
    """Names for a message: each once, the first few of many."""
    once = list(dict.fromkeys(names))
    return ", ".join(once[:SHOWN]) + (f" and {len(once) - SHOWN} more" if len(once) > SHOWN else "")


def answers_zero(z: Tensor, timestep: Tensor, cond: Conditions) -> Tensor:
    """A student that has learned nothing; its loss is the scale of the others."""
    return torch.zeros_like(z)


def expectation(config: TrainingConfig, untrained: list[float], zero: list[float]) -> str:
    """What is printed before the first step: the losses of the untrained student, and how to read them."""
    shares = [a / b if b else math.nan for a, b in zip(untrained, zero, strict=True)]
    lines = [
        "untrained student, loss a window (noisy to clean): " + "  ".join(f"{value:.4g}" for value in untrained),
        "as a share of answering zero:                      " + "  ".join(f"{value:.2g}" for value in shares),
    ]
    if config.prediction_type == "velocity" and not config.flow:
        lines.append("expect: about 1 at first (the teacher does not predict velocities), far below it after warm-up.")
    else:
        lines.append("expect: well below 1 from the start, falling within the first few hundred steps.")
        worst = max((share for share in shares if not math.isnan(share)), default=0.0)
        if worst >= 1:
            lines.append(
                f"WARNING: {worst:.2g} times worse than answering zero. The teacher's `prediction_type` in its "
                "scheduler config, or its noise schedule, is probably not the one that it was trained with."
            )
    return "\n".join(lines)


@shown
@dataclass
class Watch:
    """Compares the logged losses with those of the untrained student; `above_since` is a step, or None."""

    config: TrainingConfig
    untrained: list[float]
    above_since: int | None = None

    def finite(self, step: int, losses: Sequence[float | None], grad_norm: float | None) -> None:
        """Raises NotFinite for losses or a gradient norm that are not numbers; arguments as those of `look`."""
        broken = [i for i, now in enumerate(losses, 1) if now is not None and not math.isfinite(now)]
        # the loss scale of fp16 overflows now and then; such steps are left out
        overflow = self.config.mixed_precision != "fp16" and grad_norm is not None and not math.isfinite(grad_norm)
        if broken or overflow:
            what = (
                f"loss is not finite at step {step}, first in window {broken[0]} of {len(losses)}"
                if broken
                else (f"gradient is not finite at step {step}, though the loss still is")
            )
            raise NotFinite(
                f"The {what} (gradient norm {grad_norm}). Lower `learning_rate`, lengthen `lr_warmup_steps`, or use "
                "`mixed_precision` bf16 or no; if it happens at the first steps, the teacher's own solve is not "
                "finite: look at its dtype."
            )

    def look(self, step: int, losses: Sequence[float | None], grad_norm: float | None) -> None:
        """Raises TrainingStopped for losses that are not numbers, and for losses that have been too high for long.

        `losses`: one a window, None where there were no samples.
        """
        seen = [(now, start) for now, start in zip(losses, self.untrained, strict=True) if now is not None and start]
        self.finite(step, losses, grad_norm)
        limit, start = self.config.divergence_steps, sum(start for _, start in seen)
        if not limit or not start:
            return
        ratio = sum(now for now, _ in seen) / start
        if ratio <= self.config.divergence_factor:
            self.above_since = None
            return
        self.above_since = step if self.above_since is None else self.above_since
        if step - self.above_since >= limit:
            raise TrainingStopped(
                f"The loss has been above {self.config.divergence_factor:g} times that of the untrained student for "
                f"{step - self.above_since} steps (now {ratio:.3g} times): the student unlearns. Lower "
                "`learning_rate`, look at the captions and pictures, and check `prediction_type`. "
                "`divergence_steps=0` goes on anyway."
            )
