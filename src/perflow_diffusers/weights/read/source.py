"""Any kind of weights as one lazy mapping `{name: tensor}`: `open_weights(anything) -> WeightSource`."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Unpack

import torch

from perflow_diffusers.errors import WeightSourceError
from perflow_diffusers.families import ANY_COMPONENTS, sole_network
from perflow_diffusers.io.names import HubOptions, Where
from perflow_diffusers.io.tensors import open_tensors
from perflow_diffusers.weights.read import keys
from perflow_diffusers.weights.read.live import check_runs_on_its_weights, live_weights, unwrapped
from perflow_diffusers.weights.read.locate import SHORT_NAMES, HubSpec, Located, locate
from perflow_diffusers.weights.read.original_file import ema_names
from perflow_diffusers.words.arguments import in_words
from perflow_diffusers.words.shown import FixedDict, LongTuple, html_table, shorten, shown, size_in_words

__all__ = ["SHORT_NAMES", "HubSpec", "WeightSource", "open_weights"]

_ORDERED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # dtypes that have an `aminmax`


@shown
@dataclass(frozen=True, eq=False)
class WeightSource(Mapping[str, torch.Tensor]):
    """A read-only mapping `{name: tensor}` that reads a tensor when it is asked for it.

    `shapes` and `dtypes` know every tensor without reading it; `metadata` (str -> str) is what the file's header says;
    `kind` is "lora" (the names say so, whatever the header says), "delta" (the header says so) or "weights" (anything
    else: complete weights, or a delta without a header); `name` is where it came from, for people; `files` are the
    files it reads, none for tensors in memory. Tensors of files are memory-mapped on the CPU: do not write to them.
    At a prompt the mappings show their first entries; `dict(source.shapes)` shows all.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str], torch.Tensor] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        shorten(self)

    def __str__(self) -> str:
        dtypes = Counter(self.dtypes.values()).most_common()
        stored = ", ".join(str(dtype).removeprefix("torch.") for dtype, _ in dtypes)
        numbers = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        size = f"{len(self)} tensors, {numbers / 1e6:.2f} M numbers, {size_in_words(self.nbytes)}"
        return f"{self.name}: {self.kind}, {size}" + (f" in {stored}" if stored else "")

    def _repr_html_(self) -> str:
        rows = []
        for block, names in keys.by_block(self.shapes).items():
            numbers = sum(torch.Size(self.shapes[name]).numel() for name in names)
            kinds = sorted({str(self.dtypes[name]).removeprefix("torch.") for name in names})
            rows.append((block, len(names), f"{numbers:,}", ", ".join(kinds)))
        return html_table(str(self), ("block", "tensors", "numbers", "dtype"), rows)

    @cached_property
    def canonical(self) -> tuple[Mapping[str, str], tuple[tuple[str, str], ...]]:
        """`{canonical name: name here}`, and the pairs of names here that are one weight; made out once."""
        names, collisions = keys.canonical_map(self.shapes)
        return FixedDict(names), LongTuple(collisions)

    @cached_property
    def kind(self) -> str:
        """ "delta", "lora" or "weights"."""
        if keys.is_lora(self.shapes):
            return "weights" if keys.has_adapters(self.shapes) else "lora"
        return "delta" if self.metadata.get("perflow_format", "").startswith("delta") else "weights"

    @property
    def partial(self) -> bool:
        """Whether it is meant to cover only some weights of a model."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        sizes = (torch.Size(shape).numel() * self.dtypes[name].itemsize for name, shape in self.shapes.items())
        return sum(sizes)

    def extremes(self, name: str) -> tuple[float, float]:
        """Smallest and largest number of tensor `name`, or bounds of them; NaN or Inf if any number is not finite."""
        tensor = self[name].detach()
        if not tensor.numel():
            return 0.0, 0.0
        low, high = torch.aminmax(tensor if tensor.dtype in _ORDERED else tensor.float())
        return low.item(), high.item()

    def near(self, name: str, device: torch.device, base: torch.Tensor | None = None) -> torch.Tensor:
        """Tensor `name` for use on `device`: already there if it must be computed, else wherever it is.

        `base` is the weight to which it will be added, for changes that depend on it.
        """
        return self[name]

    def __deepcopy__(self, memo: dict) -> "WeightSource":
        return self  # nobody can write to it

    def __reduce__(self) -> tuple:
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
        return _unpickled, (type(self), plain)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes


def _unpickled(kind: type[WeightSource], values: dict[str, Any]) -> WeightSource:
    held: dict[str, Any] = {
        key: MappingProxyType(value) if isinstance(value, dict) else value for key, value in values.items()
    }
    return kind(**held)


def open_weights(anything: Any, *, extract_ema: bool = False, **where: Unpack[HubOptions]) -> WeightSource:
    """Open weights of any origin without reading their tensors.

    `anything` is a state dict, a `.safetensors` file, the folder of a diffusers model (sharded too) or of a pipeline
    (its `unet/`), a short name (a key of `SHORT_NAMES`), a Hub id, a model, a pipeline, or what was opened before. A
    local path wins over a short name, a short name over the Hub. `where`: `revision`, `variant`, `subfolder`,
    `token`, `local_files_only`, `cache_dir` and `force_download`, which mean what they mean in diffusers; state dicts
    and models ignore them. A model is read as it runs: adapters that are fused into its weights count, disabled ones
    do not. Functions that take weights without these options take the opened source:
    `compute_delta(open_weights("owner/name", revision="v2"), tuned)`.

    `extract_ema`: of a checkpoint in the original format, the running mean of the UNet's weights (`model_ema...`)
    instead of the weights as trained.

    Raises `WeightSourceError` (a ValueError) for what cannot be found, is damaged, or is a pickle, for a model
    with adapters that act without being fused, and if `extract_ema` is asked of what has no EMA.
    """
    source = _opened(anything, where)
    return _mean_of(source) if extract_ema else source


def _opened(anything: Any, where: HubOptions) -> WeightSource:
    if isinstance(anything, WeightSource):
        return anything
    options = Where(**where)
    if isinstance(anything, str | os.PathLike):
        return _from_files(locate(anything, options))
    if isinstance(anything, Mapping):
        return _from_tensors(anything, "a state dict")
    module = anything if isinstance(anything, torch.nn.Module) else sole_network(anything, WeightSourceError)
    if isinstance(module, torch.nn.Module):
        return _from_module(module)
    files = getattr(anything, "files", None)
    if isinstance(files, Mapping) and files and not isinstance(anything, type):
        raise WeightSourceError(
            f"Cannot read weights from {in_words(anything)} as a whole. Pass one of its files, such as "
            f"`artifact.files[{next(iter(files))!r}]`, or the artefact itself to `load_perflow`."
        )
    raise WeightSourceError(
        f"Cannot read weights from {in_words(anything)}. Pass a state dict, a .safetensors file, a folder, a "
        f"short name ({', '.join(sorted(SHORT_NAMES))}), a Hub id, a UNet or a pipeline that is loaded."
    )


def check_detached(source: WeightSource) -> None:
    """Raise `WeightSourceError` for a model that was saved with PEFT's adapters attached: neither plain nor a LoRA."""
    if keys.has_adapters(source):
        raise WeightSourceError(
            f"{source.name} is a model that was saved with adapters attached (it has `base_layer` in its names), "
            "which no loader reads as a plain one; the strength (alpha) of the adapters is not in it. Where it was "
            "made, call `pipe.fuse_lora()` (to keep what they do) and `pipe.unload_lora_weights()`, or the latter "
            "alone, and save again. docs/deltas.md shows how to take the plain weights out of this file."
        )


