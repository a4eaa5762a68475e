"""Repositories on the Hub: what they hold, and single files of them in the local cache, checked."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import huggingface_hub as hub

from perflow_diffusers.errors import HubError, Unreachable
from perflow_diffusers.io.documents import MAX_JSON_BYTES
from perflow_diffusers.io.names import Where

_MAX_FILES = 10_000
#: Seconds that an answer may take to come.
PATIENCE = 10.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repository:
    """The folder `where.subfolder` of a repository at `where.revision`.

    `sizes` in bytes by file name, and the sha256 of the large files, by names inside that folder.
    """

    repo_id: str
    where: Where
    sizes: Mapping[str, int] = field(repr=False)
    sha256: Mapping[str, str] = field(repr=False)

    @property
    def name(self) -> str:
        """`owner/name`, or `owner/name/subfolder`."""
        return f"{self.repo_id}/{self.where.prefix}".rstrip("/")

    def pinned(self, path: Path, name: str) -> "Repository":
        """At the commit that the file `name`, downloaded to `path`, is of: other files come from the same one."""
        commit = path.parents[(self.where.prefix + name).count("/")].name
        fine = _COMMIT.fullmatch(commit) is not None
        return replace(self, where=replace(self.where, revision=commit)) if fine else self


def check_reachable(repo_id: str, where: Where) -> None:
    """Ask for a repository once, without the half minute of retries that listings and downloads come with.

    Every door to the Hub asks here first. Raises `Unreachable` if nobody answers or is to be asked,
    `HubError` if the repository does not exist for this user; an answer that asks to come back later is one.
    """
    if where.local_files_only:
        raise Unreachable(f"The Hub was not asked for '{repo_id}' (local_files_only=True).")
    try:
        hub.HfApi(token=where.token).model_info(repo_id, revision=where.revision, timeout=PATIENCE)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is None or status in (401, 403, 404):
            raise explained(error, repo_id, where) from error


def reached(repo_id: str, where: Where) -> Where:
    """`where`, for a library that asks the Hub itself: with local_files_only=True if there is only the cache to ask.

    Raises `HubError` if nothing of the repository is there either, or if it does not exist for this user.
    """
    try:
        check_reachable(repo_id, where)
    except Unreachable as reason:
        cached_folder(repo_id, where, reason)
        return replace(where, local_files_only=True, force_download=False)
    return where


def list_repository(repo_id: str, where: Where) -> Repository:
    """What a repository (or its subfolder) holds at a revision.

    Raises `HubError` for a repository that does not exist for this user, or a subfolder that is not there,
    `Unreachable` if the Hub does not answer, or is not to be asked.
    """
    check_reachable(repo_id, where)
    try:
        entries = hub.HfApi(token=where.token).list_repo_tree(repo_id, recursive=True, revision=where.revision)
        files = [entry for entry in islice(entries, _MAX_FILES) if isinstance(entry, hub.hf_api.RepoFile)]
    except Exception as error:
        raise explained(error, repo_id, where) from error
    inside = {file.path.removeprefix(where.prefix): file for file in files if file.path.startswith(where.prefix)}
    if not inside and where.prefix:
        folders = sorted({file.path.split("/")[0] for file in files if "/" in file.path})
        raise HubError(
            f"'{repo_id}' (revision {where.revision or 'main'}) has no subfolder '{where.subfolder}'. Its folders: "
            f"{', '.join(folders[:12]) or 'none'}."
        )
    sizes = {name: int(file.size) for name, file in inside.items()}
    hashes = {name: str(file.lfs.sha256) for name, file in inside.items() if file.lfs is not None}
    return Repository(repo_id, where, sizes, hashes)


def explained(error: Exception, repo_id: str, where: Where) -> HubError:
    """An error of the client in the words of this package; no header of a request is ever in it."""
    if isinstance(error, HubError):
        return error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub.errors.GatedRepoError) or status == 403:
        return HubError(
            f"'{repo_id}' is gated or not open to you. Accept its terms on its page on the Hub, then `hf auth login` "
            "or pass `token=`."
        )
    if isinstance(error, hub.errors.RepositoryNotFoundError | hub.errors.RevisionNotFoundError) or status in (
        401,
        404,
    ):
        return HubError(
            f"The Hub has no '{repo_id}' (revision {where.revision or 'main'}) for you, and it is no local path. A "
            "private repository needs `hf auth login` or `token=`."
        )
    if isinstance(error, hub.errors.HFValidationError):
        return HubError(f"{repo_id!r} is no name of a repository ({error}). Expected 'owner/name'.")
    if isinstance(error, hub.errors.OfflineModeIsEnabled):
        return Unreachable(f"The Hub was not asked for '{repo_id}' (HF_HUB_OFFLINE is set).")
    if status is not None:
        return Unreachable(f"The Hub answered for '{repo_id}' with status {status}: try again later.")
    return Unreachable(
        f"The Hub ({hub.constants.ENDPOINT}) cannot be reached for '{repo_id}' ({_fault(error)}): check the network."
    )


def _fault(error: BaseException) -> str:
    """The name of a client's error and what the system says of it; not its own text, which may quote a header."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return f"{type(error).__name__}: {inner.strerror}"
        inner = inner.__cause__ or inner.__context__
    return type(error).__name__


