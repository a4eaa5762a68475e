"""The difference of two sets of weights as a file: `compute_delta(base, tuned, out)`, D = tuned - base in fp32."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from perflow_diffusers.errors import DeltaError
from perflow_diffusers.io.tensors import dtype_name
from perflow_diffusers.io.writer import Spec, tensor_bytes, write_folder, write_safetensors
from perflow_diffusers.weights.make.rounding import RoundingNoise, coarser, rounded, rounding_note
from perflow_diffusers.weights.read import keys
from perflow_diffusers.weights.read.complete import check_complete
from perflow_diffusers.weights.read.named import named_weights
from perflow_diffusers.weights.read.source import WeightSource, open_weights
from perflow_diffusers.words.arguments import dtype_of, in_words, path_of, whole_number
from perflow_diffusers.words.shown import shown

DELTA_FORMAT = "delta-1"

_PART = 1 << 22  # numbers that are subtracted at once


@shown
@dataclass(frozen=True, eq=False)
class Delta(WeightSource):
    """A delta that was computed; `identical` names the tensors that are the same in base and tuned weights."""

    identical: tuple[str, ...] = field(default=())
    relative_norm: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.name}: {len(self)} tensors, {self.nbytes / 2**20:.1f} MiB, {100 * self.relative_norm:.2f} % of "
            f"the base's norm, {len(self.identical)} tensors identical"
        )


def compute_delta(
    base: Any,
    tuned: Any,
    out: str | os.PathLike | None = None,
    dtype: torch.dtype | str | None = None,
    metadata: Mapping[str, Any] | None = None,
    *,
    drop_identical: bool = False,
    round_base: bool = False,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Delta:
    """tuned - base, tensor by tensor in fp32, stored as `dtype` (default: the wider one of the two).

    `base` and `tuned` are anything that `open_weights` takes, models and pipelines included, or single-file
    checkpoints in the original format (these through diffusers). `out` is a `.safetensors` file, or a folder if
    `max_shard_size` (bytes) is given; None keeps the delta in memory. Memory: a few tensors, whatever the model's
    size.

    The header says format, base, tuned, base_hash, dtype, and what `metadata` adds (prediction_type,
    num_time_windows, steps, guidance_scale, ...; values that are not strings are stored as JSON). `drop_identical`
    leaves out tensors that are equal in both, and names them in the header. `progress(done, total)` is called after
    each tensor.

    `round_base`: where the tuned weights are stored more coarsely than the base (fp16 and fp32), round the base to
    their dtype first, as if it had been given so. Else the difference holds the base's rounding, too; it warns if that
    is a tenth of it or more. The header then has `base_rounded` (F16, ...); `base_hash` is that of the base as given.

    Raises `DeltaError` if keys, shapes or numbers do not allow a difference, `WeightSourceError` for what cannot be
    read, `WeightWriteError` for an `out` that cannot be written (all ValueErrors); an old file there is then intact.
    """
    given, dtype = dtype, dtype_of(dtype)
    if given is not None and (dtype is None or not dtype.is_floating_point):
        raise DeltaError(
            f"dtype={given!r} cannot hold a difference. Pass torch.float32, torch.float16 or torch.bfloat16; "
            "`shrink_delta` makes int8 of the result, with scales."
        )
    order = 'compute_delta(base, tuned, "delta.safetensors")'
    target = None if out is None else path_of(out, "out", order)
    if max_shard_size is not None:
        whole_number(max_shard_size, "max_shard_size", 1, "It counts bytes: 5 * 10**9 for 5 GB.")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise DeltaError(f"metadata is {in_words(metadata)}. Pass a dict, such as {{'prediction_type': 'ddim_eps'}}.")
    first, names = named_weights(base)
    second, tuned_names = named_weights(tuned)
    _check_pair(first, names, second, tuned_names)
    check_complete(first, names, second, tuned_names)
    pairs = {name: (names[name], tuned_names[name]) for name in sorted(names)}
    steps = _steps(first, second, pairs) if round_base else {}
    dropped = _identical(first, second, pairs, steps) if drop_identical else ()
    specs: dict[str, Spec] = {}
    for name, (key, tuned_key) in pairs.items():
        stored = dtype or _wider(steps.get(name) or first.dtypes[key], second.dtypes[tuned_key])
        if name not in dropped:
            specs[name] = (first.shapes[key], stored)
    if not specs:
        raise DeltaError(f"{second.name} is identical to {first.name}: there is no difference to store.")
    header = _header(first, second, specs, dropped, metadata)
    if steps:
        header["base_rounded"] = rounding_note(steps.values())
    run = _Differences(first, second, pairs, specs, progress, steps)

    def final_header() -> dict[str, str]:
        return {**header, "base_hash": run.base_hash}

    if target is None:
        written, name = open_weights({name: tensor.clone() for name, tensor in run}), "a computed delta"
    else:
        if max_shard_size is not None:
            index = write_folder(
                target, specs, iter(run), final_header, max_shard_size=max_shard_size, overwrite=overwrite
            )
            path = index.parent
        else:
            path = write_safetensors(target, specs, iter(run), final_header, overwrite=overwrite)
        written, name = open_weights(path), str(path)
    if not round_base:
        run.noise.warn(first.name, second.name)
    return _delta(name, written, final_header(), run)


def check_delta(base: Any, tuned: Any, *, round_base: bool = False) -> str:
    """One sentence on what `compute_delta(base, tuned)` makes; reads a few tensors. Raises what it would raise.

    With `round_base` it says to what the base is rounded.
    """
    first, names = named_weights(base)
    second, tuned_names = named_weights(tuned)
    _check_pair(first, names, second, tuned_names)
    check_complete(first, names, second, tuned_names)
    numbers = sum(torch.Size(first.shapes[key]).numel() for key in names.values())
    pairs = {name: (key, tuned_names[name]) for name, key in names.items()}
    note = rounding_note(_steps(first, second, pairs).values()) if round_base else ""
    rounding = f" (rounded to {note})" if note else ""
    return f"{second.name} minus {first.name}{rounding}: {len(names)} tensors, {numbers / 1e6:.2f} M numbers"


def content_hash(source: Any) -> str:
    """`sha256:...` over canonical names, dtypes, shapes and bytes: the same for the same weights in any `source`."""
    weights, names = named_weights(source)
    digest = hashlib.sha256()
    for name in sorted(names):
        _update(digest, name, weights[names[name]])
    return f"sha256:{digest.hexdigest()}"


class _Differences:
    """Iterates over (name, difference) and gathers on the way what is known only at the end."""

    def __init__(
        self,
        base: WeightSource,
        tuned: WeightSource,
        pairs: Mapping[str, tuple[str, str]],
        specs: Mapping[str, Spec],
        progress: Callable[[int, int], None] | None,
        steps: Mapping[str, torch.dtype],
    ) -> None:
        self.base, self.tuned, self.pairs, self.specs, self.progress = base, tuned, pairs, specs, progress
        self.steps, self.noise = steps, RoundingNoise()
        self.identical: list[str] = []
        self.base_hash = f"sha256:{'0' * 64}"
        self.squares = [0.0, 0.0]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        digest = hashlib.sha256()
        for done, (name, (key, tuned_key)) in enumerate(self.pairs.items(), start=1):
            old = self.base[key]
            _update(digest, name, old)
            self.base_hash = f"sha256:{digest.hexdigest()}"
            if name not in self.specs:
                self.identical.append(name)
            else:
                yield name, self._difference(name, rounded(name, old, self.steps.get(name)), self.tuned[tuned_key])
            if self.progress is not None:
                self.progress(done, len(self.pairs))

    def _difference(self, name: str, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """new - old as it is stored; in parts, so that not more than the result is in memory at once."""
        exact = torch.promote_types(_wider(old.dtype, new.dtype), torch.float32)
        stored = torch.empty(old.shape, dtype=self.specs[name][1])
        # What rounding alone makes different is told of whole tensors.
        part = _PART if coarser(old.dtype, new.dtype) is None else max(1, old.numel())
        same = True
        flat = (tensor.detach().reshape(-1).split(part) for tensor in (old, new, stored))
        for before, after, out in zip(*flat, strict=True):
            wide = before.to("cpu", exact)
            difference = after.to("cpu", exact, copy=True).sub_(wide)
            out.copy_(difference)
            size, total = difference.norm().item(), wide.norm().item()
            check = out if out.dtype.itemsize > 1 else out.float()
            if check.numel() and not all(torch.isfinite(value) for value in torch.aminmax(check)):
                raise DeltaError(
                    f"{name} of {self.tuned.name} minus {self.base.name} has NaN or Inf in {stored.dtype}. Look at "
                    "that checkpoint, or store the delta in float32."
                )
            self.noise.add(before, after, difference, size**2)
            self.squares[0] += size**2
            self.squares[1] += total**2
            same = same and size == 0
        if same:
            self.identical.append(name)
        return stored


def _check_pair(
    base: WeightSource, names: Mapping[str, str], tuned: WeightSource, tuned_names: Mapping[str, str]
) -> None:
    """All that prevents a difference, in one error."""
    problems = []
    for what, lacking in (
        (f"only in {base.name}", [name for name in names if name not in tuned_names]),
        (f"only in {tuned.name}", [name for name in tuned_names if name not in names]),
    ):
        if lacking:
            problems.append(f"{what} ({len(lacking)}): {keys.grouped(lacking)}")
    shared = [name for name in names if name in tuned_names]
    misshapen = [
        f"{name} ({base.shapes[names[name]]} and {tuned.shapes[tuned_names[name]]})"
        for name in shared
        if base.shapes[names[name]] != tuned.shapes[tuned_names[name]]
    ]
    if misshapen:
        problems.append(f"of different shapes ({len(misshapen)}): {keys.grouped(misshapen)}")
    wrong = [name for name in shared if not base.dtypes[names[name]].is_floating_point]
    wrong += [name for name in shared if not tuned.dtypes[tuned_names[name]].is_floating_point]
    if wrong:
        problems.append(f"not floating point, quantised perhaps ({len(wrong)}): {keys.grouped(wrong)}")
    if problems:
        raise DeltaError(
            f"{tuned.name} minus {base.name} is not defined. Tensors {'; '.join(problems)}. Both must be weights of "
            "the same network: take the base that the tuned model was trained from."
        )


def _steps(base: WeightSource, tuned: WeightSource, pairs: Mapping[str, tuple[str, str]]) -> dict[str, torch.dtype]:
    """Of tensors that the base has in a finer dtype: the dtype of the tuned one."""
    found = {name: coarser(base.dtypes[key], tuned.dtypes[other]) for name, (key, other) in pairs.items()}
    return {name: dtype for name, dtype in found.items() if dtype is not None}


def _identical(
    base: WeightSource,
    tuned: WeightSource,
    pairs: Mapping[str, tuple[str, str]],
    steps: Mapping[str, torch.dtype],
) -> tuple[str, ...]:
    """Names of tensors that are equal, where `steps` says so after rounding the base; one more reading of both."""
    return tuple(
        name for name, (key, other) in pairs.items() if _same(rounded(name, base[key], steps.get(name)), tuned[other])
    )


def _same(old: torch.Tensor, new: torch.Tensor) -> bool:
    exact = _wider(old.dtype, new.dtype)
    return bool((old.detach().to("cpu", exact) == new.detach().to("cpu", exact)).all())


def _wider(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The dtype that holds both; fp8, which torch promotes to nothing, counts as fp16."""
    one, other = (torch.float16 if dtype.itemsize == 1 else dtype for dtype in (first, second))
    return torch.promote_types(one, other)


