"""From what a user names (folder, file, short name, Hub id) to checked settings and the files of the weights."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from perflow_diffusers.hub.documents import read_json
from perflow_diffusers.hub.errors import ArtifactError
from perflow_diffusers.hub.fetch import (
    Repository,
    Unreachable,
    cached_folder,
    check_reachable,
    check_token,
    download,
    list_repository,
)
from perflow_diffusers.hub.settings import checked, from_metadata, from_scheduler
from perflow_diffusers.weights import WeightSource, open_weights
from perflow_diffusers.weights.locate import SHORT_NAMES, HubSpec
from perflow_diffusers.weights.published import Published, published

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
_DECISIVE = ("prediction_type", "num_time_windows", "window_boundaries")


@dataclass(frozen=True)
class Found:
    """Checked `fields` of an artefact, and its local `sources` by form (a file, or an opened source)."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, Path | WeightSource] = field(default_factory=dict)
    folder: Path | None = None


def find(
    source: Any,
    weights: str = "auto",
    *,
    revision: str | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Found:
    """Settings and weights of an artefact; a local path wins over a short name, a short name over the Hub.

    Raises `ArtifactError` or `WeightSourceError` (both ValueErrors) for what cannot be found or trusted.
    """
    if weights not in CHOICES:
        raise ArtifactError(f"weights={weights!r} is unknown. Pass one of {', '.join(CHOICES[:3])}.")
    if not isinstance(source, str | os.PathLike):
        return _bare(open_weights(source), weights)
    check_token(token)
    text = os.fspath(source)
    if not text.strip():
        raise ArtifactError("The name of the artefact is empty. Pass a folder, a file, a short name or a Hub id.")
    path = Path(text).expanduser()
    if path.is_dir():
        folder = path / subfolder if subfolder else path
        return from_folder(folder, weights, variant)
    if path.exists():
        return _bare(open_weights(path), weights)
    entry = published(text)
    if entry is not None and entry.form == "pipeline":
        raise ArtifactError(
            f"{entry.repo_id} is a whole pipeline with PeRFlow in its weights, not an accelerator to load into "
            f"another one. Load it with `DiffusionPipeline.from_pretrained({_arguments(entry)})`, then call "
            "`set_scheduler(pipe)`."
        )
    options = {"revision": revision, "variant": variant, "token": token, "local_files_only": local_files_only}
    place = SHORT_NAMES.get(text)
    if entry is None and (isinstance(place, HubSpec) or (place is None and _is_repository(text))):
        repo_id = place.repo_id if isinstance(place, HubSpec) else text
        return _from_hub(repo_id, weights, revision, variant, token, local_files_only)
    if entry is not None:
        options["variant"] = variant or entry.variant
        text = entry.repo_id
        options["local_files_only"] = local_files_only or not _answers(text, revision, token)
    return _bare(open_weights(text, subfolder=subfolder, **options), weights, entry)  # type: ignore[arg-type]


def _arguments(entry: Published) -> str:
    """What to pass to `from_pretrained` for a published pipeline."""
    return f"'{entry.repo_id}'" + (f", variant='{entry.variant}'" if entry.variant else "")


def _answers(repo_id: str, revision: str | None, token: str | bool | None) -> bool:
    """Whether the Hub is there; without it, what is in the cache has to do."""
    try:
        check_reachable(repo_id, revision, token)
    except Unreachable:
        return False
    return True


def _is_repository(text: str) -> bool:
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith(".safetensors")


def _bare(source: WeightSource, wanted: str, entry: Published | None = None) -> Found:
    """Weights that say all about themselves in their header, or of which the table of published weights knows."""
    fields = from_metadata({**(entry.metadata if entry else {}), **source.metadata}, source.name)
    form = "lora" if source.kind == "lora" else "delta"
    if wanted in ("delta", "lora") and wanted != form:
        raise ArtifactError(f"{source.name} is a {form}, and weights={wanted!r} was asked for. Pass weights='auto'.")
    given: Path | WeightSource = source.files[0] if len(source.files) == 1 and form == "lora" else source
    return Found(source.name, fields, {form: given}, source.files[0].parent if source.files else None)


def from_folder(folder: Path, wanted: str = "auto", variant: str | None = None) -> Found:
    """Settings and weights of a local folder. Raises `ArtifactError` if they are missing or contradict each other."""
    names = [name for name in (SETTINGS, SCHEDULER) if (folder / name).is_file()]
    if (folder / INDEX).is_file() and SETTINGS not in names:
        raise ArtifactError(_PIPELINE.format(folder))
    said = documents_of({name: folder / name for name in names})
    named = said.pop("weights", {})
    present = {form: folder / name for form, name in (named or WEIGHTS).items() if (folder / name).is_file()}
    if wanted == "none" and "prediction_type" not in said:
        wanted = "auto"  # then only the header of the weights can tell
    if not named and not present and SETTINGS not in names and wanted != "none":
        found = _bare(open_weights(folder, variant=variant), wanted, published(folder.resolve().name))
        return replace(found, fields=_agreed(said, dict(found.fields), str(folder)))
    chosen = choose({form: str(path) for form, path in present.items()}, wanted, str(folder))
    return _with_headers(str(folder), said, {form: present[form] for form in chosen}, folder)


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


def documents_of(paths: Mapping[str, Path]) -> dict[str, Any]:
    """What `perflow.json` and the scheduler's configuration say together."""
    said: dict[str, Any] = {}
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


def _agreed(said: dict[str, Any], more: dict[str, Any], where: str) -> dict[str, Any]:
    """Both, the first before the second; raises `ArtifactError` if they contradict each other where it matters."""
    for key in _DECISIVE:
        if key in said and key in more and said[key] != more[key]:
            raise ArtifactError(
                f"{where} says {key}={more[key]!r}, and the rest of the artefact {said[key]!r}. One of them is wrong: "
                "ask its author, or save the artefact again."
            )
    return {**more, **said}


def _with_headers(name: str, said: dict[str, Any], paths: dict[str, Path], folder: Path) -> Found:
    """Add what the headers of the weights say, and check that they agree."""
    sources: dict[str, Path | WeightSource] = {}
    for form, path in paths.items():
        sources[form] = path
        if form in WEIGHTS:
            opened = open_weights(path)
            if (opened.kind == "lora") != (form == "lora"):
                raise ArtifactError(f"{path} should be a {form}, but is not (kind {opened.kind!r}). Save it again.")
            said = _agreed(said, from_metadata(opened.metadata, str(path)), str(path))
    return Found(name, said, sources, folder)


def _from_hub(
    repo_id: str, wanted: str, revision: str | None, variant: str | None, token: str | bool | None, local: bool
) -> Found:
    try:
        if local:
            raise Unreachable("local_files_only=True")
        repository = list_repository(repo_id, revision, token)
    except Unreachable as error:
        return replace(from_folder(cached_folder(repo_id, revision, error), wanted, variant), name=repo_id)
    if INDEX in repository.sizes and SETTINGS not in repository.sizes:
        raise ArtifactError(_PIPELINE.format(repo_id))
    if not any(name in repository.sizes for name in (SETTINGS, SCHEDULER, *WEIGHTS.values())):
        opened = open_weights(repo_id, revision=revision, variant=variant, token=token)
        return _bare(opened, wanted)
    paths, repository = fetch_documents(repository, token)
    said = documents_of(paths)
    named = said.pop("weights", None) or {k: name for k, name in WEIGHTS.items() if name in repository.sizes}
    if wanted == "none" and "prediction_type" not in said:
        wanted = "auto"
    weights = {form: download(repository, named[form], token) for form in choose(named, wanted, repo_id)}
    folder = next(iter([*weights.values(), *(path for name, path in paths.items() if "/" not in name)]), Path()).parent
    found = _with_headers(repo_id, said, weights, folder)
    residual = found.fields.get("residual")
    if residual is not None and "lora" in weights:
        download(repository, residual, token)
    return found


def fetch_documents(repository: Repository, token: str | bool | None) -> tuple[dict[str, Path], Repository]:
    """The settings files of a repository, and the repository pinned to the commit that they are of."""
    paths: dict[str, Path] = {}
    for name in (SETTINGS, SCHEDULER):
        if name in repository.sizes:
            paths[name] = download(repository, name, token)
            commit = paths[name].parents[name.count("/")].name
            repository = replace(repository, revision=commit)
    return paths, repository