@shown
@dataclass(frozen=True)
class Renamed:
    """Reads a tensor under another name."""

    read: Callable[[str], torch.Tensor]
    names: Mapping[str, str]

    def __call__(self, name: str) -> torch.Tensor:
        return self.read(self.names[name])


def _mean_of(source: WeightSource) -> WeightSource:
    """The EMA weights of an original-format checkpoint, by the names of those as trained."""
    names = ema_names(source)
    if not names:
        raise WeightSourceError(
            f"{source.name} has no EMA weights (`model_ema.diffusion_model...`, as original-format checkpoints have "
            "them). Leave extract_ema off; repositories of diffusers have them as a folder of their own, if at all "
            '(subfolder="unet_ema").'
        )
    return replace(
        source,
        name=f"{source.name} (EMA)",
        shapes=MappingProxyType({name: source.shapes[key] for name, key in names.items()}),
        dtypes=MappingProxyType({name: source.dtypes[key] for name, key in names.items()}),
        read=Renamed(source.read, names),
    )


def _from_module(module: torch.nn.Module) -> WeightSource:
    """A live model, under canonical names, without the tensors of its adapters, which must not act."""
    check_runs_on_its_weights(module)
    inner = unwrapped(module)
    weights, collisions = live_weights(inner)
    kind = type(inner).__name__
    if collisions:
        raise WeightSourceError(f"{kind} has two tensors for one name: {collisions[0]}.")
    offloaded = [name for name, weight in weights.items() if isinstance(weight, torch.Tensor) and weight.is_meta]
    if offloaded:
        raise WeightSourceError(
            f"{len(offloaded)} weights of the given {kind} are offloaded (meta tensors), e.g. "
            f"{offloaded[0]}. Pass it before offloading, or after `pipe.remove_all_hooks()`."
        )
    return _from_tensors(weights, kind)


