"""An option as a field of a dataclass that carries what is to be said of it."""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from perflow_diffusers.words.shown import shown


def option(default: Any, meaning: str = "", *, section: str = "") -> Any:
    """A field with its `default` and its `meaning`, in words; `section` is the heading that it and the next belong to.

    `--reference`, the commented YAML file and the tables of the documentation are written from these.
    """
    said = {"meaning": meaning, "section": section}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=said)
    return field(default=default, metadata=said)


@shown
@dataclass(frozen=True)
class Explained:
    """What is said of an option: `section` is empty unless a new one begins."""

    name: str
    default: Any
    meaning: str
    section: str


def explained(owner: type) -> Iterator[Explained]:
    """The options that a dataclass itself defines, in their order; those of its bases are left out."""
    for one in fields(owner):
        if one.name in owner.__annotations__:
            factory: Any = one.default_factory
            default = factory() if one.default is MISSING else one.default
            yield Explained(one.name, default, one.metadata.get("meaning", ""), one.metadata.get("section", ""))
