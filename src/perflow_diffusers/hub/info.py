"""What an artefact is, without downloading its weights (`describe`), and a copy of it (`pull`)."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub as hub

from perflow_diffusers.hub.artifact import PeRFlowArtifact
from perflow_diffusers.hub.documents import check_free, copy_file, inside, plain_name, read_json
from perflow_diffusers.hub.errors import ArtifactError
from perflow_diffusers.hub.fetch import (
    Repository,
    Unreachable,
    cached_folder,
    download,
    explained,
    list_repository,
)
from perflow_diffusers.hub.find import (
    CARD,
    INDEX,
    SCHEDULER,
    SETTINGS,
    WEIGHTS,
    Found,
    documents_of,
    fetch_documents,
    find,
)
from perflow_diffusers.hub.recognise import PIPELINE_SETTINGS, in_configuration
from perflow_diffusers.hub.settings import from_metadata, from_scheduler
from perflow_diffusers.weights import WeightsInfo, describe_weights
from perflow_diffusers.weights.locate import SHORT_NAMES
from perflow_diffusers.weights.published import Published, published

_MAX_CARD_BYTES = 1 << 20
_UNET = re.compile(r"unet/[^/]+\.safetensors")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class ArtifactInfo:
    """What an artefact is: its settings (None for weights that say nothing), sizes in bytes by file, licence.

    `weights`: what each local file of weights holds, by name; `note`: a line for people.
    """

    name: str
    artifact: PeRFlowArtifact | None
    sizes: Mapping[str, int]
    licence: str | None = None
    note: str = ""
    weights: Mapping[str, WeightsInfo] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON types: `settings` as in `perflow.json` but for the sample of the base; what is in
        the local files under `weights`, and of a single one beside the rest, too."""
        settings = None if self.artifact is None else self.artifact.settings
        (settings or {}).pop("base_sample", None)
        said = {"name": self.name, "licence": self.licence, "settings": settings, "sizes": dict(self.sizes)}
        weights = {name: info.to_dict() for name, info in self.weights.items()}
        own = {**next(iter(weights.values()))} if len(weights) == 1 else {}
        own_settings = own.pop("settings", None)
        return {**own, **said, "settings": settings or own_settings, **({"weights": weights} if weights else {})}

    def __str__(self) -> str:
        lines = [self.name, *([self.note] if self.note else [])]
        said = self.artifact
        if said is None and len(self.weights) == 1:
            lines += str(next(iter(self.weights.values()))).splitlines()[1:]
        elif said is None:
            lines.append("says nothing about how its weights were trained")
        else:
            windows = f"{said.num_time_windows}" + (
                f", boundaries {list(said.window_boundaries)}" if said.window_boundaries else ""
            )
            steps = " or ".join(map(str, said.recommended_steps or (said.steps,)))
            rows = {
                "prediction type": said.prediction_type,
                "time windows": windows,
                "recommended steps": steps,
                "recommended guidance": said.guidance_scale,
                "guidance in training": said.solve_guidance,
                "base": said.base_model,
                "base hash": said.base_hash,
                "base predicts": said.base_prediction_type,
                "network": ", ".join(f"{key} {value}" for key, value in said.network.items()) or None,
            }
            lines += [f"  {key:22}{value}" for key, value in rows.items() if value is not None]
        lines.append(f"  {'licence':22}{self.licence or 'not said'}")
        for name, size in sorted(self.sizes.items()):
            lines.append(f"  {name:46}{size:>16,} bytes{_in_words(self.weights.get(name))}")
        return "\n".join(lines)


