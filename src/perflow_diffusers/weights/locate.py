"""From what a user names (path, folder, short name, Hub id) to safetensors files on this machine."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path, PurePosixPath

from perflow_diffusers.weights.errors import WeightSourceError
from perflow_diffusers.weights.published import PUBLISHED

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
#: Ends the name of the file that goes with a LoRA and holds what a LoRA cannot.
RESIDUAL_SUFFIX = ".residual.safetensors"


@dataclass(frozen=True)
class HubSpec:
    """Where weights live on the Hub, and what their header should have said (`metadata`, str -> str)."""

    repo_id: str
    revision: str | None = None
    variant: str | None = None
    subfolder: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


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
    if text in SHORT_NAMES:
        return not isinstance(SHORT_NAMES[text], HubSpec)
    return Path(text).suffix in (".safetensors", *PICKLES) or not _HUB_ID.fullmatch(text)


def locate(
    name: str | os.PathLike,
    *,
    revision: str | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Located:
    """Find the safetensors files of a local file or folder, a short name, or a Hub id, in this order.

    Raises `WeightSourceError` if there is nothing, nothing safe to read, or more than one answer.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.exists():
        return _local(path, subfolder, variant)
    if text in SHORT_NAMES:
        place = SHORT_NAMES[text]
        if not isinstance(place, HubSpec):
            return _short_local(text, place(), subfolder, variant)
        place = replace(
            place,
            revision=revision or place.revision,
            variant=variant or place.variant,
            subfolder=subfolder or place.subfolder,
        )
        return _from_hub(place, token, local_files_only)
    if is_local(text):
        raise WeightSourceError(
            f"No file, folder or known weights are called '{text}' (working folder: {Path.cwd()}). Pass a state dict, "
            "a .safetensors file, a folder, a Hub id ('owner/name') or a short name: "
            f"{', '.join(sorted(SHORT_NAMES))}."
        )
    return _from_hub(HubSpec(text, revision, variant, subfolder), token, local_files_only)


def _short_local(name: str, path: Path, subfolder: str | None, variant: str | None) -> Located:
    if not path.exists():
        raise WeightSourceError(
            f"'{name}' should come with the package, but {path} is missing. Reinstall perflow-diffusers."
        )
    return replace(_local(path, subfolder, variant), name=name)


def _local(path: Path, subfolder: str | None, variant: str | None) -> Located:
    if path.is_file():
        if path.suffix in PICKLES:
            raise WeightSourceError(pickle_refused(str(path)))
        return Located(str(path), (path,))
    folder = path / subfolder if subfolder else path
    if not folder.is_dir():
        raise WeightSourceError(f"{path} has no subfolder '{subfolder}'. It holds: {_listing(path)}.")
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    names += [f"{entry.parent.name}/{entry.name}" for entry in folder.glob("*/*") if entry.is_file()]
    return _gather(names, lambda file: folder / file, str(folder), variant)


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"


def pickle_refused(where: str) -> str:
    """The sentence that refuses a pickle and says how to convert it."""
    return (
        f"{where} is a pickle ({', '.join(PICKLES)}): loading one can run any code, so it is refused. Convert it "
        "once, where you trust its author: a single file with `safetensors.torch.save_file(torch.load(file, "
        "weights_only=True), 'new.safetensors')`, a diffusers folder with "
        "`UNet2DConditionModel.from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)`."
    )


