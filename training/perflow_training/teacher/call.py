"""How a network is called: which argument is the latent, how it is told the time, and what its output means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perflow_diffusers.words.shown import shown
from perflow_training.teacher.conditions import Conditions


@shown
@dataclass(frozen=True)
class Form:
    """How a state (B, ...) looks to a network: with `axes` of length 1 more, counted in a sample of its; or a list.

    `listed`: it is a list of B tensors instead of one.
    """

    axes: tuple[int, ...] = ()
    listed: bool = False

    @classmethod
    def between(cls, state: Sequence[int], seen: Sequence[int], listed: bool) -> Form | None:
        """That of samples of shape `seen` for states whose samples have shape `state`; None where they do not fit."""
        axes, place = [], 0
        for axis, length in enumerate(seen):
            if place < len(state) and length == state[place]:
                place += 1
            elif length == 1:
                axes.append(axis)
            else:
                return None
        return cls(tuple(axes), listed) if place == len(state) else None

    def of(self, state: Tensor) -> Tensor | list[Tensor]:
        """A state (B, ...) as the network has it."""
        for axis in self.axes:
            state = state.unsqueeze(axis + 1)
        return list(state.unbind()) if self.listed else state

    def back(self, seen: Any) -> Tensor:
        """The state that looks so."""
        state = torch.stack(list(seen)) if self.listed else seen
        return state.squeeze([axis + 1 for axis in self.axes]) if self.axes else state


@shown
@dataclass(frozen=True)
class Call:
    """A call of a network for states z (B, ...) at times (B,).

    Fields: `latent` and `time` name its arguments; empty: the first two. It is told `slope * time + offset`, as whole
    numbers where `whole`; `time_axes` is how many axes of length 1 stand after that of the samples. `sees`, `says`:
    how states look to it, and its output. `sign`: what the output is multiplied with.
    """

    latent: str = ""
    time: str = ""
    slope: float = 1.0
    offset: float = 0.0
    whole: bool = False
    time_axes: int = 0
    sees: Form = Form()
    says: Form = Form()
    sign: float = 1.0

    def __call__(self, network: nn.Module, z: Tensor, time: Tensor, cond: Conditions) -> Tensor:
        """The network's output for z (B, ...) at `time` (B,), with `cond` of B rows: (B, ...) like z."""
        if not self.latent:
            return network(z, time, **cond.kwargs(), return_dict=False)[0]
        told = self.slope * time + self.offset
        told = told.round().long() if self.whole else told.float()
        told = told.to(z.device).reshape(-1, *(1,) * self.time_axes)
        given = {**cond.kwargs(), self.latent: self.sees.of(z), self.time: told}
        out = self.says.back(network(**given)[0])
        return out if self.sign == 1 else self.sign * out


#: As UNets are called: latents, times, and what they are told by name.
POSITIONAL = Call()
