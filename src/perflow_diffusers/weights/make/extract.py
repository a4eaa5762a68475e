"""A delta as a LoRA: `extract_lora(delta, out, rank=64 | energy=0.95)`, D ~ B A per layer, the rest as a residual."""

import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch

from perflow_diffusers.errors import DeltaError
from perflow_diffusers.io.writer import Spec
from perflow_diffusers.weights.make.lora_file import ORDER, STORED, Factors, lora_targets, write_lora
from perflow_diffusers.weights.make.moments import check_moments, root_of, unweighted, weighted_by
from perflow_diffusers.weights.make.report import LayerReport, LoraReport
from perflow_diffusers.weights.make.svd import Effort, Wanted, balanced, low_rank, rounding_loss, squared_norm
from perflow_diffusers.weights.read import keys
from perflow_diffusers.weights.read.complete import check_difference
from perflow_diffusers.weights.read.lora import as_delta
from perflow_diffusers.weights.read.named import canonical_names
from perflow_diffusers.weights.read.source import WeightSource, open_weights
from perflow_diffusers.words.arguments import dtype_of, is_number, path_of, whole_number

DEFAULT_RANK = 64

_ROWS = 128
_CLEAR = 1e-2  # of the squared norm: losses above this are known from differences of norms, others are measured


@dataclass(frozen=True)
class _Layer:
    """A finished layer: factors as they are stored, and what was lost in squared norms."""

    down: torch.Tensor
    up: torch.Tensor
    report: LayerReport
    energy: float
    lost: float


