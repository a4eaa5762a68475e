"""Several LoRAs or deltas as one file: `combine(sources, out, scales)`, the sum of all, each times its scale."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from perflow_diffusers.errors import DeltaError
from perflow_diffusers.io.tensors import dtype_names
from perflow_diffusers.io.writer import (
    File,
    Spec,
    check_file_name,
    check_target,
    write_safetensors,
    write_together,
)
from perflow_diffusers.weights.make.concatenate import Joined, check_finite, concatenated, wider
from perflow_diffusers.weights.make.delta import DELTA_FORMAT
from perflow_diffusers.weights.make.lora_file import LORA_FORMAT, OWN_KEYS, RESIDUAL_FORMAT, STORED, lora_targets
from perflow_diffusers.weights.read import keys
from perflow_diffusers.weights.read.complete import check_difference
from perflow_diffusers.weights.read.header_facts import for_new_tensors
from perflow_diffusers.weights.read.lora import RESIDUAL_KEY, as_delta, open_residual
from perflow_diffusers.weights.read.lora_layers import ADAPTER_METADATA, warn_of_bundled
from perflow_diffusers.weights.read.named import canonical_names
from perflow_diffusers.weights.read.source import WeightSource, open_weights
from perflow_diffusers.weights.scales import strength_of
from perflow_diffusers.words.arguments import dtype_of, in_words, path_of
from perflow_diffusers.words.shown import plain, shorten, shown

_ORDER = 'combine([first, second], "both.safetensors", [1, 0.8])'
_OF_TRAINING = ("ss_", "modelspec.")  # facts of one LoRA, true of several only if they share them


@shown
@dataclass(frozen=True)
class CombineReport:
    """What `combine` wrote, or would write.

    `form` is "lora" or "delta", `sources` and `scales` are in the order given; `tensors` and `nbytes` are those of all
    files written, `ranks` counts the layers of a LoRA by rank; `disagreed` names header keys that the sources set
    differently, which the result therefore lacks.
    """

    path: Path
    residual_path: Path | None
    form: str
    sources: tuple[str, ...]
    scales: tuple[float, ...]
    tensors: int
    nbytes: int
    ranks: Mapping[int, int]
    disagreed: tuple[str, ...]

    def __post_init__(self) -> None:
        shorten(self)

    def __str__(self) -> str:
        terms = " + ".join(f"{scale:g} x {name}" for name, scale in zip(self.sources, self.scales, strict=True))
        lines = [f"{terms} as one {self.form}: {self.tensors} tensors, {self.nbytes / 1e6:.2f} MB: {self.path}"]
        if self.ranks:
            lines.append("ranks     " + ", ".join(f"{rank} ({count} layers)" for rank, count in self.ranks.items()))
        if self.residual_path is not None:
            lines.append(f"residual  {self.residual_path.name}")
        if self.disagreed:
            lines.append(f"left out  {', '.join(self.disagreed)}: the sources do not agree")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it, fit for `json.dumps`."""
        return plain(self)