def _header(
    base: WeightSource,
    tuned: WeightSource,
    specs: Mapping[str, Spec],
    dropped: tuple[str, ...],
    extra: Mapping[str, Any] | None,
) -> dict[str, str]:
    dtypes = sorted({dtype_name(dtype) for _, dtype in specs.values()})
    header = {
        "format": "pt",
        "perflow_format": DELTA_FORMAT,
        # names, not paths; tensors in memory have none that says anything to others
        **{role: Path(source.name).name for role, source in (("base", base), ("tuned", tuned)) if source.files},
        "dtype": ",".join(dtypes),
        "base_hash": f"sha256:{'0' * 64}",
    }
    if dropped:
        header["identical"] = " ".join(dropped)
    own = {"format", "perflow_format", "dtype", "base_hash", "base_rounded", "identical"}
    reserved = own & set(extra or {})
    if reserved:
        raise DeltaError(
            f"metadata keys {', '.join(sorted(reserved))} are written by compute_delta itself. Rename them."
        )
    for key, value in (extra or {}).items():
        header[str(key)] = value if isinstance(value, str) else json.dumps(value)
    return header


def _delta(name: str, source: WeightSource, header: Mapping[str, str], run: _Differences) -> Delta:
    relative = (run.squares[0] / run.squares[1]) ** 0.5 if run.squares[1] else 0.0
    identical = tuple(run.identical)
    return Delta(name, source.shapes, source.dtypes, source.read, dict(header), source.files, identical, relative)


def _update(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
    digest.update(tensor_bytes(tensor))