def extract_lora(
    delta: Any,
    out: str | os.PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    alpha: float | None = None,
    moments: Mapping[str, torch.Tensor] | None = None,
    exact: bool = False,
    oversampling: int = 16,
    power_iterations: int = 5,
    residual: bool = True,
    dtype: torch.dtype | str = torch.float16,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LoraReport:
    """Approximate a delta by a LoRA that `pipe.load_lora_weights(out)` reads, the best one of its rank in every layer.

    `delta` is anything that `open_weights` takes, a LoRA or an int8 delta included. `out` is a `.safetensors` file or
    a folder (then `pytorch_lora_weights.safetensors` in it). Every weight of a linear layer or convolution becomes
    B (out, r) times A (r, in), convolutions as (out, in * height * width) matrices. Text encoder layers of a LoRA are
    made anew like those of the UNet. The LoRA at scale 1 is the delta, whatever alpha is.

    - `rank` (default 64) holds for every layer, or less where the matrix is smaller. With `energy` (0 < energy <= 1)
      each layer gets the smallest rank that keeps this share of its squared norm, at most `rank` if that is given.
    - `alpha` (default: the rank of each layer) is that of every layer; B A is divided by alpha / rank, so that tools
      which apply this factor get the delta.
    - `moments` (`measure_moments`) are `{canonical weight name: E[x x^T]}` of the layers' inputs, (in,) for the
      diagonal, or (in, in): what is minimised is then E|(D - BA) x|^2, the error of the layers' outputs, and `energy`
      is a share of E|D x|^2. A convolution takes (in_channels,), the same for all places of the kernel. Layers
      without a moment are approximated plainly.
    - `exact` takes the spectrum of every layer in float64, as `energy` does; else large matrices are approximated by
      `torch.svd_lowrank` with `rank + oversampling` columns and `power_iterations`, at most 1.005 times the optimal
      error with the defaults. The same `seed` gives the same file.
    - `residual` writes what no LoRA can carry (biases, norms) to `<name>.residual.safetensors` beside it, which
      `merge_delta` adds again and `load_lora_weights` ignores; otherwise it is dropped. The report says its share.

    - `dtype` (float16, bfloat16 or float32) is what the factors are stored in.

    Layers whose difference is zero are left out. Memory: the LoRA and a few tensors of the delta. Everything is
    computed before anything is written. `progress(done, total)` is called after each tensor.

    Raises `DeltaError` for arguments out of range, a delta that is empty, zero, not finite, or a complete model, and
    moments that do not fit; `WeightSourceError` for what cannot be read, `WeightWriteError` for an `out` that cannot
    be written (all ValueErrors).
    """
    wanted = _checked_rank(rank, energy)
    _check_alpha(alpha)
    stored = dtype_of(dtype)
    if stored not in STORED:
        raise DeltaError(f"dtype={dtype!r} is nothing that LoRAs are stored in. Pass float16, bfloat16 or float32.")
    whole_number(oversampling, "oversampling", 0, "Usual are 8 to 32.")
    whole_number(power_iterations, "power_iterations", 0, "Usual are 1 to 6.")
    whole_number(seed, "seed", 0, "Any will do; the same one gives the same file.")
    check_moments(moments)
    path_of(out, "out", ORDER)
    source = open_weights(delta)
    weights = as_delta(source, with_text=True)
    names = _checked_names(weights)
    path, rest_path = lora_targets(out, residual, overwrite)
    job = _Job(wanted, Effort(exact, oversampling, power_iterations), stored, seed, moments or {}, alpha)
    if job.moments and not any(name in job.moments for name in names):
        raise DeltaError(
            f"None of the moments belongs to a tensor of {source.name}. Measure them with the same model."
        )
    layers, zero, rest = _compute(weights, names, job, progress)
    if not layers:
        raise DeltaError(f"{source.name} has no layer that a LoRA could carry and that differs from zero.")
    specs = {name: (weights.shapes[names[name]], weights.dtypes[names[name]]) for name in rest} if residual else {}
    factors = {name: Factors(one.down, one.up, job.alpha_of(one.report.rank)) for name, one in layers.items()}
    stream = ((name, weights[names[name]]) for name in specs)
    write_lora(path, rest_path, factors, specs, stream, weights.metadata, overwrite=overwrite)
    return _report(path, rest_path if specs else None, layers, zero, rest, specs, source.nbytes)


def check_extract(
    delta: Any, *, rank: int | None = None, energy: float | None = None, alpha: float | None = None
) -> str:
    """One sentence on what `extract_lora` would make of a delta; reads a few tensors.

    `rank`, `energy`, `alpha` as there. Raises what it can see.
    """
    most, _ = _checked_rank(rank, energy)
    _check_alpha(alpha)
    weights = as_delta(open_weights(delta), with_text=True)
    shapes = [
        weights.shapes[key] for name, key in _checked_names(weights).items() if _is_carried(name, weights.shapes[key])
    ]
    if not shapes:
        raise DeltaError(f"{weights.name} has no layer that a LoRA could carry.")
    sides = [(shape[0], torch.Size(shape[1:]).numel()) for shape in shapes]
    numbers = sum(min(most or rows, rows, columns) * (rows + columns) for rows, columns in sides)
    whole = sum(rows * columns for rows, columns in sides)
    more = f", more than the {whole / 1e6:.2f} M of the delta" if numbers > whole else ""
    return f"{weights.name}: {len(shapes)} layers as a LoRA of at most {numbers / 1e6:.2f} M numbers{more}"


@dataclass(frozen=True)
class _Job:
    """What to do with each layer."""

    wanted: tuple[int | None, float | None]
    effort: Effort
    dtype: torch.dtype
    seed: int
    moments: Mapping[str, torch.Tensor]
    alpha: float | None

    def alpha_of(self, rank: int) -> float:
        return float(rank) if self.alpha is None else float(self.alpha)


def _check_alpha(alpha: float | None) -> None:
    if alpha is not None and not (is_number(alpha) and 0 < alpha < inf):
        raise DeltaError(f"alpha={alpha!r} is not a positive number. Usual are the rank, its half, or 1.")


def _checked_rank(rank: int | None, energy: float | None) -> tuple[int | None, float | None]:
    if rank is not None:
        whole_number(rank, "rank", 1, "Usual are 8 to 128.")
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        raise DeltaError(f"energy={energy!r} is a share of the squared norm: pass a number above 0, up to 1.")
    return (DEFAULT_RANK if rank is None and energy is None else rank), energy


def _checked_names(weights: WeightSource) -> dict[str, str]:
    """`{canonical name: key}` of a delta, in the order of names."""
    if keys.is_original_format(weights):
        raise DeltaError(
            f"{weights.name} is a complete checkpoint in the original format. Make a delta with "
            "`compute_delta(base, tuned)` first."
        )
    names = canonical_names(weights)
    if not names:
        raise DeltaError(f"{weights.name} is empty: there is nothing to extract.")
    wrong = [f"{key} ({weights.dtypes[key]})" for key in names.values() if not weights.dtypes[key].is_floating_point]
    if wrong:
        raise DeltaError(f"{weights.name} holds tensors that are not floating point: {keys.grouped(wrong)}.")
    if not weights.partial:
        check_difference(weights, names)
    return {name: names[name] for name in sorted(names)}


def _is_carried(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is the weight of a linear layer or a convolution; a bare class embedding is a table of vectors."""
    return len(shape) in (2, 4) and name.endswith(".weight") and not name.endswith("class_embedding.weight")


def _compute(
    weights: WeightSource, names: Mapping[str, str], job: _Job, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, _Layer], tuple[str, ...], dict[str, float]]:
    """Finished layers, names of layers that are zero, and squared norms of tensors that no LoRA can carry."""
    layers, zero, rest, broken = {}, [], {}, []
    # One buffer for all: fresh memory for every tensor costs as much time as the conversion.
    buffer = torch.empty(max(torch.Size(weights.shapes[key]).numel() for key in names.values()))
    for done, (name, key) in enumerate(names.items(), start=1):
        given = weights[key].detach()
        whole = buffer[: given.numel()].view(given.shape).copy_(given)
        size = squared_norm(whole) if whole.numel() else 0.0
        if not size < float("inf"):
            broken.append(name)
        elif not _is_carried(name, weights.shapes[key]):
            rest[name] = size
        elif size == 0:
            zero.append(name)
        elif not broken:
            layers[name] = _layer(name, whole, size, job)
        if progress is not None:
            progress(done, len(names))
    if broken:
        raise DeltaError(
            f"{weights.name} has NaN or Inf in {len(broken)} tensors: {keys.grouped(broken)}. Nothing was written. It "
            "is damaged, or overflowed when it was stored in fp16: make or download it again."
        )
    return layers, tuple(zero), rest


def _layer(name: str, whole: torch.Tensor, size: float, job: _Job) -> _Layer:
    """Factorise one weight (out, in, ...) and measure the factors as they will be stored."""
    matrix = whole.flatten(1)
    root = root_of(name, job.moments.get(name), tuple(whole.shape))
    weighted = matrix if root is None else weighted_by(matrix, root)
    most = min(matrix.shape)
    cap, energy = job.wanted
    seed = job.seed ^ zlib.crc32(name.encode())
    found = low_rank(weighted, Wanted(min(cap or most, most), energy), job.effort, seed)
    left, right = balanced(found.left, found.right if root is None else unweighted(found.right, root))
    strength = job.alpha_of(len(right)) / len(right)
    left, right = left / strength**0.5, right / strength**0.5
    up, down = left.to(job.dtype), right.to(job.dtype)
    lost, weighted_lost = size - found.captured, 0.0
    if root is None and lost > _CLEAR * size:
        lost += strength**2 * rounding_loss(left, right, up.float(), down.float())
    else:
        lost, weighted_lost = _lost(matrix, up.float() * strength, down.float(), root)
    if not lost < float("inf"):
        raise DeltaError(f"The factors of {name} overflow in {job.dtype}. Pass dtype=torch.float32.")
    weighted_size = size if root is None else squared_norm(weighted)
    weighted_error = None if root is None else _ratio(weighted_lost, weighted_size)
    bound = None if found.bound is None else _ratio(found.bound, weighted_size)
    rank, shape = len(down), tuple(whole.shape)
    nbytes = up.nbytes + down.nbytes
    report = LayerReport(name, shape, rank, size**0.5, _ratio(lost, size), weighted_error, bound, nbytes)
    if whole.ndim == 4:
        up, down = up.reshape(-1, rank, 1, 1), down.reshape(rank, *shape[1:])
    return _Layer(down.contiguous(), up.contiguous(), report, size, lost)


def _lost(
    matrix: torch.Tensor, up: torch.Tensor, down: torch.Tensor, root: torch.Tensor | None
) -> tuple[float, float]:
    """Squared norms of matrix - up @ down, plain and weighted, some rows at a time."""
    plain = weighted = 0.0
    for rows, part in zip(matrix.split(_ROWS), up.split(_ROWS), strict=True):
        error = torch.addmm(rows, part, down, alpha=-1)
        plain += squared_norm(error)
        weighted += 0.0 if root is None else squared_norm(weighted_by(error, root))
    return plain, weighted


def _ratio(lost: float, size: float) -> float:
    """Of two squared norms, that of the norms."""
    return (lost / size) ** 0.5 if size else 0.0


def _nbytes(spec: Spec) -> int:
    return torch.Size(spec[0]).numel() * spec[1].itemsize


def _report(
    path: Path,
    rest_path: Path | None,
    layers: Mapping[str, _Layer],
    zero: tuple[str, ...],
    rest: Mapping[str, float],
    specs: Mapping[str, Spec],
    delta_nbytes: int,
) -> LoraReport:
    """Totals; `rest` are squared norms of what no LoRA can carry, `specs` what of it was written."""
    lost, left_out = sum(layer.lost for layer in layers.values()), sum(rest.values())
    total = left_out + sum(layer.energy for layer in layers.values())
    return LoraReport(
        path,
        rest_path,
        tuple(layer.report for layer in layers.values()),
        zero,
        tuple(rest),
        not_carried_energy=left_out / total,
        relative_error=_ratio(lost + left_out, total),
        relative_error_with_residual=_ratio(lost if specs else lost + left_out, total),
        nbytes=sum(layer.report.nbytes for layer in layers.values()),
        residual_nbytes=sum(map(_nbytes, specs.values())),
        delta_nbytes=delta_nbytes,
    )
