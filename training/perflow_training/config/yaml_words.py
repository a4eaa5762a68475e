"""YAML as options of known types want it: `no` is a name where a name belongs, and 5e-4 is a number."""

import math
import types
import typing
from dataclasses import dataclass

import yaml

from perflow_training.errors import ConfigError


@dataclass(frozen=True)
class _Plain:
    """A word of YAML without quotes: what was `written`, and the `value` that YAML takes it for (`no` for false)."""

    written: str
    value: object


class _Loader(yaml.SafeLoader):
    """Keeps both readings of plain words, for an option's type decides which is meant."""

    def construct_object(self, node: yaml.Node, deep: bool = False):
        value = super().construct_object(node, deep)
        plain = isinstance(node, yaml.ScalarNode) and node.style is None and not isinstance(value, str)
        return _Plain(node.value, value) if plain else value


def parsed(text: str, what: str):
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        said = str(error).splitlines()[0]
        raise ConfigError(f"{what} is not valid YAML: {said}. Texts with : # [ or {{ need quotes.") from error


def plain(text: str, what: str):
    """What YAML itself makes of a text. Raises ConfigError, which calls it `what`."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not valid YAML: {str(error).splitlines()[0]}.") from error


def cast(name: str, value, hint):
    """The value as the option's type wants it: YAML reads 5e-4 as text, 1 as an integer and `no` as false."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, _Plain):
        value = _meant(value, kinds)
    if isinstance(value, dict) and str in kinds and dict not in kinds:
        return yaml.safe_dump(_unread(value), default_flow_style=True, width=10**6).strip()
    if value is None and (type(None) in kinds or str in kinds):
        return None if type(None) in kinds else ""  # `name=` is an empty text
    if isinstance(value, list):
        wanted = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is list]
        if wanted:
            return [cast(name, item, wanted[0]) for item in value]
    if float in kinds and not isinstance(value, (bool, list, dict)) and value is not None:
        try:
            number = float(value)
        except ValueError as error:
            if str not in kinds:
                raise ConfigError(f"`{name}={value!r}` is not a number.") from error
        else:
            if not math.isfinite(number):
                raise ConfigError(f"`{name}={value!r}` must be a finite number.")
            return number
    plain = tuple(kind for kind in kinds if kind in (bool, int, str))
    if type(value) in plain:
        return value
    expected = " or ".join("null" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ConfigError(f"`{name}={value!r}` must be of type {expected}.")


def _unread(value):
    """What YAML itself makes of a value."""
    if isinstance(value, dict):
        return {_unread(name): _unread(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_unread(one) for one in value]
    return value.value if isinstance(value, _Plain) else value


def _meant(word: _Plain, kinds: tuple):
    """A plain word as options of these types read it; `null` and nothing at all stay what they are."""
    if word.value is None:
        return None
    if str in kinds:
        return word.written
    if ":" in word.written:  # YAML: 1:30 is ninety
        return word.written
    return int(word.written) if int in kinds and word.written.isdecimal() else word.value  # YAML: 010 is eight