def describe(source: Any, *, revision: str | None = None, token: str | bool | None = None) -> ArtifactInfo:
    """Settings, sizes, base, licence and recommended use of a folder, a file, a short name or a Hub id.

    Of a repository only its settings, card, and the first bytes of its weights are downloaded. Raises
    `ArtifactError` or `WeightSourceError` (both ValueErrors).
    """
    text = os.fspath(source) if isinstance(source, str | os.PathLike) else ""
    entry = published(text)
    if Path(text).expanduser().exists() or (entry is None and (text in SHORT_NAMES or text.count("/") != 1)):
        return _local(source)
    name = entry.repo_id if entry is not None else text
    try:
        repository = list_repository(name, revision, token)
    except Unreachable as error:
        if entry is None:
            return replace(_local(cached_folder(name, revision, error)), name=name)
        return _of_table(entry, {})
    if entry is not None:
        return _of_table(entry, repository.sizes)
    return _remote(repository, token)


def _local(source: Any) -> ArtifactInfo:
    if isinstance(source, str | os.PathLike):
        folder = Path(source).expanduser()
        if (folder / INDEX).is_file() and not (folder / SETTINGS).is_file():
            return _local_pipeline(folder)
    found = find(source, "all")
    artifact = PeRFlowArtifact.of(found) if "prediction_type" in found.fields else None
    sizes: dict[str, int] = {}
    weights: dict[str, WeightsInfo] = {}
    for given in found.sources.values():
        files = (given,) if isinstance(given, Path) else given.files
        sizes.update({path.name: path.stat().st_size for path in files})
        if len(files) == 1:
            weights[files[0].name] = describe_weights(files[0])
    if found.folder is not None and found.fields.get("residual"):
        residual = found.folder / found.fields["residual"]
        sizes.update({residual.name: residual.stat().st_size} if residual.is_file() else {})
    return ArtifactInfo(str(source), artifact, sizes, artifact.licence if artifact else None, weights=weights)


def _local_pipeline(folder: Path) -> ArtifactInfo:
    settings = {name: folder / name for name in (PIPELINE_SETTINGS, SCHEDULER) if (folder / name).is_file()}
    sizes = {f"unet/{path.name}": path.stat().st_size for path in sorted((folder / "unet").glob("*.safetensors"))}
    found = _of_pipeline(str(folder), settings, sizes, {"unet": describe_weights(folder)})
    card = folder / CARD
    return replace(found, licence=found.licence or (_licence_in(card) if card.is_file() else None))


def _of_pipeline(
    name: str, settings: Mapping[str, Path], sizes: Mapping[str, int], weights: Mapping[str, WeightsInfo]
) -> ArtifactInfo:
    """A whole pipeline, whose weights may have PeRFlow in them: an exported one, or an unexported one that says so."""
    entry = published(Path(name).name) or published(name)
    said = None if entry is None or entry.form != "pipeline" else PeRFlowArtifact.from_header(entry.metadata)
    for path in settings.values():
        config = read_json(path)
        if said is None and (path.name == PIPELINE_SETTINGS or in_configuration(config)):
            said = PeRFlowArtifact.of(Found(name, from_scheduler(config, str(path))))
    what = "a whole pipeline" + (": load it, then `set_scheduler(pipe)`" if said is not None else "")
    return ArtifactInfo(name, said, sizes, said.licence if said is not None else None, f"  {what}", weights)


def _in_words(info: WeightsInfo | None) -> str:
    """What a file of weights holds, in a line."""
    if info is None:
        return ""
    dtypes = ", ".join(f"{name} ({count})" for name, count in info.dtypes.items())
    return f"  {info.form} for {info.family}, {info.parameters / 1e6:.2f} M numbers: {dtypes}"


def _of_table(entry: Published, sizes: Mapping[str, int]) -> ArtifactInfo:
    """A published set of weights; its settings come with this package."""
    what = "a whole pipeline: load it, then `set_scheduler(pipe)`" if entry.form == "pipeline" else "a delta"
    variant = f", variant {entry.variant}" if entry.variant else ""
    weights = {name: size for name, size in sizes.items() if name.endswith(".safetensors")}
    note = f"  published weights for {entry.family}: {what}{variant}"
    return ArtifactInfo(entry.repo_id, PeRFlowArtifact.from_header(entry.metadata), weights, entry.licence, note)


