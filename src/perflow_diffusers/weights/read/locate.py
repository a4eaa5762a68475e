"""From what a user names (path, folder, short name, Hub id) to safetensors files on this machine."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path, PurePosixPath

from perflow_diffusers.errors import Unreachable, WeightSourceError
from perflow_diffusers.families import ANY_COMPONENTS, several
from perflow_diffusers.families.published import PUBLISHED
from perflow_diffusers.io.documents import read_object
from perflow_diffusers.io.names import Where, pasted
from perflow_diffusers.io.repository import cached_folder, download, list_repository
from perflow_diffusers.io.tensors import PICKLES, pickle_refused
from perflow_diffusers.words.arguments import did_you_mean
from perflow_diffusers.words.shown import shown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
#: Ends the name of the file that goes with a LoRA and holds what a LoRA cannot.
RESIDUAL_SUFFIX = ".residual.safetensors"


@shown
@dataclass(frozen=True)
class HubSpec:
    """Where weights live on the Hub, and what their header should have said (`metadata`, str -> str)."""

    repo_id: str
    revision: str | None = None
    variant: str | None = None
    subfolder: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def under(self, where: Where) -> Where:
        """The options of a user, with what this place says where they say nothing."""
        said = {key: getattr(where, key) or getattr(self, key) for key in ("revision", "variant", "subfolder")}
        return replace(where, **said)


@shown
@dataclass(frozen=True)
class Located:
    """Safetensors files on this machine, and metadata that is known from elsewhere than their headers.

    `key_files` maps a tensor name to its file for sharded weights, else it is None.
    """

    name: str
    files: tuple[Path, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    key_files: Mapping[str, Path] | None = None


def _miniature(name: str) -> Path:
    """Weights that are packaged with the miniature pipeline."""
    return Path(str(resources.files("perflow_diffusers"))) / "miniature" / "assets" / name


#: Short name -> where it is: a Hub repository, or a function that gives a local file or folder.
SHORT_NAMES: dict[str, HubSpec | Callable[[], Path]] = {
    "miniature": partial(_miniature, "delta/perflow.safetensors"),
    "miniature-flow": partial(_miniature, "flow-delta/perflow.safetensors"),
    "miniature-lora": partial(_miniature, "lora/pytorch_lora_weights.safetensors"),
    **{
        entry.short_name: HubSpec(entry.repo_id, variant=entry.variant, metadata=entry.training)
        for entry in PUBLISHED
        if entry.form == "delta"
    },
}


def is_local(name: str | os.PathLike) -> bool:
    """Whether `name` is a path here, comes with this package, or could not be on the Hub either."""
    text = os.fspath(name)
    if Path(text).expanduser().exists():
        return True
    text, _ = pasted(text, Where())
    if text in SHORT_NAMES:
        return not isinstance(SHORT_NAMES[text], HubSpec)
    return Path(text).suffix in (".safetensors", *PICKLES) or not _HUB_ID.fullmatch(text)


def locate(name: str | os.PathLike, where: Where | None = None) -> Located:
    """Find the safetensors files of a local file or folder, a short name, or a Hub id, in this order.

    Raises `WeightSourceError` if there is nothing, nothing safe to read, or more than one answer.
    """
    where = where or Where()
    text = os.fspath(name)
    if not text.strip():
        raise WeightSourceError("The name of the weights is empty. Pass a file, a folder, a short name or a Hub id.")
    path = Path(text).expanduser()
    if path.exists():
        return _local(path, where)
    text, where = pasted(text, where)
    if text in SHORT_NAMES:
        place = SHORT_NAMES[text]
        if not isinstance(place, HubSpec):
            return _short_local(text, place(), where)
        located = _from_hub(place.repo_id, place.under(where))
        return replace(located, metadata={**place.metadata, **located.metadata})
    if is_local(text):
        raise WeightSourceError(
            f"No file, folder or known weights are called '{text}' (working folder: {Path.cwd()}). "
            f"{did_you_mean(text, SHORT_NAMES)}Pass a state dict, a .safetensors file, a folder, a Hub id "
            "('owner/name') or a short name: "
            f"{', '.join(sorted(SHORT_NAMES))}."
        )
    return _from_hub(text, where)


def _short_local(name: str, path: Path, where: Where) -> Located:
    if not path.exists():
        raise WeightSourceError(
            f"'{name}' should come with the package, but {path} is missing. Reinstall perflow-diffusers."
        )
    return replace(_local(path, where), name=name)


def _local(path: Path, where: Where) -> Located:
    if path.is_file():
        if path.suffix in PICKLES:
            raise WeightSourceError(pickle_refused(str(path)))
        return Located(str(path), (path,))
    folder = path / where.prefix
    if not folder.is_dir():
        raise WeightSourceError(f"{path} has no subfolder '{where.subfolder}'. It holds: {_listing(path)}.")
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    names += [f"{entry.parent.name}/{entry.name}" for entry in folder.glob("*/*") if entry.is_file()]
    return _gather(names, lambda file: folder / file, str(folder), where.variant)


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"


def _gather(names: Iterable[str], fetch: Callable[[str], Path], where: str, variant: str | None) -> Located:
    """Choose the weights among relative `names` of a folder or repository, and `fetch` only these."""
    names = sorted(names)
    chosen = _choose(names, where, variant)
    if chosen.endswith(".safetensors"):
        for name in _companions(chosen, names):
            fetch(name)
        return Located(where, (fetch(chosen),))
    for name in _companions(chosen, names):
        fetch(name)
    index = fetch(chosen)
    content = read_object(index, "a sharded-weights index")
    weight_map, said = content.get("weight_map"), content.get("metadata")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise WeightSourceError(
            f"{index} is not a sharded-weights index (`weight_map` should give a file for every tensor). Download it "
            "again."
        )
    shards = sorted(set(weight_map.values()))
    folder = PurePosixPath(chosen).parent
    paths = {shard: str(folder / shard) for shard in shards}
    bad = [shard for shard, path in paths.items() if "/" in shard or "\\" in shard or path not in names]
    if bad:
        raise WeightSourceError(
            f"{index} names shards that are not beside it: {', '.join(bad)[:300]}. Download them again."
        )
    if not shards:
        raise WeightSourceError(f"{index} names no tensor at all. Download it again.")
    files = {shard: fetch(path) for shard, path in paths.items()}
    said = said if isinstance(said, dict) else {}
    metadata = {str(key): str(value) for key, value in said.items() if key != "total_size"}
    key_files = {key: files[shard] for key, shard in weight_map.items()}
    return Located(where, tuple(files.values()), metadata, key_files)


def _choose(names: list[str], where: str, variant: str | None) -> str:
    """The one weight file (or index of shards) that `names` offer; a pipeline's are in a component's folder."""
    here = [name for name in names if "/" not in name]
    homes = [f"{part}/" for part in ANY_COMPONENTS if any(name.startswith(f"{part}/") for name in names)]
    if homes and ("model_index.json" in here or not _weight_files(here)):
        if len(homes) > 1:
            raise WeightSourceError(several(where, homes))
        home = homes[0]
        inside = [name.removeprefix(home) for name in names if name.startswith(home)]
        return home + _choose(inside, f"{where}/{home}".rstrip("/"), variant)
    found = _weight_files(here)
    if not found:
        raise WeightSourceError(_nothing_found(names, where))
    if variant is not None:
        matching = [name for name in found if f".{variant}." in name]
        hint = f"of variant '{variant}'"
    else:
        plain = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
        matching = [name for name in found if name in plain] or found
        hint = "without a variant"
    if len(matching) == 2 and any(name.endswith(".json") for name in matching):
        matching = [name for name in matching if name.endswith(".json")]  # as diffusers prefers
    if len(matching) != 1:
        raise WeightSourceError(
            f"{where} has {len(matching) or 'no'} weights {hint}; it offers {', '.join(found)}. Pass the file itself, "
            "or `variant=` (the part of the name before .safetensors)."
        )
    return matching[0]


def _weight_files(names: list[str]) -> list[str]:
    """Whole safetensors files and indices of sharded ones."""
    whole = [name for name in names if name.endswith(".safetensors") and not _SHARD.search(name)]
    whole = [name for name in whole if not name.endswith(RESIDUAL_SUFFIX)] or whole
    return whole + [name for name in names if ".safetensors.index." in name and name.endswith(".json")]


def _companions(chosen: str, names: list[str]) -> list[str]:
    """Files that are read beside a weight file: a LoRA's residual, PEFT's config, a model's."""
    residual = chosen.removesuffix(".safetensors") + RESIDUAL_SUFFIX
    configs = [str(PurePosixPath(chosen).with_name(name)) for name in ("adapter_config.json", "config.json")]
    return [name for name in (residual, *configs) if name in names]


def _nothing_found(names: list[str], where: str) -> str:
    if any(name.endswith(PICKLES) for name in names if name.count("/") == 0):
        first = next(name for name in names if name.endswith(PICKLES) and "/" not in name)
        return pickle_refused(f"{where}/{first}")
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
    return (
        f"{where} holds no safetensors weights (it holds: {shown}). Pass the folder of a diffusers UNet or "
        "transformer, of a pipeline, or a .safetensors file."
    )


def _from_hub(repo_id: str, where: Where) -> Located:
    """Download (or find in the cache) only the files that are needed of a Hub repository."""
    try:
        repository = list_repository(repo_id, where)
    except Unreachable as error:
        located = _local(cached_folder(repo_id, where, error), replace(where, subfolder=None))
        return replace(located, name=f"{repo_id}/{where.prefix}".rstrip("/"))

    def fetch(name: str) -> Path:
        nonlocal repository
        path = download(repository, name)
        repository = repository.pinned(path, name)
        return path

    return _gather(list(repository.sizes), fetch, repository.name, where.variant)
