"""The sums that a merge writes, w = round(base + sum_i s_i * delta_i), in fp32: do they fit, and what does w keep."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache

import torch

from perflow_diffusers.errors import MergeError
from perflow_diffusers.weights.merge.edits import Layer
from perflow_diffusers.weights.read import keys
from perflow_diffusers.words.notices import warn_user

_CHUNK = 1 << 18  # elements per fp32 temporary on the CPU: stays in its cache
_CHUNK_DEVICE = 1 << 22
_SAMPLES = 64
_LOW = 0.5  # below this share of what was wanted, a merge is not what its user thinks


Term = tuple[float, torch.Tensor, int | None]


def terms_of(layers: Iterable[Layer], name: str, base: torch.Tensor, device: torch.device) -> Iterator[Term]:
    """(scale, delta, channels) of every layer that changes the weight `name`, with these base bits, oldest first."""
    for layer in layers:
        edit = layer.plan.edit_of.get(name)
        scale = layer.strength.of(name)
        if edit is not None and scale != 0:
            yield scale, layer.plan.source.near(edit.key, device, base), edit.channels


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


def check_sums(
    layers: list[Layer], base: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], names: Iterable[str]
) -> None:
    """Raise `MergeError` if a sum overflows the dtype of its weight; `base` may lack what was never merged into.

    Numbers are looked at only where they could: what is smaller than half a step at the end of a dtype's range (16 in
    fp16) takes no finite weight beyond it. A weight that is not finite itself is left as it is.
    """
    broken: dict[str, torch.dtype] = {}
    for name in names:
        weight = weights[name]
        bound = sum(abs(layer.strength.of(name)) * layer.plan.peaks.get(name, 0.0) for layer in layers)
        if bound < _room(weight.dtype):
            continue
        start = base.get(name, weight).detach()
        result = torch.empty_like(weight, requires_grad=False)
        with torch.no_grad():
            write_weight(result, start, terms_of(layers, name, start, weight.device))
        finite = start.to(weight.device, weight.dtype).isfinite()
        if not bool(result.isfinite()[finite].all()):
            broken[name] = weight.dtype
    if broken:
        dtypes = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in broken.values()}))
        what = " + ".join(f"{layer.strength} x {layer.plan.source.name}" for layer in layers)
        raise MergeError(
            f"The weights plus {what} overflow {dtypes} in {len(broken)} tensors: {keys.grouped(broken)}. Nothing was "
            "changed. Use a smaller scale, or load the model in float32 or bfloat16."
        )


def _room(dtype: torch.dtype) -> float:
    """Half the distance of the two largest numbers: what is smaller never rounds a finite sum up to infinity."""
    kind = torch.finfo(dtype)
    return kind.eps / 2 * kind.max / (2 - kind.eps)


class Kept:
    """Adds up, weight by weight, what share of the wanted change is in the weights: `share`.

    share = 1 - |kept - wanted|^2 / |wanted|^2 over all weights that change, where wanted = sum_i s_i * delta_i and
    kept = w - base, estimated from 64 places of each weight. 1 if nothing was wanted. Rounding to the weights' dtype
    is what is lost: a change of less than half a step of a weight does not reach it at all.
    """

    def __init__(self) -> None:
        self._samples: list[tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, weight: torch.Tensor, before: torch.Tensor, terms: list[Term]) -> torch.Tensor:
        """Compare a weight that was just written with a sample of its base; returns the sample of the weight."""
        after = sample(weight)
        wanted = torch.zeros(len(after), dtype=torch.float32, device="cpu")
        for scale, delta, channels in terms:
            if channels is not None:
                padded = torch.zeros(weight.shape, dtype=delta.dtype, device=delta.device)
                padded[:, :channels] = delta
                delta = padded
            wanted.add_(sample(delta).float(), alpha=scale)
        if terms and len(after):
            self._samples.append((weight.numel() / len(after), wanted, before.to(weight.dtype), after))
        return after

    @cached_property
    def share(self) -> float:
        """1 for all of it, 0 for none; to be asked for when all weights are added."""
        if not self._samples:
            return 1.0
        factors = torch.cat(
            [torch.full((len(after),), factor, device="cpu") for factor, _, _, after in self._samples]
        ).double()
        columns = zip(*(one[1:] for one in self._samples), strict=True)
        wanted, before, after = (torch.cat([part.double() for part in column]) for column in columns)
        total = (factors * wanted.square()).sum().item()
        lost = (factors * (after - before - wanted).square()).sum().item()
        return max(0.0, 1 - lost / total) if total else 1.0

    def warn(self, what: str, dtypes: Iterable[torch.dtype]) -> None:
        """Warn if less than half was kept."""
        share = self.share
        if share < _LOW:
            kinds = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))
            warn_user(
                f"Only {100 * share:.0f} % of {what} was kept by weights in {kinds}: most of its numbers are "
                "smaller than their rounding. Load the model in float32 (or float16 instead of bfloat16) and merge "
                "again, or use the accelerator as a LoRA, which is not rounded to the weights."
            )


def sample(weight: torch.Tensor) -> torch.Tensor:
    """A few elements spread over a weight, on the CPU."""
    given = weight.detach()
    plain = given.view(torch.uint8) if given.dtype.itemsize == 1 else given  # fp8 knows no `take`
    return torch.take(plain, _places(weight.numel(), weight.device)).cpu().view(given.dtype)


@lru_cache(maxsize=512)
def _places(count: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        places = torch.linspace(0, count - 1, min(_SAMPLES, count), dtype=torch.float64, device="cpu")
        return places.long().to(device)
