"""Repositories on the Hub as artefacts come from them: the errors of this room, and settings within their limits."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub as hub

from perflow_diffusers.errors import ArtifactError, WeightSourceError
from perflow_diffusers.io import repository
from perflow_diffusers.io.documents import MAX_JSON_BYTES
from perflow_diffusers.io.names import Where
from perflow_diffusers.io.repository import Repository

__all__ = ["Repository", "Unreachable", "cached_folder", "download", "header", "list_repository"]


class Unreachable(ArtifactError):
    """The Hub did not answer; what is in the cache may still do."""


@contextmanager
def _in_words_of_this_room() -> Iterator[None]:
    try:
        yield
    except repository.Unreachable as error:
        raise Unreachable(str(error)) from error.__cause__
    except WeightSourceError as error:
        raise ArtifactError(str(error)) from error.__cause__


def options(where: Mapping[str, Any]) -> Where:
    """The keywords of a function of this room as one value. Raises `ArtifactError` for what cannot be."""
    with _in_words_of_this_room():
        return Where(**where)


def list_repository(repo_id: str, where: Where) -> Repository:
    """`weights.repository.list_repository`; raises `Unreachable` or `ArtifactError`."""
    with _in_words_of_this_room():
        return repository.list_repository(repo_id, where)


def cached_folder(repo_id: str, where: Where, reason: Exception) -> Path:
    """`weights.repository.cached_folder`; raises `ArtifactError`."""
    with _in_words_of_this_room():
        return repository.cached_folder(repo_id, where, reason)


def download(source: Repository, name: str) -> Path:
    """A file of a repository in the local cache, complete and with the content that the repository lists.

    Raises `ArtifactError` if the repository has no such file, if a settings file is too large to be one, if the
    download fails, or if its content is another one.
    """
    if name.endswith(".json") and source.sizes.get(name, 0) > MAX_JSON_BYTES:
        raise ArtifactError(
            f"{name} of '{source.name}' has {source.sizes[name]:,} bytes; settings have at most "
            f"{MAX_JSON_BYTES:,}. It was not downloaded."
        )
    with _in_words_of_this_room():
        return repository.download(source, name)


def header(source: Repository, name: str) -> dict[str, str]:
    """The metadata of a safetensors file on the Hub; reads its header only. Raises as `download` does."""
    where = source.where
    api = hub.HfApi(token=where.token)
    try:
        found = api.parse_safetensors_file_metadata(
            source.repo_id, where.prefix + name, revision=where.revision
        ).metadata
    except Exception as error:
        with _in_words_of_this_room():
            raise repository.explained(error, source.repo_id, where) from error
    return {str(key): str(value) for key, value in (found or {}).items()}
