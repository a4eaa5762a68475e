"""Files of tensors: the format's dtype names, and one file opened once, its tensors read when they are asked for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from perflow_diffusers.errors import WeightSourceError
from perflow_diffusers.io.documents import parsed
from perflow_diffusers.words.shown import shown

#: Endings of files that may be pickles.
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
#: torch dtype -> its name in a safetensors header.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.complex64: "C64",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_MAX_HEADER = 100_000_000  # bytes, as the format says


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype in a safetensors header; raises `WeightSourceError` for one that the format cannot hold."""
    if dtype not in DTYPE_NAMES:
        raise WeightSourceError(f"safetensors files cannot hold {dtype}; convert to one of {', '.join(DTYPES)}.")
    return DTYPE_NAMES[dtype]


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """The names of all these dtypes as a header says them: "F16,F32"."""
    return ",".join(sorted({dtype_name(dtype) for dtype in dtypes}))


@shown
@dataclass(frozen=True)
class TensorFile:
    """One safetensors file, memory-mapped on the CPU: what its header says, and `read(name)`."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    metadata: Mapping[str, str]
    read: "_Reader"


def open_tensors(path: Path) -> TensorFile:
    """Open a file; the safetensors library checks its header and its size.

    Raises `WeightSourceError` for what is damaged, truncated, a pickle, a pointer of Git LFS, or of unknown dtypes.
    """
    reader = _Reader(path)
    handle = reader.open()
    slices = {name: handle.get_slice(name) for name in getattr(handle, "offset_keys", handle.keys)()}
    types = {name: str(part.get_dtype()) for name, part in slices.items()}
    unknown = sorted(set(types.values()) - set(DTYPES))
    if unknown:
        raise WeightSourceError(f"{path} holds tensors of type {', '.join(unknown)}, which this version cannot read.")
    return TensorFile(
        path,
        MappingProxyType({name: tuple(part.get_shape()) for name, part in slices.items()}),
        MappingProxyType({name: DTYPES[kind] for name, kind in types.items()}),
        MappingProxyType(handle.metadata() or {}),
        reader,
    )


def pickle_refused(where: str) -> str:
    """The sentence that refuses a pickle and says how to convert it."""
    return (
        f"{where} is a pickle ({', '.join(PICKLES)}): loading one can run any code, so it is refused. Convert it "
        "once, where you trust its author: a single file with `safetensors.torch.save_file(torch.load(file, "
        "weights_only=True), 'new.safetensors')`, a diffusers folder with "
        "`UNet2DConditionModel.from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)`."
    )


class _Reader:
    """Reads tensors of one file, which stays open; a pickle of it opens the file again when it is asked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: Any = None

    def open(self) -> Any:
        """The open file, or an error that says what is wrong with it."""
        if self._handle is None:
            try:
                self._handle = safe_open(self._path, framework="pt", device="cpu")
            except (SafetensorError, OSError, ValueError) as error:
                raise _unreadable(self._path, error) from error
        return self._handle

    def __call__(self, name: str) -> torch.Tensor:
        try:
            return self.open().get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise _damaged(self._path, f"{name}: {error}") from error

    def __reduce__(self) -> tuple:
        return _Reader, (self._path,)


def _unreadable(path: Path, error: Exception) -> WeightSourceError:
    """What a file is instead of an intact safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(length) if 0 < length <= min(size - 8, _MAX_HEADER) else b""
    except OSError as problem:
        return WeightSourceError(f"{path} cannot be read ({problem.strerror}). Check its permissions.")
    try:
        header = parsed(text)
        expected = (
            8
            + length
            + max(
                (int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"), default=0
            )
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return _no_header(path, start)
    if expected != size:
        what = "truncated" if expected > size else "longer than its header says"
        return _damaged(path, f"it is {what}: {size:,} bytes instead of {expected:,}")
    return _damaged(path, str(error))


def _no_header(path: Path, start: bytes) -> WeightSourceError:
    """What a file is that starts like this and has no header."""
    if start.startswith((b"PK", b"\x80")):
        return WeightSourceError(pickle_refused(f"{path}, whatever its name says,"))
    if start == b"version ":
        return WeightSourceError(f"{path} is only a pointer to a file in Git LFS. Run `git lfs pull`, or download it.")
    return _damaged(path, "no readable header")


def _damaged(path: Path, what: str) -> WeightSourceError:
    return WeightSourceError(f"{path} is not an intact safetensors file ({what}). Download or write it again.")