def _gather(names: Iterable[str], fetch: Callable[[str], Path], where: str, variant: str | None) -> Located:
    """Choose the weights among relative `names` of a folder or repository, and `fetch` only these."""
    names = sorted(names)
    chosen = _choose(names, where, variant)
    if chosen.endswith(".safetensors"):
        for name in _companions(chosen, names):
            fetch(name)
        return Located(where, (fetch(chosen),))
    index = fetch(chosen)
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        weight_map = dict(content["weight_map"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightSourceError(f"{index} is not a sharded-weights index ({error}). Download it again.") from error
    shards = sorted(set(map(str, weight_map.values())))
    folder = PurePosixPath(chosen).parent
    paths = {shard: str(folder / shard) for shard in shards}
    bad = [shard for shard, path in paths.items() if "/" in shard or "\\" in shard or path not in names]
    if bad:
        raise WeightSourceError(f"{index} names shards that are not beside it: {', '.join(bad)}. Download them again.")
    files = {shard: fetch(path) for shard, path in paths.items()}
    metadata = {str(key): str(value) for key, value in (content.get("metadata") or {}).items() if key != "total_size"}
    key_files = {key: files[str(shard)] for key, shard in weight_map.items()}
    return Located(where, tuple(files.values()), metadata, key_files)


def _choose(names: list[str], where: str, variant: str | None) -> str:
    """The one weight file (or index of shards) that `names` offer; a pipeline's weights are in its `unet/`."""
    here = [name for name in names if "/" not in name]
    inside = [name.removeprefix("unet/") for name in names if name.startswith("unet/")]
    if inside and ("model_index.json" in here or not _weight_files(here)):
        return f"unet/{_choose(inside, f'{where}/unet', variant)}"
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
    """Files that are read beside a weight file: a LoRA's residual, PEFT's config."""
    residual = chosen.removesuffix(".safetensors") + RESIDUAL_SUFFIX
    config = str(PurePosixPath(chosen).with_name("adapter_config.json"))
    return [name for name in (residual, config) if name in names]


def _nothing_found(names: list[str], where: str) -> str:
    if any(name.endswith(PICKLES) for name in names if name.count("/") == 0):
        first = next(name for name in names if name.endswith(PICKLES) and "/" not in name)
        return pickle_refused(f"{where}/{first}")
    if any(name.startswith("transformer/") for name in names):
        return f"{where} is a pipeline with a transformer, not a UNet: PeRFlow deltas exist for UNets only."
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
    return (
        f"{where} holds no safetensors weights (it holds: {shown}). Pass the folder of a diffusers UNet, of a "
        "pipeline, or a .safetensors file."
    )


def _from_hub(spec: HubSpec, token: str | bool | None, local_files_only: bool) -> Located:
    """Download (or find in the cache) only the files that are needed of a Hub repository."""
    import huggingface_hub as hub

    folder = f"{spec.subfolder.strip('/')}/" if spec.subfolder else ""
    where = f"{spec.repo_id}/{folder}".rstrip("/")
    try:
        if local_files_only:
            raise ConnectionError("local_files_only=True")
        listing = hub.HfApi(token=token).list_repo_files(spec.repo_id, revision=spec.revision)
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as error:
        raise WeightSourceError(
            f"The Hub has no '{spec.repo_id}' (revision {spec.revision or 'main'}) for you. Check the spelling; "
            "private and gated repositories need `token=` or `hf auth login`."
        ) from error
    except Exception as error:
        located = _from_cache(spec, where, error)
    else:

        def fetch(name: str) -> Path:
            path = hub.hf_hub_download(spec.repo_id, folder + name, revision=spec.revision, token=token)
            return Path(path)

        names = [name.removeprefix(folder) for name in listing if name.startswith(folder)]
        located = _gather(names, fetch, where, spec.variant)
    return replace(located, metadata={**spec.metadata, **located.metadata})


def _from_cache(spec: HubSpec, where: str, reason: Exception) -> Located:
    """The files of a repository that was downloaded before; `reason` is why it cannot be listed now."""
    import huggingface_hub as hub

    try:
        folder = hub.snapshot_download(spec.repo_id, revision=spec.revision, local_files_only=True)
        return replace(_local(Path(folder), spec.subfolder, spec.variant), name=where)
    except (OSError, ValueError) as error:
        raise WeightSourceError(
            f"'{where}' is not on this machine as a file, a folder or in the Hub cache ({error}), and the Hub was not "
            f"asked or not reached ({reason}). Connect once to download it, or pass a local path."
        ) from reason