def _remote(repository: Repository, token: str | bool | None) -> ArtifactInfo:
    paths, pinned = fetch_documents(repository, token)
    if INDEX in repository.sizes and SETTINGS not in repository.sizes:
        if PIPELINE_SETTINGS in repository.sizes:
            paths = {PIPELINE_SETTINGS: download(pinned, PIPELINE_SETTINGS, token), **paths}
        unet = {name: size for name, size in repository.sizes.items() if _UNET.fullmatch(name)}
        found = _of_pipeline(repository.repo_id, paths, unet, {})
        return replace(found, licence=found.licence or _card_licence(pinned, token))
    said = documents_of(paths)
    sizes = {name: size for name, size in repository.sizes.items() if name.endswith(".safetensors")}
    if "prediction_type" not in said:
        for name in WEIGHTS.values():
            if name in sizes:
                said = {**from_metadata(_remote_header(pinned, name, token), name), **said}
    artifact = PeRFlowArtifact.of(Found(repository.repo_id, said)) if "prediction_type" in said else None
    licence = (artifact.licence if artifact is not None else None) or _card_licence(pinned, token)
    return ArtifactInfo(repository.repo_id, artifact, sizes, licence)


def _remote_header(repository: Repository, name: str, token: str | bool | None) -> dict[str, str]:
    """The metadata of a safetensors file on the Hub; reads its header only."""
    api = hub.HfApi(token=token)
    try:
        header = api.parse_safetensors_file_metadata(repository.repo_id, name, revision=repository.revision)
    except Exception as error:
        raise explained(error, repository.repo_id, repository.revision) from error
    return {str(key): str(value) for key, value in (header.metadata or {}).items()}


def _card_licence(repository: Repository, token: str | bool | None) -> str | None:
    if not 0 < repository.sizes.get(CARD, 0) <= _MAX_CARD_BYTES:
        return None
    return _licence_in(download(repository, CARD, token))


def _licence_in(card: Path) -> str | None:
    with card.open(encoding="utf-8", errors="replace") as file:
        text = file.read(_MAX_CARD_BYTES)
    found = hub.ModelCard(text, ignore_metadata_errors=True).data.to_dict().get("license")
    return found if isinstance(found, str) else None


def pull(
    repo_id: str,
    folder: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    overwrite: bool = False,
) -> PeRFlowArtifact:
    """Copy an artefact from the Hub into a local folder: settings, weights, card and pictures, nothing else.

    Returns the artefact in the folder. Raises `ArtifactError` if the repository is none, if a file is there already
    (`overwrite=True` replaces it), or if the download fails; a file appears only when it is complete.
    """
    entry = published(repo_id)
    if entry is not None:
        raise ArtifactError(
            f"{entry.repo_id} is used from the cache: `load_perflow(pipe, {repo_id!r})`, or as a pipeline. To copy "
            f"it, run `hf download {entry.repo_id} --local-dir {folder}`."
        )
    target = Path(folder).expanduser()
    paths, repository = fetch_documents(list_repository(repo_id, revision, token), token)
    if SETTINGS not in paths:
        raise ArtifactError(f"'{repo_id}' has no {SETTINGS}: it is no artefact of this package. Use `hf download`.")
    named = documents_of(paths).get("weights", {})
    pictures = [name for name in repository.sizes if name.startswith("images/")]
    names = [SETTINGS, SCHEDULER, CARD, *named.values()]
    names = [name for name in names if name in repository.sizes]
    names += [f"images/{plain_name(name.removeprefix('images/'), repo_id, _PICTURES)}" for name in pictures]
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        check_free(inside(target, name), overwrite)
    files = {name: download(repository, name, token) for name in names}
    for name, path in files.items():
        copy_file(path, target, name, overwrite=overwrite)
    return replace(PeRFlowArtifact.from_folder(target), name=repo_id)
