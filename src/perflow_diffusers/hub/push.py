"""Publish a folder on the Hub, in one commit: `push_perflow(folder, repo_id)`."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import huggingface_hub as hub
from huggingface_hub.utils import validate_repo_id

from perflow_diffusers.errors import ArtifactError, HubError, PushError
from perflow_diffusers.hub.bundle import MODULE
from perflow_diffusers.hub.card import read_card, saved_card
from perflow_diffusers.hub.find import CARD, SETTINGS, artifact_in, from_folder
from perflow_diffusers.io.documents import read_json
from perflow_diffusers.io.names import Where, pasted
from perflow_diffusers.io.repository import PATIENCE, explained
from perflow_diffusers.words.arguments import in_words, path_of
from perflow_diffusers.words.shown import shorten, shown

#: Said where a push would fail for want of a token.
NO_TOKEN = "nobody is logged in here. Run `hf auth login` with a token that may write, or set HF_TOKEN."
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
# What a saved pipeline consists of; nothing else that lies in its folder is uploaded.
_PIPELINE_FILES = (".json", ".txt", ".model", ".safetensors", ".md", *_PICTURES)
# The place in a card's snippet where the folder's name stands, of an artefact and of a pipeline.
_OF_ARTIFACT = re.compile(r'(load_perflow\(pipe, )"[^"\n]*"')
_OF_PIPELINE = re.compile(r'(from_pretrained\()"[^"\n]*"')


def push_perflow(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    exist_ok: bool = True,
    licence: str | None = None,
) -> str:
    """Create the repository if it does not exist and upload an artefact's folder, or a pipeline's.

    Of what training wrote, the folder `artifact` in it is taken. A pipeline is what `export_pipeline` wrote, or
    `save_pretrained`; the latter gets a card if it has none.

    One commit, on `revision` (a branch; created if missing) or as a pull request. Only files that belong to it are
    uploaded. The card's snippet is made to load `repo_id`, and the licence is filled in: `license` (formerly
    `licence`), what the artefact says, or the base model's own. `private`, `create_pr`, `commit_message` and
    `exist_ok` are those of huggingface_hub. Returns the address of the commit or pull request.

    Raises `PushError` (a ValueError) for what `plan_push` refuses, if nobody is logged in, or if the Hub refuses.
    The token goes to huggingface_hub only.
    """
    plan = plan_push(folder, repo_id, license=license or licence, revision=revision, token=token)
    repo_id, revision = plan.repo_id, plan.revision
    if not plan.has_token:
        raise PushError(f"'{repo_id}' was not published: {NO_TOKEN}")
    api = hub.HfApi(token=token, library_name="perflow-diffusers")
    message = commit_message or f"Upload {plan.folder.resolve().name} with perflow-diffusers"
    operations = [
        hub.CommitOperationAdd(name, str(plan.card).encode() if name == CARD else str(plan.folder / name))
        for name in plan.files
    ]
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=exist_ok).repo_id
        if revision is not None and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.create_commit(name, operations, commit_message=message, revision=revision, create_pr=create_pr)
    except Exception as error:
        raise _refused(error, repo_id, token) from None
    return str(done.pr_url or done.commit_url)


@shown
@dataclass(frozen=True)
class PushPlan:
    """What `push_perflow` would upload: `files` of `folder`, and the `card` as it would be there."""

    folder: Path
    repo_id: str
    files: tuple[str, ...]
    card: hub.ModelCard = field(repr=False)
    has_token: bool
    revision: str | None = None

    def __post_init__(self) -> None:
        shorten(self)

    @property
    def license(self) -> str:
        """The licence that the card names."""
        return str(self.card.data.to_dict()["license"])

    def __str__(self) -> str:
        sizes = {name: (self.folder / name).stat().st_size for name in self.files if name != CARD}
        sizes[CARD] = len(str(self.card).encode())
        width = max(map(len, sizes))
        lines = [f"  {name:{width}}  {size:>15,} bytes" for name, size in sorted(sizes.items())]
        return "\n".join([f"{self.folder} as {self.repo_id}, licence {self.license}:", *lines])


def plan_push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    license: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> PushPlan:
    """All that `push_perflow` checks before it uploads anything. The Hub is asked for the base's licence alone, and
    only if nothing else names one. `repo_id` may be the address of the repository, as copied out of a browser.

    Raises `PushError` (a ValueError) for a folder that is not publishable, a repository's name that cannot be one, or
    a missing licence.
    """
    order = 'push_perflow(folder, "owner/name")'
    path = artifact_in(path_of(folder, "folder", order, PushError))
    if not isinstance(repo_id, str) or not repo_id.strip():
        raise PushError(f"repo_id is {in_words(repo_id)}, where the name of a repository belongs: {order}.")
    try:
        repo_id, place = pasted(repo_id, Where(token=token, revision=revision))
    except HubError as error:
        raise PushError(str(error)) from None
    if place.subfolder or place.variant:
        raise PushError(f"The address is of a part of '{repo_id}'. Pass the repository itself, '{repo_id}'.")
    try:
        validate_repo_id(repo_id)
    except hub.errors.HFValidationError as error:
        raise PushError(f"{repo_id!r} is no name of a repository ({error}). Expected 'owner/name'.") from None
    files = _files(path)
    card = _card(path, repo_id, license, hub.HfApi(token=token, library_name="perflow-diffusers"))
    known = bool(token) if token is False or isinstance(token, str) else hub.get_token() is not None
    return PushPlan(path, repo_id, tuple(files), card, known, place.revision)


def _files(folder: Path) -> list[str]:
    """Names of the files of an artefact or exported pipeline that belong to it."""
    if not folder.is_dir():
        raise PushError(f"There is no folder {folder}. Save an artefact first: `artifact.save(folder)`.")
    if (folder / "model_index.json").is_file():
        names = [name_in(folder, path) for path in sorted(folder.rglob("*")) if path.suffix in _PIPELINE_FILES]
        names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
        names += [name for name in (f"scheduler/{MODULE}.py",) if (folder / name).is_file()]
        names += [CARD] if CARD not in names else []
        made = {CARD}
    else:
        made = set()
        try:
            found = from_folder(folder, "all")
        except ValueError as error:
            raise PushError(f"{folder} is no artefact: {error}") from error
        if not (folder / SETTINGS).is_file():
            raise PushError(f"{folder} has no {SETTINGS}. Write it with `PeRFlowArtifact.save(folder)`.")
        named = read_json(folder / SETTINGS).get("weights", {})
        names = [SETTINGS, "scheduler/scheduler_config.json", CARD, *sorted(set(named.values()))]
        names += [f"images/{p.name}" for p in sorted(folder.glob("images/*")) if p.suffix in _PICTURES]
        if found.said.prediction_type is None:
            raise PushError(f"{folder} does not say how its weights were trained. Save the artefact again.")
    missing = [name for name in names if not (folder / name).is_file() and name not in made]
    if missing:
        raise PushError(f"{folder} lacks {', '.join(missing)}. Save it again.")
    outside = [name for name in names if folder.resolve() not in (folder / name).resolve().parents]
    if outside:
        raise PushError(f"{', '.join(outside[:3])} in {folder} are links to somewhere else. Copy the files instead.")
    return names


def name_in(folder: PurePath, path: PurePath) -> str:
    """The name in a repository of a file of `folder`: with slashes, whatever the system's separator is."""
    return path.relative_to(folder).as_posix()


