"""Repositories on the Hub: what they hold, and single files of them in the local cache, checked."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import huggingface_hub as hub

from perflow_diffusers.hub.documents import MAX_JSON_BYTES
from perflow_diffusers.hub.errors import ArtifactError

_MAX_FILES = 10_000
_PATIENCE = 10.0  # seconds


@dataclass(frozen=True)
class Repository:
    """A revision of a repository: `sizes` in bytes by file name, and the sha256 of the large files."""

    repo_id: str
    revision: str | None
    sizes: Mapping[str, int] = field(repr=False)
    sha256: Mapping[str, str] = field(repr=False)


class Unreachable(ArtifactError):
    """The Hub did not answer; what is in the cache may still do."""


def check_token(token: str | bool | None) -> None:
    """Raises `ArtifactError` for a token that cannot be one, before a client quotes it in an error of its own."""
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise ArtifactError(
            "`token` has blanks, line ends or other characters that no token has. Copy it again (strip what was read "
            "from a file), or leave it out after `hf auth login`."
        )


def check_reachable(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> None:
    """Ask for a repository once, without the minutes of retries that listings and downloads come with.

    Raises `Unreachable` if nobody answers, `ArtifactError` if the repository does not exist for this user; an answer
    that asks to come back later is one.
    """
    check_token(token)
    try:
        hub.HfApi(token=token).model_info(repo_id, revision=revision, timeout=_PATIENCE)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is None or status in (401, 403, 404):
            raise explained(error, repo_id, revision) from error


def list_repository(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> Repository:
    """What a repository holds at a revision.

    Raises `ArtifactError` for a repository that does not exist for this user, `Unreachable` if the Hub does not
    answer.
    """
    check_reachable(repo_id, revision, token)
    try:
        entries = hub.HfApi(token=token).list_repo_tree(repo_id, recursive=True, revision=revision)
        files = [entry for entry in islice(entries, _MAX_FILES) if isinstance(entry, hub.hf_api.RepoFile)]
    except Exception as error:
        raise explained(error, repo_id, revision) from error
    sizes = {file.path: int(file.size) for file in files}
    hashes = {file.path: str(file.lfs.sha256) for file in files if file.lfs is not None}
    return Repository(repo_id, revision, sizes, hashes)


def explained(error: Exception, repo_id: str, revision: str | None = None) -> ArtifactError:
    """An error of the client in the words of this package; no header of a request is ever in it."""
    if isinstance(error, ArtifactError):
        return error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub.errors.GatedRepoError) or status == 403:
        return ArtifactError(
            f"'{repo_id}' is gated or not open to you. Accept its terms on its page on the Hub, then `hf auth login` "
            "or pass `token=`."
        )
    if isinstance(error, hub.errors.RepositoryNotFoundError | hub.errors.RevisionNotFoundError) or status in (
        401,
        404,
    ):
        return ArtifactError(
            f"The Hub has no '{repo_id}' (revision {revision or 'main'}) for you, and it is no local path. A private "
            "repository needs `hf auth login` or `token=`."
        )
    if isinstance(error, hub.errors.HFValidationError):
        return ArtifactError(f"{repo_id!r} is no name of a repository ({error}). Expected 'owner/name'.")
    what = f"status {status}" if status is not None else type(error).__name__
    return Unreachable(f"The Hub did not answer for '{repo_id}' ({what}). Try again later, or pass a local folder.")


def download(repository: Repository, name: str, token: str | bool | None = None) -> Path:
    """A file of a repository in the local cache, complete and with the content that the repository lists.

    Raises `ArtifactError` if the repository has no such file, if a settings file is too large to be one, if the
    download fails, or if its content is another one.
    """
    if name not in repository.sizes:
        raise ArtifactError(f"'{repository.repo_id}' has no file {name}. Ask its author.")
    if name.endswith(".json") and repository.sizes[name] > MAX_JSON_BYTES:
        raise ArtifactError(
            f"{name} of '{repository.repo_id}' has {repository.sizes[name]:,} bytes; settings have at most "
            f"{MAX_JSON_BYTES:,}. It was not downloaded."
        )
    try:
        path = Path(hub.hf_hub_download(repository.repo_id, name, revision=repository.revision, token=token))
    except Exception as error:
        raise explained(error, repository.repo_id, repository.revision) from error
    _check_content(repository, name, path)
    return path


def _check_content(repository: Repository, name: str, path: Path) -> None:
    """Compare size, and sha256 where the cache's own name for the content is not that already."""
    wanted = repository.sha256.get(name)
    size = path.stat().st_size
    fine = size == repository.sizes[name]
    if fine and wanted is not None and path.resolve().name != wanted:
        fine = _sha256(path) == wanted
    if not fine:
        raise ArtifactError(
            f"{name} of '{repository.repo_id}' in the cache is not the file that the repository lists ({size:,} "
            f"bytes, {repository.sizes[name]:,} listed). Delete {path.resolve()} and download it again."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def cached_folder(repo_id: str, revision: str | None, reason: Exception) -> Path:
    """The folder of a repository that was downloaded before; `reason` is why the Hub is not asked now."""
    try:
        return Path(hub.snapshot_download(repo_id, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"'{repo_id}' is not in the local cache, and the Hub was not asked or not reached ({reason}). Connect "
            "once to download it, or pass a local folder."
        ) from error
