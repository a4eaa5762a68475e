"""From what a user names (folder, file, short name, Hub id) to checked settings and the files of the weights."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from perflow_diffusers.errors import ArtifactError, Unreachable
from perflow_diffusers.families import ANY_COMPONENTS
from perflow_diffusers.families.published import Published, published
from perflow_diffusers.hub.said import Said, checked, from_metadata, from_scheduler
from perflow_diffusers.io.documents import read_json
from perflow_diffusers.io.names import Where, pasted
from perflow_diffusers.io.repository import Repository, cached_folder, download, download_settings, list_repository
from perflow_diffusers.weights import WeightSource, open_weights
from perflow_diffusers.weights.read.locate import SHORT_NAMES, HubSpec
from perflow_diffusers.words.arguments import in_words
from perflow_diffusers.words.shown import shown

SETTINGS = "perflow.json"
SCHEDULER = "scheduler/scheduler_config.json"
CARD = "README.md"
INDEX = "model_index.json"
#: Where the weights of an artefact are, by form.
WEIGHTS = {"delta": "perflow.safetensors", "lora": "pytorch_lora_weights.safetensors"}
#: What a user may ask for: one form, the better one that is there, all of them, or the settings alone.
CHOICES = ("auto", "delta", "lora", "all", "none")

_PIPELINE = (
    "{} is a whole pipeline, not an accelerator to load into another one. Load it with "
    "`DiffusionPipeline.from_pretrained(...)`, then call `set_scheduler(pipe)`."
)
_NO_VARIANT = (
    "{} is an artefact whose settings name its files: it has no variant '{}'. Leave `variant` out, and pass "
    "`weights=`, `revision=` or `subfolder=` for other weights."
)
_DECISIVE = ("prediction_type", "process", "num_time_windows", "window_boundaries", "window_shift")


@shown
@dataclass(frozen=True)
class Found:
    """What an artefact says, its local `sources` by form (a file, or an opened source), and the weights among them,
    `opened`."""

    name: str
    said: Said = field(default_factory=Said)
    sources: Mapping[str, Path | WeightSource] = field(default_factory=dict)
    folder: Path | None = None
    opened: Mapping[str, WeightSource] = field(default_factory=dict, repr=False)


def find(source: Any, weights: str = "auto", where: Where | None = None) -> Found:
    """Settings and weights of an artefact; a local path wins over a short name, a short name over the Hub.

    Raises `ArtifactError` or `WeightSourceError` (both ValueErrors) for what cannot be found or trusted.
    """
    where = where or Where()
    if weights not in CHOICES:
        raise ArtifactError(f"weights={weights!r} is unknown. Pass one of {', '.join(CHOICES[:3])}.")
    parts = (getattr(source, name, None) for name in ANY_COMPONENTS)
    if isinstance(source, torch.nn.Module) or any(isinstance(part, torch.nn.Module) for part in parts):
        raise ArtifactError(
            f"{in_words(source)} is a model, where an accelerator belongs (a folder, file, short name or Hub id). The "
            "pipeline comes first, `load_perflow(pipe, source)`; an accelerator is made of two models by "
            "`compute_delta(base, tuned)`; `describe_weights` says what a model's weights are."
        )
    if not isinstance(source, str | os.PathLike):
        return _bare(open_weights(source), weights)
    text = os.fspath(source)
    if not text.strip():
        raise ArtifactError("The name of the artefact is empty. Pass a folder, a file, a short name or a Hub id.")
    path = Path(text).expanduser()
    if path.is_dir():
        return from_folder(path / where.prefix, weights, where.variant)
    if path.exists():
        return _bare(open_weights(path), weights)
    text, where = pasted(text, where)
    entry = published(text)
    if entry is not None and entry.form == "pipeline":
        raise ArtifactError(
            f"{entry.repo_id} is a whole pipeline with PeRFlow in its weights, not an accelerator to load into "
            f"another one. Load it with `DiffusionPipeline.from_pretrained({_arguments(entry)})`, then call "
            "`set_scheduler(pipe)`."
        )
    place = SHORT_NAMES.get(text)
    if entry is None and isinstance(place, HubSpec):
        return _from_hub(place.repo_id, weights, place.under(where))
    if entry is None and place is None and _is_repository(text):
        return _from_hub(text, weights, where)
    if entry is not None:
        text = entry.repo_id
        where = replace(where, variant=where.variant or entry.variant)
    return _bare(open_weights(text, **vars(where)), weights, entry)


def _arguments(entry: Published) -> str:
    """What to pass to `from_pretrained` for a published pipeline."""
    return f"'{entry.repo_id}'" + (f", variant='{entry.variant}'" if entry.variant else "")


def _is_repository(text: str) -> bool:
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith(".safetensors")


def _bare(source: WeightSource, wanted: str, entry: Published | None = None) -> Found:
    """Weights that say all about themselves in their header, or of which the table of published weights knows."""
    said = from_metadata({**(entry.metadata if entry else {}), **source.metadata}, source.name)
    form = "lora" if source.kind == "lora" else "delta"
    if wanted in ("delta", "lora") and wanted != form:
        raise ArtifactError(f"{source.name} is a {form}, and weights={wanted!r} was asked for. Pass weights='auto'.")
    given: Path | WeightSource = source.files[0] if len(source.files) == 1 and form == "lora" else source
    folder = source.files[0].parent if source.files else None
    return Found(source.name, said, {form: given}, folder, {form: source})


def from_folder(folder: Path, wanted: str = "auto", variant: str | None = None) -> Found:
    """Settings and weights of a local folder. Raises `ArtifactError` if they are missing or contradict each other."""
    folder = artifact_in(folder)
    names = [name for name in (SETTINGS, SCHEDULER) if (folder / name).is_file()]
    if (folder / INDEX).is_file() and SETTINGS not in names:
        raise ArtifactError(_PIPELINE.format(folder))
    if variant is not None and SETTINGS in names:
        raise ArtifactError(_NO_VARIANT.format(folder, variant))
    said = documents_of({name: folder / name for name in names})
    named = said.weights or {}
    if variant is not None:  # then the weights are chosen by it
        found = _bare(open_weights(folder, variant=variant), wanted, published(folder.resolve().name))
        return replace(found, said=_agreed(said, found.said, str(folder)))
    present = {form: folder / name for form, name in (named or WEIGHTS).items() if (folder / name).is_file()}
    if wanted == "none" and said.prediction_type is None:
        wanted = "auto"  # then only the header of the weights can tell
    if not named and not present and SETTINGS not in names and wanted != "none":
        found = _bare(open_weights(folder), wanted, published(folder.resolve().name))
        return replace(found, said=_agreed(said, found.said, str(folder)))
    chosen = choose({form: str(path) for form, path in present.items()}, wanted, str(folder))
    return _with_headers(str(folder), said, {form: present[form] for form in chosen}, folder)


def artifact_in(folder: Path) -> Path:
    """The folder itself, or the one in which training puts the artefact of what it wrote there."""
    inner = folder / "artifact"
    itself = any((folder / name).is_file() for name in (SETTINGS, INDEX))
    return inner if not itself and (inner / SETTINGS).is_file() else folder


def choose(available: Mapping[str, str], wanted: str, where: str) -> list[str]:
    """Which of the forms to take."""
    if wanted == "none":
        return []
    if wanted == "all":
        return [form for form in available if form != "residual"]
    order = ("delta", "lora") if wanted == "auto" else (wanted,)
    for form in order:
        if form in available:
            return [form]
    has = ", ".join(form for form in available if form in ("delta", "lora")) or "neither"
    raise ArtifactError(f"{where} has no {' or '.join(order)} (it has {has}). Pass weights='auto'.")


def documents_of(paths: Mapping[str, Path]) -> Said:
    """What `perflow.json` and the scheduler's configuration say together."""
    said = Said()
    if SETTINGS in paths:
        content = read_json(paths[SETTINGS])
        if "format_version" not in content or "prediction_type" not in content:
            raise ArtifactError(
                f"{paths[SETTINGS]} lacks format_version or prediction_type. Save the artefact again, or ask its "
                "author."
            )
        said = checked(content, str(paths[SETTINGS]))
    if SCHEDULER in paths:
        said = _agreed(said, from_scheduler(read_json(paths[SCHEDULER]), str(paths[SCHEDULER])), str(paths[SCHEDULER]))
    return said


