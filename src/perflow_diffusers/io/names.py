"""Which files of a Hub repository are meant, and how they are fetched: diffusers' keywords as one value, `Where`."""

import os
import re
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict
from urllib.parse import unquote

from perflow_diffusers.errors import HubError


class HubOptions(TypedDict, total=False):
    """The keywords of every function that takes a Hub id; they mean what they mean in diffusers (see `Where`)."""

    revision: str | None
    variant: str | None
    subfolder: str | None
    token: str | bool | None
    local_files_only: bool
    cache_dir: str | os.PathLike | None
    force_download: bool


@dataclass(frozen=True)
class Where:
    """The options of a Hub repository.

    `revision`: a branch, tag or commit. `variant`: the part of a file's name before `.safetensors`, as in "fp16".
    `subfolder`: the folder inside the repository, or inside a local folder. `token`: for private and gated
    repositories; by default that of `hf auth login`. `local_files_only`: ask nobody, take what is in the cache.
    `cache_dir`: the cache. `force_download`: fetch files again that are in the cache.

    Raises `HubError` for options that cannot be.
    """

    revision: str | None = None
    variant: str | None = None
    subfolder: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    cache_dir: str | os.PathLike | None = None
    force_download: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.token, str) and not re.fullmatch(r"[!-~]+", self.token):
            # The client would quote the header that it cannot send, and with it the token.
            raise HubError(
                "`token` has blanks, line ends or other characters that no token has. Copy it again (strip what was "
                "read from a file), or leave it out after `hf auth login`."
            )
        if self.local_files_only and self.force_download:
            raise HubError(
                "local_files_only=True asks nobody, and force_download=True fetches again. Pass one of them."
            )
        if ".." in self.prefix.split("/"):
            raise HubError(f"subfolder={self.subfolder!r} leads out of the repository. Name a folder in it.")

    @property
    def prefix(self) -> str:
        """What the names of files inside `subfolder` begin with: "" or "a/b/"."""
        parts = [part for part in re.split(r"[/\\]", self.subfolder or "") if part not in ("", ".")]
        return "".join(f"{part}/" for part in parts)

    @property
    def fetching(self) -> dict[str, Any]:
        """What huggingface_hub's download functions are given: the options that are set."""
        names = ("revision", "token", "cache_dir", "force_download")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None and (value or name == "token")}


_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<rest>[^?#]*)(?:[?#].*)?", re.IGNORECASE)
_STANDARD = re.compile(r"(?:diffusion_pytorch_model|pytorch_lora_weights|model|perflow)(?:\.([\w-]+))?\.safetensors")


def pasted(name: str, where: Where) -> tuple[str, Where]:
    """A Hub id, and what else an address says that was copied out of a browser; any other name comes back as it is.

    Understood are https://huggingface.co/owner/name and hf.co/owner/name, with /tree/REVISION/FOLDER, and
    /blob/REVISION/FILE (/resolve, /raw) for a file of a name that diffusers gives. Raises `HubError` for
    other addresses of the Hub, and for options that contradict the address.
    """
    found = _ADDRESS.fullmatch(name.strip())
    if found is None:
        return name, where
    parts = [unquote(part) for part in found["rest"].split("/") if part]
    if len(parts) < 2 or parts[0] in ("datasets", "spaces", "models", "docs", "papers", "collections", "api"):
        raise HubError(f"{name} is not the address of a model. Pass https://huggingface.co/OWNER/NAME.")
    repo_id, kind, rest = "/".join(parts[:2]), parts[2:3], parts[4:]
    said: dict[str, Any] = {}
    if kind and kind[0] in ("tree", "blob", "resolve", "raw") and len(parts) > 3:
        said["revision"] = parts[3]
        if kind[0] != "tree" and rest:
            file = rest.pop()
            standard = _STANDARD.fullmatch(file)
            if standard is None and file != "perflow.json":
                path = "/".join([*rest, file])
                raise HubError(
                    f"{name} is one file of a repository. Fetch it with `hf download {repo_id} {path}` and pass the "
                    f"file, or pass '{repo_id}' for what diffusers would take from it."
                )
            if standard is not None and standard[1]:
                said["variant"] = standard[1]
        if rest:
            said["subfolder"] = "/".join(rest)
    for option, value in said.items():
        given = getattr(where, option)
        if given not in (None, value):
            raise HubError(f"{name} says {option} {value!r}, and {option}={given!r} was passed. Say it once.")
    return repo_id, replace(where, **said)