def combine(
    sources: Sequence[Any],
    out: str | os.PathLike,
    scales: Sequence[float] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CombineReport:
    """Write the sum of LoRAs or deltas, each times its number of `scales` (default: 1 for all), as one LoRA or delta.

    `sources` are what `open_weights` takes. Of LoRAs only (any layouts, text encoder layers and residuals included)
    comes a LoRA in the layout of diffusers, exactly: the factors of a layer stand beside each other, so that its rank
    is the sum of the ranks (`extract_lora` makes it smaller). One alpha serves a layer; where strengths differ, the
    up factors of the rarer ones carry the difference, in fp32. Of anything else comes a delta, summed in fp32; text
    encoder layers, which it cannot hold, are left out with a warning.

    `out` is a `.safetensors` file, for a LoRA also a folder. `dtype` (default: what the sources hold, the widest of
    them, and fp32 for what had to be scaled) rounds all tensors once. What all headers say alike is kept; settings of
    use also if only one has them. Memory: one layer. Nothing is written before all names and shapes are checked,
    and with `dry_run` nothing at all. `progress(done, total)` is called after each tensor.

    Raises `DeltaError` for sources that do not fit together and numbers that are not finite, `WeightSourceError` for
    what cannot be read, `MergeError` for a scale that is no finite number, `WeightWriteError` for an `out` that cannot
    be written (all ValueErrors). An old file there is then intact.
    """
    path_of(out, "out", _ORDER)
    stored = dtype_of(dtype)
    if dtype is not None and stored not in STORED:
        raise DeltaError(
            f"dtype={dtype!r} cannot hold them. Pass float16, bfloat16 or float32, or none to keep all bits."
        )
    opened, factors = _checked(sources, scales)
    for source in opened:
        warn_of_bundled(source)
    header, disagreed = _common(opened)
    names = tuple(source.name for source in opened)
    if all(source.kind == "lora" for source in opened):
        path, rest_path = lora_targets(out, True, overwrite, make=not dry_run)
        joined = concatenated(opened, factors, stored)
        rest = _sum([as_delta(open_residual(source)) for source in opened], factors, stored)
        files = _lora_files(path, rest_path, joined, rest, header, progress)
        form, ranks = "lora", dict(sorted(Counter(joined.ranks).items()))
    else:
        path = check_file_name(path_of(out, "out", _ORDER))
        check_target(path, 0, overwrite=overwrite)
        total = _sum(_as_deltas(opened), factors, stored)
        dtypes = dtype_names(kind for _, kind in total.specs.values())
        own = {"format": "pt", "perflow_format": DELTA_FORMAT, "dtype": dtypes}
        files = [File(path, total.specs, _counted(total.stream(), len(total.specs), progress), {**header, **own})]
        form, ranks = "delta", {}
    sizes = [torch.Size(shape).numel() * kind.itemsize for file in files for shape, kind in file.specs.values()]
    residual_path = files[0].path if len(files) > 1 else None
    report = CombineReport(path, residual_path, form, names, factors, len(sizes), sum(sizes), ranks, disagreed)
    if not dry_run:
        if form == "lora":
            write_together(files, overwrite=overwrite, former=(rest_path,))
        else:
            write_safetensors(path, files[0].specs, files[0].tensors, files[0].metadata, overwrite=overwrite)
    return report


def _checked(sources: Sequence[Any], scales: Sequence[float] | None) -> tuple[list[WeightSource], tuple[float, ...]]:
    if isinstance(sources, str | os.PathLike | Mapping) or not isinstance(sources, Sequence) or not sources:
        raise DeltaError(f"sources is {in_words(sources)}, not a list of LoRAs or deltas. Pass e.g. {_ORDER}.")
    if scales is not None and (isinstance(scales, str) or not isinstance(scales, Iterable)):
        raise DeltaError(f"scales is {in_words(scales)}. Pass a list with one number for each source: {_ORDER}.")
    factors = tuple(
        strength_of(scale, ()).of("") for scale in (scales if scales is not None else [1.0] * len(sources))
    )
    if len(factors) != len(sources):
        raise DeltaError(
            f"{len(sources)} sources and {len(factors)} scales. Pass one scale for each, in the same order."
        )
    opened = [open_weights(source) for source in sources]
    for source in opened:
        if not len(source):
            raise DeltaError(f"{source.name} is empty: there is nothing to add.")
        if keys.is_original_format(source):
            raise DeltaError(f"{source.name} is a complete checkpoint. Make a delta with `compute_delta` first.")
    return opened, factors


def _common(sources: Sequence[WeightSource]) -> tuple[dict[str, str], tuple[str, ...]]:
    """What the headers agree on, and the keys on which they do not."""
    headers = [for_new_tensors(source.metadata, OWN_KEYS) for source in sources]
    every = dict.fromkeys(key for header in headers for key in header)
    values = {key: [header[key] for header in headers if key in header] for key in every}
    disagreed = tuple(key for key, found in values.items() if len(set(found)) > 1 and not key.startswith(_OF_TRAINING))
    kept = {
        key: found[0]
        for key, found in values.items()
        if len(set(found)) == 1 and (len(found) == len(headers) or not key.startswith(_OF_TRAINING))
    }
    return kept, disagreed


def _as_deltas(sources: Sequence[WeightSource]) -> list[WeightSource]:
    """All as deltas; LoRAs in the shapes that the others' weights have."""
    plain = [as_delta(source) for source in sources if source.kind != "lora"]
    shapes: dict[str, tuple[int, ...]] = {}
    for delta in plain:
        shapes |= {name: delta.shapes[key] for name, key in delta.canonical[0].items()}
    left = iter(plain)
    deltas = [as_delta(source, shapes) if source.kind == "lora" else next(left) for source in sources]
    known = shapes.keys() | {name for delta in plain for name in delta.metadata.get("identical", "").split()}
    stray = sorted({name for delta in deltas if delta.partial for name in delta.shapes} - known)
    if stray:
        raise DeltaError(
            f"{len(stray)} weights that a LoRA changes are in none of the deltas: {keys.grouped(stray)}. Combine what "
            "is for one base model."
        )
    return deltas


@dataclass(frozen=True)
class _Sum:
    """scale x delta of all deltas, by canonical name: `terms` says which keys of which deltas make a tensor."""

    terms: Mapping[str, list[tuple[WeightSource, str, float]]]
    specs: Mapping[str, Spec]

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, terms in self.terms.items():
            shape, kind = self.specs[name]
            source, key, scale = terms[0]
            if len(terms) == 1 and scale == 1 and source.dtypes[key] == kind:
                tensor = source[key].detach()
            else:
                exact = torch.promote_types(kind, torch.float32)
                total = torch.zeros(shape, dtype=exact)
                for source, key, scale in terms:
                    total.add_(source[key].detach().to("cpu", exact), alpha=scale)
                tensor = total.to(kind)
            check_finite(name, tensor)
            yield name, tensor


def _sum(deltas: Sequence[WeightSource], scales: Sequence[float], dtype: torch.dtype | None) -> _Sum:
    """Raises `DeltaError` for doubled names, complete weights, other shapes, tensors that are not floating point."""
    terms: dict[str, list[tuple[WeightSource, str, float]]] = {}
    for delta, scale in zip(deltas, scales, strict=True):
        names = canonical_names(delta)
        if not delta.partial:
            check_difference(delta, names)
        for name, key in names.items():
            terms.setdefault(name, []).append((delta, key, scale))
    misfits = [
        f"{name} ({', '.join(str(delta.shapes[key]) for delta, key, _ in found)})"
        for name, found in terms.items()
        if len({delta.shapes[key] for delta, key, _ in found}) > 1
    ]
    if misfits:
        raise DeltaError(
            f"{len(misfits)} weights have other shapes in other sources: {keys.grouped(misfits)}. Combine deltas of "
            "one base model."
        )
    wrong = [name for name, found in terms.items() if not all(d.dtypes[k].is_floating_point for d, k, _ in found)]
    if wrong:
        raise DeltaError(f"{len(wrong)} tensors are not floating point: {keys.grouped(wrong)}.")
    specs = {}
    for name in sorted(terms):
        stored = [delta.dtypes[key] for delta, key, _ in terms[name] if not delta.partial] or [torch.float32]
        specs[name] = (terms[name][0][0].shapes[terms[name][0][1]], dtype or reduce(wider, stored))
    return _Sum({name: terms[name] for name in specs}, specs)


def _lora_files(
    path: Path,
    rest_path: Path,
    joined: Joined,
    rest: _Sum,
    header: Mapping[str, str],
    progress: Callable[[int, int], None] | None,
) -> list[File]:
    """The residual first: a LoRA that names one is never without it."""
    files: list[File] = []
    total = len(joined.specs)
    own = {"format": "pt", "perflow_format": LORA_FORMAT, ADAPTER_METADATA: joined.config}
    if rest.specs:
        dtypes = dtype_names(kind for _, kind in rest.specs.values())
        rest_header = {**header, "format": "pt", "perflow_format": RESIDUAL_FORMAT, "dtype": dtypes}
        files.append(File(rest_path, rest.specs, rest.stream(), rest_header))
        own[RESIDUAL_KEY] = rest_path.name
    return [*files, File(path, joined.specs, _counted(joined.stream(), total, progress), {**header, **own})]


def _counted(
    tensors: Iterator[tuple[str, torch.Tensor]], total: int, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for done, item in enumerate(tensors, start=1):
        yield item
        if progress is not None:
            progress(done, total)
