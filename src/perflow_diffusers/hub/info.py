"""What an artefact is, without downloading its weights (`describe`), and a copy of it (`pull`)."""

import os
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from perflow_diffusers.errors import ArtifactError, Unreachable
from perflow_diffusers.families.published import Published, published
from perflow_diffusers.hub.artifact import PeRFlowArtifact
from perflow_diffusers.hub.card import read_card
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
from perflow_diffusers.hub.said import from_metadata, from_scheduler
from perflow_diffusers.io.documents import check_free, copy_file, inside, plain_name, read_json
from perflow_diffusers.io.names import HubOptions, Where, pasted
from perflow_diffusers.io.repository import (
    Repository,
    cached_folder,
    download,
    download_settings,
    header,
    list_repository,
)
from perflow_diffusers.weights import WeightsInfo, describe_weights
from perflow_diffusers.weights.read.locate import SHORT_NAMES
from perflow_diffusers.words.arguments import in_words, path_of
from perflow_diffusers.words.shown import LongDict, aligned, html_facts, html_table, shorten, shown

_MAX_CARD_BYTES = 1 << 20
_UNET = re.compile(r"unet/[^/]+\.safetensors")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@shown
@dataclass(frozen=True)
class ArtifactInfo:
    """What an artefact is: its settings (None for weights that say nothing), sizes in bytes by file, licence.

    `weights`: what each local file of weights holds, by name; `note`: a line for people.
    """

    name: str
    artifact: PeRFlowArtifact | None
    sizes: Mapping[str, int]
    license: str | None = None
    note: str = ""
    weights: Mapping[str, WeightsInfo] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shorten(self)

    @property
    def licence(self) -> str | None:
        """The former name of `license`."""
        return self.license

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON types: `settings` as in `perflow.json` but for the sample of the base; what is in
        the local files under `weights`, and of a single one beside the rest, too."""
        settings = None if self.artifact is None else self.artifact.settings
        (settings or {}).pop("base_sample", None)
        said = {"name": self.name, "license": self.license, "licence": self.license, "settings": settings}
        said["sizes"] = dict(self.sizes)
        weights = {name: info.to_dict() for name, info in self.weights.items()}
        own = {**next(iter(weights.values()))} if len(weights) == 1 else {}
        own_settings = own.pop("settings", None)
        parts = {"weights": weights} if weights else {}
        return LongDict({**own, **said, "settings": settings or own_settings, **parts})

    def __str__(self) -> str:
        lines = [self.name, *([self.note] if self.note else [])]
        facts: list[tuple[str, object]] = []
        if self.artifact is not None:
            facts += self.artifact.facts.items()
        elif len(self.weights) == 1:
            facts += next(iter(self.weights.values())).facts
        else:
            lines.append("  says nothing about how its weights were trained")
        lines += aligned([*facts, ("licence", self.license or "not said")])
        width = max(map(len, self.sizes), default=0)
        for name, size in sorted(self.sizes.items()):
            lines.append(f"  {name:{width}}  {size:>15,} bytes")
            held = _in_words(self.weights.get(name)) if self.artifact is not None or len(self.weights) > 1 else ""
            lines += textwrap.wrap(held, 80, initial_indent="    ", subsequent_indent="    ")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        said, only = self.artifact, next(iter(self.weights.values())) if len(self.weights) == 1 else None
        note = {"what": self.note.strip()} if self.note else {}
        facts = {**note, **({} if said is None else said.facts), "licence": self.license or "not said"}
        table = html_facts(self.name, facts.items())
        if said is None and only is not None:
            table = only._repr_html_()
        files = [(name, _in_words(self.weights.get(name)).strip(), f"{size:,}") for name, size in self.sizes.items()]
        return table + html_table("", ("file", "holds", "bytes"), sorted(files)) if files else table


def describe(source: Any, **where: Unpack[HubOptions]) -> ArtifactInfo:
    """Settings, sizes, base, licence and recommended use of a folder, a file, a short name or a Hub id.

    `where`: the options of `open_weights`. Of a repository only its settings, card, and the first bytes of its
    weights are downloaded. Raises `ArtifactError` or `WeightSourceError` (both ValueErrors).
    """
    place = Where(**where)
    text = os.fspath(source) if isinstance(source, str | os.PathLike) else ""
    if text and not Path(text).expanduser().exists():
        source, place = pasted(text, place)
        text = source
    entry = published(text)
    if Path(text).expanduser().exists() or (entry is None and (text in SHORT_NAMES or text.count("/") != 1)):
        return _local(source, place)
    name = entry.repo_id if entry is not None else text
    try:
        repository = list_repository(name, place)
    except Unreachable as error:
        if entry is None:
            folder = cached_folder(name, place, error)
            return replace(_local(folder, replace(place, subfolder=None)), name=f"{name}/{place.prefix}".rstrip("/"))
        return _of_table(entry, {})
    if entry is not None:
        return _of_table(entry, repository.sizes)
    return _remote(repository)


def _local(source: Any, where: Where) -> ArtifactInfo:
    if isinstance(source, str | os.PathLike):
        folder = Path(source).expanduser() / where.prefix
        if (folder / INDEX).is_file() and not (folder / SETTINGS).is_file():
            return _local_pipeline(folder, where.variant)
    found = find(source, "all", where)
    artifact = PeRFlowArtifact.of(found) if found.said.prediction_type is not None else None
    sizes: dict[str, int] = {}
    weights: dict[str, WeightsInfo] = {}
    for form, given in found.sources.items():
        files = (given,) if isinstance(given, Path) else given.files
        sizes.update({path.name: path.stat().st_size for path in files})
        if len(files) == 1:
            weights[files[0].name] = replace(describe_weights(found.opened.get(form, given)), name=str(files[0]))
    if found.folder is not None and found.said.residual:
        residual = found.folder / found.said.residual
        sizes.update({residual.name: residual.stat().st_size} if residual.is_file() else {})
    return ArtifactInfo(str(source), artifact, sizes, artifact.license if artifact else None, weights=weights)


def _local_pipeline(folder: Path, variant: str | None) -> ArtifactInfo:
    settings = {name: folder / name for name in (PIPELINE_SETTINGS, SCHEDULER) if (folder / name).is_file()}
    sizes = {f"unet/{path.name}": path.stat().st_size for path in sorted((folder / "unet").glob("*.safetensors"))}
    found = _of_pipeline(str(folder), settings, sizes, {"unet": describe_weights(folder, variant=variant)})
    card = folder / CARD
    return replace(found, license=found.license or (_license_in(card) if card.is_file() else None))


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
    return ArtifactInfo(name, said, sizes, said.license if said is not None else None, f"  {what}", weights)


def _in_words(info: WeightsInfo | None) -> str:
    """What a file of weights holds, in a line."""
    if info is None:
        return ""
    dtypes = ", ".join(f"{name} ({count})" for name, count in info.dtypes.items())
    return f"{info.form} for {info.family}, {info.parameters / 1e6:.2f} M numbers: {dtypes}"


def _of_table(entry: Published, sizes: Mapping[str, int]) -> ArtifactInfo:
    """A published set of weights; its settings come with this package."""
    what = "a whole pipeline: load it, then `set_scheduler(pipe)`" if entry.form == "pipeline" else "a delta"
    variant = f", variant {entry.variant}" if entry.variant else ""
    weights = {name: size for name, size in sizes.items() if name.endswith(".safetensors")}
    note = f"  published weights for {entry.family.name}: {what}{variant}"
    return ArtifactInfo(entry.repo_id, PeRFlowArtifact.from_header(entry.metadata), weights, entry.license, note)


def _remote(repository: Repository) -> ArtifactInfo:
    paths, pinned = fetch_documents(repository)
    variant = repository.where.variant
    weights = [name for name in repository.sizes if name.endswith(".safetensors")]
    if variant is not None and not any(f".{variant}." in name for name in weights):
        raise ArtifactError(
            f"'{repository.name}' has no weights of variant '{variant}'; it offers {', '.join(sorted(weights)[:8])}."
        )
    sizes = {name: repository.sizes[name] for name in weights if variant is None or f".{variant}." in name}
    if INDEX in repository.sizes and SETTINGS not in repository.sizes:
        if PIPELINE_SETTINGS in repository.sizes:
            paths = {PIPELINE_SETTINGS: download_settings(pinned, PIPELINE_SETTINGS), **paths}
        unet = {name: size for name, size in sizes.items() if _UNET.fullmatch(name)}
        found = _of_pipeline(repository.name, paths, unet, {})
        return replace(found, license=found.license or _card_license(pinned))
    said = documents_of(paths)
    if said.prediction_type is None:
        for name in WEIGHTS.values():
            if name in sizes:
                said = said.over(from_metadata(header(pinned, name), name))
    artifact = PeRFlowArtifact.of(Found(repository.name, said)) if said.prediction_type is not None else None
    license = (artifact.license if artifact is not None else None) or _card_license(pinned)
    return ArtifactInfo(repository.name, artifact, sizes, license)


def _card_license(repository: Repository) -> str | None:
    if not 0 < repository.sizes.get(CARD, 0) <= _MAX_CARD_BYTES:
        return None
    return _license_in(download(repository, CARD))


def _license_in(card: Path) -> str | None:
    with card.open(encoding="utf-8", errors="replace") as file:
        text = file.read(_MAX_CARD_BYTES)
    try:
        found = read_card(text, str(card)).data.to_dict().get("license")
    except ArtifactError:  # the rest can be described all the same
        return None
    return found if isinstance(found, str) else None


def pull(
    repo_id: str, folder: str | os.PathLike, *, overwrite: bool = False, **where: Unpack[HubOptions]
) -> PeRFlowArtifact:
    """Copy an artefact from the Hub into a local folder: settings, weights, card and pictures, nothing else.

    `where`: the options of `open_weights`, but for `variant`.

    Returns the artefact in the folder. Raises `ArtifactError` if the repository is none, if a file is there already
    (`overwrite=True` replaces it), or if the download fails; a file appears only when it is complete.
    """
    order = 'pull("owner/name", "folder")'
    if not isinstance(repo_id, str):
        raise ArtifactError(f"repo_id is {in_words(repo_id)}, where the name of a repository belongs: {order}.")
    repo_id, place = pasted(repo_id, Where(**where))
    entry = published(repo_id)
    if entry is not None:
        raise ArtifactError(
            f"{entry.repo_id} is used from the cache: `load_perflow(pipe, {repo_id!r})`, or as a pipeline. To copy "
            f"it, run `hf download {entry.repo_id} --local-dir {folder}`."
        )
    target = path_of(folder, "folder", order, ArtifactError)
    if place.variant is not None:
        raise ArtifactError(f"variant={place.variant!r}: an artefact is copied as it is. Leave `variant` out.")
    paths, repository = fetch_documents(list_repository(repo_id, place))
    if SETTINGS not in paths:
        raise ArtifactError(
            f"'{repository.name}' has no {SETTINGS}: it is no artefact of this package. Use `hf download`."
        )
    named = documents_of(paths).weights or {}
    pictures = [name for name in repository.sizes if name.startswith("images/")]
    names = [SETTINGS, SCHEDULER, CARD, *named.values()]
    names = [name for name in names if name in repository.sizes]
    names += [f"images/{plain_name(name.removeprefix('images/'), repo_id, _PICTURES)}" for name in pictures]
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        check_free(inside(target, name), overwrite)
    files = {name: download(repository, name) for name in names}
    for name, path in files.items():
        copy_file(path, target, name, overwrite=overwrite)
    return replace(PeRFlowArtifact.from_folder(target), name=repo_id)
