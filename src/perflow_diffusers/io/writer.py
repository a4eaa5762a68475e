"""Streaming, atomic safetensors files: tensors come one by one, a file appears only when it is complete."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import torch

from perflow_diffusers.errors import WeightWriteError
from perflow_diffusers.io.atomic import put_together, staging, whole
from perflow_diffusers.io.documents import parsed
from perflow_diffusers.io.tensors import dtype_name
from perflow_diffusers.words.shown import shown

#: What a tensor will be, known before it exists: shape and dtype.
Spec = tuple[tuple[int, ...], torch.dtype]
Metadata = Mapping[str, str] | Callable[[], Mapping[str, str]]


@shown
@dataclass(frozen=True)
class File:
    """What `write_safetensors` writes, as one value."""

    path: Path
    specs: Mapping[str, Spec]
    tensors: Iterable[tuple[str, torch.Tensor]]
    metadata: Mapping[str, str]


INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"

_ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,15}")  # of a file: not the .5 of "model-v1.5"
_SPARE = 4096  # bytes kept free in the header for metadata that is known only at the end


def specs_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Spec]:
    """`{name: (shape, dtype)}` of tensors that exist already."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def write_safetensors(
    path: str | os.PathLike,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Metadata | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write one safetensors file; at no time is more than one of the tensors needed.

    `specs` says what will come, `tensors` yields each of these names exactly once, in any order. `metadata` (str ->
    str) goes into the header; a function is called when all tensors are written and may add up to 4 kB to what it
    returned at the start. The file is written under a temporary name in the same folder, synced, and renamed: if
    anything fails, what was at `path` before is intact and nothing is left over.

    Raises `WeightWriteError` (an OSError and a ValueError) if the folder is missing or read-only, the disk is too
    small, or the file exists and `overwrite` is False; ValueError if `tensors` and `specs` disagree.
    """
    target = check_file_name(Path(path))
    give_metadata = metadata if callable(metadata) else lambda: metadata or {}
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in specs.items()}
    offsets = _offsets(specs, sizes)
    header = _render(specs, offsets, give_metadata(), spare=_SPARE if callable(metadata) else 0)
    check_target(target, sum(sizes.values()) + len(header), overwrite=overwrite)
    with _written(target) as file:
        file.write(header)
        _write_tensors(file, len(header), specs, offsets, tensors)
        if callable(metadata):
            file.seek(0)
            file.write(_render(specs, offsets, give_metadata(), length=len(header)))
    return target


def write_together(files: Sequence[File], *, overwrite: bool = False, former: Sequence[Path] = ()) -> None:
    """Write safetensors files of one folder that belong together: all appear, or none, and old ones stay intact.

    `former`: of an older set that `overwrite` replaces; those that the new set lacks are deleted at the end.

    Errors as in `write_safetensors`.
    """
    folder = files[0].path.parent
    total = sum(torch.Size(shape).numel() * dtype.itemsize for file in files for shape, dtype in file.specs.values())
    for file in files:
        check_target(file.path, total, overwrite=overwrite)
    with _staged(folder) as staged:
        for file in files:
            write_safetensors(staged / file.path.name, file.specs, file.tensors, file.metadata)
        old = [path.name for path in former if path.parent == folder] if overwrite else []
        put_together(staged, folder, [file.path.name for file in files], old)


def write_folder(
    folder: str | os.PathLike,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Metadata | None = None,
    *,
    max_shard_size: int,
    overwrite: bool = False,
) -> Path:
    """Write shards of at most `max_shard_size` bytes and their index, named as in diffusers; returns the index.

    `tensors` must come in the order of `specs`. A tensor larger than `max_shard_size` gets a shard of its own. The
    metadata stands in the index. All is written under temporary names and renamed when it is complete, the index last:
    if anything fails, an older set in the folder is intact; if not, it is replaced whole. Errors as in
    `write_safetensors`.
    """
    folder = make_folder(check_folder_name(Path(folder)))
    shards = _shards(specs, max_shard_size)
    names = [
        f"diffusion_pytorch_model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))
    ]
    index = folder / INDEX_NAME
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs.values())
    check_target(index, total, overwrite=overwrite)
    for name in names:
        check_target(folder / name, 0, overwrite=overwrite)
    stream, weight_map = iter(tensors), {}
    with _staged(folder) as staged:  # shards of one set must not come to stand among those of an older one
        for name, shard in zip(names, shards, strict=True):
            write_safetensors(staged / name, shard, islice(stream, len(shard)), {"format": "pt"})
            weight_map.update(dict.fromkeys(shard, name))
        for extra, _ in stream:
            raise ValueError(f"Got {extra}, which was not announced.")
        final = metadata() if callable(metadata) else metadata or {}
        content = {"metadata": {"total_size": total, **final}, "weight_map": weight_map}
        write_text(staged / INDEX_NAME, json.dumps(content, indent=2))
        put_together(staged, folder, [*names, INDEX_NAME], named_shards(folder))
    return index


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it, if need be; raises `WeightWriteError` if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightWriteError(
            f"The folder {folder} cannot be made ({error.strerror or error}). Pass another place."
        ) from error
    return folder


def named_shards(folder: Path) -> set[str]:
    """Names of the shards that the index of sharded weights in a folder names; empty without a readable index."""
    index = folder / INDEX_NAME
    try:
        shards = set(parsed(index.read_bytes())["weight_map"].values()) if index.is_file() else set()
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {str(shard) for shard in shards if Path(str(shard)).name == shard and shard.endswith(".safetensors")}


def drop_shards(folder: Path) -> None:
    """Delete the index of sharded weights in a folder, if there is one, and the shards that it names."""
    shards = named_shards(folder)
    (folder / INDEX_NAME).unlink(missing_ok=True)
    for shard in shards:
        (folder / shard).unlink(missing_ok=True)


def check_file_name(target: Path) -> Path:
    """The name itself; raises `WeightWriteError` for a file of weights that no loader would take."""
    if target.suffix != ".safetensors" and not os.path.isdir(target):  # a folder is told of by `check_target`
        raise WeightWriteError(
            f"{target} does not end in .safetensors, the one kind of file that weights are written to. Pass "
            f"{target.with_name(f'{target.stem or target.name}.safetensors')}, for example."
        )
    return target


def check_folder_name(target: Path) -> Path:
    """The name itself; raises `WeightWriteError` for a new folder whose name looks like that of a file."""
    if _ENDING.fullmatch(target.suffix) and not os.path.isdir(target):
        raise WeightWriteError(
            f"{target} would be a folder of weights, but it ends like a file. Pass a name without {target.suffix}"
            + (", or with .safetensors." if target.suffix != ".safetensors" else ".")
        )
    return target


def check_target(target: Path, nbytes: int, *, overwrite: bool) -> None:
    """Raise `WeightWriteError` if `nbytes` cannot be written to `target`, before any work is done."""
    if os.path.isdir(target):
        raise WeightWriteError(
            f"{target} is a folder. Pass the name of a file in it, e.g. {target / 'delta.safetensors'}."
        )
    if os.path.exists(target) and not overwrite:
        raise WeightWriteError(f"{target} exists. Pass overwrite=True to replace it, or another name.")
    if not target.parent.is_dir():
        raise WeightWriteError(f"There is no folder {target.parent} to write {target.name} to. Create it first.")
    free = shutil.disk_usage(target.parent).free
    if nbytes > free:
        raise WeightWriteError(
            f"{target} needs {nbytes:,} bytes, but its disk has {free:,} left. Free some, or write elsewhere."
        )


def write_text(path: str | os.PathLike, text: str, *, overwrite: bool = False) -> Path:
    """Write a small UTF-8 file, complete or not at all; errors as in `write_safetensors`."""
    target = Path(path)
    content = text.encode()
    check_target(target, len(content), overwrite=overwrite)
    with _written(target) as file:
        file.write(content)
    return target


@contextmanager
def _written(target: Path) -> Iterator[BinaryIO]:
    """An open file that is `target` once it is complete and on the disk, with errors in our words."""
    try:
        with whole(target, synced=True) as temporary, temporary.open("xb") as file:
            yield file
    except OSError as error:
        if isinstance(error, WeightWriteError):
            raise
        raise WeightWriteError(
            f"{target} could not be written ({error.strerror or error}); what was there before is unchanged. Free "
            "some space, or write to a folder where you may."
        ) from error


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder` that is gone afterwards, with errors in our words."""
    try:
        with staging(folder) as inner:
            try:
                yield inner
            except WeightWriteError as error:  # told of where the files would have been in the end
                raise WeightWriteError(str(error).replace(f"{inner.name}{os.sep}", "")) from error
    except OSError as error:
        if isinstance(error, WeightWriteError):
            raise
        raise WeightWriteError(
            f"{folder} cannot be written to ({error.strerror or error}). Write to a folder where you may."
        ) from error