def _agreed(said: Said, more: Said, where: str) -> Said:
    """Both, the first before the second; raises `ArtifactError` if they contradict each other where it matters."""
    for key in _DECISIVE:
        first, second = getattr(said, key), getattr(more, key)
        if first is not None and second is not None and first != second:
            raise ArtifactError(
                f"{where} says {key}={second!r}, and the rest of the artefact {first!r}. One of them is wrong: "
                "ask its author, or save the artefact again."
            )
    return said.over(more)


def _with_headers(name: str, said: Said, paths: dict[str, Path], folder: Path) -> Found:
    """Add what the headers of the weights say, and check that they agree."""
    opened = {form: open_weights(path) for form, path in paths.items() if form in WEIGHTS}
    for form, source in opened.items():
        if (source.kind == "lora") != (form == "lora"):
            raise ArtifactError(f"{source.name} should be a {form}, but is not (kind {source.kind!r}). Save it again.")
        said = _agreed(said, from_metadata(source.metadata, source.name), source.name)
    return Found(name, said, dict(paths), folder, opened)


def _from_hub(repo_id: str, wanted: str, where: Where) -> Found:
    try:
        repository = list_repository(repo_id, where)
    except Unreachable as error:
        folder = cached_folder(repo_id, where, error)
        return replace(from_folder(folder, wanted, where.variant), name=f"{repo_id}/{where.prefix}".rstrip("/"))
    if INDEX in repository.sizes and SETTINGS not in repository.sizes:
        raise ArtifactError(_PIPELINE.format(repository.name))
    known = any(name in repository.sizes for name in (SETTINGS, SCHEDULER, *WEIGHTS.values()))
    if where.variant is not None and SETTINGS in repository.sizes:
        raise ArtifactError(_NO_VARIANT.format(repository.name, where.variant))
    if where.variant is not None or not known:
        found = _bare(open_weights(repo_id, **vars(where)), wanted)
        said = documents_of(fetch_documents(repository)[0])
        return replace(found, said=_agreed(said, found.said, repository.name))
    paths, repository = fetch_documents(repository)
    said = documents_of(paths)
    named = said.weights or {k: name for k, name in WEIGHTS.items() if name in repository.sizes}
    if wanted == "none" and said.prediction_type is None:
        wanted = "auto"
    weights = {form: download(repository, named[form]) for form in choose(named, wanted, repository.name)}
    folder = next(iter([*weights.values(), *(path for name, path in paths.items() if "/" not in name)]), Path()).parent
    found = _with_headers(repository.name, said, weights, folder)
    residual = found.said.residual
    if residual is not None and "lora" in weights:
        download(repository, residual)
    return found


def fetch_documents(repository: Repository) -> tuple[dict[str, Path], Repository]:
    """The settings files of a repository, and the repository pinned to the commit that they are of."""
    paths: dict[str, Path] = {}
    for name in (SETTINGS, SCHEDULER):
        if name in repository.sizes:
            paths[name] = download_settings(repository, name)
            repository = repository.pinned(paths[name], name)
    return paths, repository
