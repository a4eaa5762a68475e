"""The options of a Hub repository on a command: which files of it are meant, and how they are fetched."""

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Command = Callable[..., None]

# Which files: said for each source of a command.
_FILES = {
    "revision": "Branch, tag or commit{of}.",
    "variant": "Part of the file's name before .safetensors, as in fp16{of}.",
    "subfolder": "Folder inside the repository or local folder{of}.",
}
# How they are fetched: said once.
_FETCHING: dict[str, tuple[Any, Any, str]] = {
    "token": (str | None, None, "For private and gated repositories; default: that of `hf auth login` (or HF_TOKEN)."),
    "local_files_only": (bool, False, "Ask nobody; take what is in the cache."),
    "cache_dir": (Path | None, None, "The cache to use."),
    "force_download": (bool, False, "Fetch files again that are in the cache."),
}


def with_hub_options(*sources: str, without: Sequence[str] = ()) -> Callable[[Command], Command]:
    """Give a command the options of `open_weights`; it is called with those that were given, as the dict `where`.

    With the names of two sources, --revision, --variant and --subfolder are said for each (--base-revision), and the
    command is called with a dict for each (`base_where`).
    """

    def decorated(command: Command) -> Command:
        added = _parameters(sources, without)

        @functools.wraps(command)
        def called(**values: Any) -> None:
            given = {name: values.pop(name) for name in added}
            fetching = {name: given[name] for name in _FETCHING if given[name]}
            for source in sources or ("",):
                start = f"{source}_" if source else ""
                files = {name: given[start + name] for name in _FILES if given.get(start + name)}
                values[f"{start}where"] = {**files, **fetching}
            command(**values)

        own = inspect.signature(command).parameters
        kept = {name: parameter for name, parameter in own.items() if not name.endswith("where")}
        called.__signature__ = inspect.Signature([*kept.values(), *added.values()])  # type: ignore[attr-defined]
        called.__annotations__ = {name: item.annotation for name, item in {**kept, **added}.items()}
        return called

    return decorated


def _parameters(sources: Sequence[str], without: Sequence[str]) -> dict[str, inspect.Parameter]:
    """The options, by name, as parameters that typer reads."""
    options: dict[str, tuple[Any, Any, str]] = {}
    for source in sources or ("",):
        start, of = (f"{source}_", f", of {source.upper()}") if source else ("", "")
        files = {name: text.format(of=of) for name, text in _FILES.items() if name not in without}
        options.update({start + name: (str | None, None, text) for name, text in files.items()})
    options.update(_FETCHING)
    return {name: _option(name, *parts) for name, parts in options.items()}


def _option(name: str, kind: Any, default: Any, text: str) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    annotation = Annotated[kind, typer.Option(flag, help=text)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