def _offsets(specs: Mapping[str, Spec], sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Byte ranges behind the header, widest types first, so that every tensor stays aligned."""
    offsets, position = {}, 0
    for name in sorted(specs, key=lambda name: -specs[name][1].itemsize):
        offsets[name] = (position, position + sizes[name])
        position += sizes[name]
    return offsets


def _render(
    specs: Mapping[str, Spec],
    offsets: Mapping[str, tuple[int, int]],
    metadata: Mapping[str, str],
    *,
    spare: int = 0,
    length: int | None = None,
) -> bytes:
    """Length and JSON of a header, padded with blanks to a multiple of 8 (or to `length` bytes in all)."""
    wrong = [key for key, value in metadata.items() if not (isinstance(key, str) and isinstance(value, str))]
    if wrong:
        raise ValueError(f"Header metadata must be strings, but {wrong[0]!r} is not. Use str() or json.dumps().")
    content: dict = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, (start, end) in offsets.items():
        shape, dtype = specs[name]
        content[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    wanted = length - 8 if length is not None else -(-(len(text) + spare) // 8) * 8
    if len(text) > wanted:
        raise ValueError(f"Metadata grew by {len(text) - wanted} bytes more than the header has room for.")
    return wanted.to_bytes(8, "little") + text.ljust(wanted)


def _write_tensors(
    file: BinaryIO,
    start: int,
    specs: Mapping[str, Spec],
    offsets: Mapping[str, tuple[int, int]],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> None:
    left = set(specs)
    for name, tensor in tensors:
        if name not in left or (tuple(tensor.shape), tensor.dtype) != specs[name]:
            given = f"{name} {tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"Got {given}, expected {specs.get(name, 'no such tensor')}, each name once.")
        left.remove(name)
        if tensor.numel():
            file.seek(start + offsets[name][0])
            file.write(tensor_bytes(tensor))
    if left:
        raise ValueError(f"{len(left)} announced tensors never came, e.g. {min(left)}.")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; no copy if it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def _shards(specs: Mapping[str, Spec], limit: int) -> list[dict[str, Spec]]:
    """Split in order; each part at most `limit` bytes, at least one tensor."""
    if limit < 1:
        raise ValueError(f"max_shard_size={limit} bytes is too small. Pass a positive number of bytes.")
    shards: list[dict[str, Spec]] = [{}]
    used = 0
    for name, (shape, dtype) in specs.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = (shape, dtype)
        used += size
    return shards