def _from_tensors(tensors: Mapping[Any, Any], name: str) -> WeightSource:
    nested = [key for key in ("state_dict", "model", *ANY_COMPONENTS) if isinstance(tensors.get(key), Mapping)]
    if nested:
        raise WeightSourceError(
            f"The given dict is nested: the weights seem to be under '{nested[0]}'. Pass that part."
        )
    wrong = [key for key, value in tensors.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    if wrong:
        value = type(tensors[wrong[0]]).__name__
        raise WeightSourceError(f"A state dict maps names to tensors, but {wrong[0]!r} of the given one is a {value}.")
    held = {key: value.detach() for key, value in tensors.items()}
    shapes = {key: tuple(value.shape) for key, value in held.items()}
    dtypes = {key: value.dtype for key, value in held.items()}
    return WeightSource(name, MappingProxyType(shapes), MappingProxyType(dtypes), held.__getitem__)


def _from_file(path: Path) -> WeightSource:
    file = open_tensors(path)
    return WeightSource(str(path), file.shapes, file.dtypes, file.read, file.metadata, (path,))


def _from_files(located: Located) -> WeightSource:
    """One source of all files; with an index of shards, exactly the tensors that it names."""
    parts = {path: _from_file(path) for path in located.files}
    home = {name: part for part in parts.values() for name in part}
    if located.key_files is not None:
        absent = [name for name, path in located.key_files.items() if name not in parts[path]]
        if absent:
            raise WeightSourceError(
                f"The shards of {located.name} lack tensors that the index names: {keys.grouped(absent)}. Download "
                "them again."
            )
        home = {name: parts[path] for name, path in located.key_files.items()}
    metadata = dict(located.metadata)
    for part in parts.values():
        metadata.update(part.metadata)
    return replace(
        next(iter(parts.values())),
        name=located.name,
        shapes=MappingProxyType({name: part.shapes[name] for name, part in home.items()}),
        dtypes=MappingProxyType({name: part.dtypes[name] for name, part in home.items()}),
        read=_Shards(home),
        metadata=MappingProxyType(metadata),
        files=located.files,
    )


@dataclass(frozen=True)
class _Shards:
    """Reads a tensor from the file that it is in."""

    home: Mapping[str, WeightSource]

    def __call__(self, name: str) -> torch.Tensor:
        return self.home[name].read(name)