def _card(folder: Path, repo_id: str, license: str | None, api: hub.HfApi) -> hub.ModelCard:
    """The folder's card under its new name, with a licence."""
    path = folder / CARD
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else str(saved_card(repo_id))
    except (OSError, ValueError) as error:
        raise PushError(f"{path} is not readable text ({error}). Mend or delete it.") from error
    place = _OF_PIPELINE if (folder / "model_index.json").is_file() else _OF_ARTIFACT
    text = place.sub(lambda match: f'{match[1]}"{repo_id}"', text)
    try:
        card = read_card(text, str(path))
    except ArtifactError as error:
        raise PushError(str(error)) from None
    said = card.data.to_dict()
    given = (license or "").strip() or said.get("license") or _base_license(said.get("base_model"), api)
    if not given:
        raise PushError(
            f"The card of {folder} names no licence, and its base's is not known. Pass license='...', at the terminal "
            "--license (the base's own, e.g. creativeml-openrail-m; weights made from cc-by-nc-4.0 ones stay so)."
        )
    card.data["license"] = given
    return card


def _base_license(base: Any, api: hub.HfApi) -> str | None:
    """The licence of the base model's card, if the Hub tells."""
    if not isinstance(base, str) or "/" not in base:
        return None
    try:
        data = api.model_info(base, timeout=PATIENCE).card_data
    except Exception:  # offline, gated, gone: then the user has to say it
        return None
    found = data.get("license") if data is not None else None
    return found if isinstance(found, str) else None


def _refused(error: Exception, repo_id: str, token: str | bool | None) -> PushError:
    """The client's error in our words; a token that is in it by any accident is taken out."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        why = "you are not logged in, or may not write there: `hf auth login` with a token that may write"
    elif status == 409:
        why = "the repository exists: pass exist_ok=True to add a commit to it, or choose another name"
    elif isinstance(error, hub.errors.OfflineModeIsEnabled) or (
        status is None and not isinstance(error, OSError | ValueError)  # then it is of the connection
    ):
        why = str(explained(error, repo_id, Where()))
    else:
        why = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    for secret in (token, hub.get_token()):
        if isinstance(secret, str) and secret:
            why = why.replace(secret, "***")
    return PushError(f"'{repo_id}' was not published ({f'status {status}; ' if status else ''}{why}).")