def header(repository: Repository, name: str) -> dict[str, str]:
    """The metadata of a safetensors file on the Hub, of which only its first bytes are read. Raises `HubError`."""
    where, api = repository.where, hub.HfApi(token=repository.where.token)
    try:
        found = api.parse_safetensors_file_metadata(repository.repo_id, where.prefix + name, revision=where.revision)
    except Exception as error:
        raise explained(error, repository.repo_id, where) from error
    return {str(key): str(value) for key, value in (found.metadata or {}).items()}


def download_settings(repository: Repository, name: str) -> Path:
    """`download` for a small file of JSON; raises `HubError`, too, if it is too large to be one."""
    size = repository.sizes.get(name, 0)
    if size > MAX_JSON_BYTES:
        raise HubError(
            f"{name} of '{repository.name}' has {size:,} bytes; settings have at most {MAX_JSON_BYTES:,}. It was not "
            "downloaded."
        )
    return download(repository, name)


def download(repository: Repository, name: str) -> Path:
    """A file of a repository in the local cache, complete and with the content that the repository lists.

    Raises `HubError` if the repository has no such file, if the download fails, or if its content is another one.
    """
    if name not in repository.sizes:
        raise HubError(f"'{repository.name}' has no file {name}. Ask its author.")
    where = repository.where
    try:
        path = Path(hub.hf_hub_download(repository.repo_id, where.prefix + name, **where.fetching))
    except Exception as error:
        raise explained(error, repository.repo_id, where) from error
    _check_content(repository, name, path)
    return path


def _check_content(repository: Repository, name: str, path: Path) -> None:
    """Compare size, and sha256 where the cache's own name for the content is not that already."""
    wanted = repository.sha256.get(name)
    size = path.stat().st_size
    fine = size == repository.sizes[name]
    if fine and wanted is not None and path.resolve().name != wanted:
        fine = file_sha256(path) == wanted
    if not fine:
        raise HubError(
            f"{name} of '{repository.name}' in the cache is not the file that the repository lists ({size:,} bytes, "
            f"{repository.sizes[name]:,} listed). Delete {path.resolve()} and download it again (force_download=True)."
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits; memory: 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def cached_folder(repo_id: str, where: Where, reason: Exception) -> Path:
    """The folder of a repository that was downloaded before, whole or not; `reason`: why the Hub is not asked now."""
    options = {key: value for key, value in where.fetching.items() if key in ("revision", "cache_dir")}
    try:
        folder = Path(hub.snapshot_download(repo_id, local_files_only=True, **options))
    except (OSError, ValueError) as error:
        part = getattr(error, "snapshot_path", None)  # of a snapshot that is known to lack files
        if part is None:
            cache = where.cache_dir or hub.constants.HF_HUB_CACHE
            why = str(reason).replace(f" for '{repo_id}'", "", 1)
            raise HubError(
                f"'{repo_id}' is no file or folder here, and it is not in the cache ({cache}). {why} What was "
                f"downloaded once with a network (`hf download {repo_id}`) is found without one."
            ) from error
        folder = Path(part)
    if not (folder / where.prefix).is_dir():
        raise HubError(
            f"'{repo_id}' in the cache has no subfolder '{where.subfolder}'. {reason} Download it once with a network."
        )
    return folder / where.prefix
