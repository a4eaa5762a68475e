"""Options from YAML files, from `name=value` words and from checkpoints; the file that explains them all."""

import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import yaml

from perflow_training.config.data import SOURCES, DataOptions
from perflow_training.config.option import explained
from perflow_training.config.options import TrainingOptions
from perflow_training.config.training import TrainingConfig
from perflow_training.config.yaml_words import cast, parsed
from perflow_training.errors import ConfigError, DataError
from perflow_training.places import url_problem
from perflow_training.text import read_text

PATHS = ("output_dir", "resume_from_checkpoint", "train_cache_dir", "train_data_dir", "train_captions")
#: former names of options, which files and checkpoints of before have
FORMER = {"guidance_scale": "solve_guidance"}


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> TrainingConfig:
    """The options of a YAML file, then `name=value` overrides (values in YAML), all checked.

    Raises ConfigError naming the option, its value and what it can be.
    """
    values: dict = {}
    if path is not None:
        try:
            text = read_text(Path(path))
        except DataError as error:
            raise ConfigError(str(error)) from error
        values = parsed(text, f"{path}") or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds no mapping of options. Write one `name: value` a line.")
    for word in overrides:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"Override {word!r} is not of the form name=value, for example max_train_steps=200.")
        values[name] = parsed(value, f"`{name}={value}`")
    return ready(config_of(values))


def config_of(values: dict) -> TrainingConfig:
    """A config of plain values, for example those of a checkpoint's config.json. Raises ConfigError.

    Options are known under their former names, too.
    """
    values = _renamed(values)
    known = {option.name: option for option in fields(TrainingConfig)}
    unknown = sorted(set(values) - set(known), key=str)
    if unknown:
        near = [match for name in unknown for match in difflib.get_close_matches(str(name), known, 2)]
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"Unknown option {', '.join(map(str, unknown))}.{hint} The options are: {', '.join(known)}.")
    hints = typing.get_type_hints(TrainingConfig)
    try:
        return TrainingConfig(**{name: cast(name, value, hints[name]) for name, value in values.items()})
    except DataError as error:
        raise ConfigError(str(error)) from error


def _renamed(values: Mapping[str, object]) -> dict[str, object]:
    """The values under the names that options have now. Raises ConfigError for one that is given twice."""
    for former, name in FORMER.items():
        if former in values and name in values:
            raise ConfigError(f"`{former}` is the former name of `{name}`, and both are given. Leave `{former}` out.")
    return {FORMER.get(name, name): value for name, value in values.items()}


def ready(config: TrainingConfig) -> TrainingConfig:
    """The config itself, or ConfigError for an option that a run cannot do without."""
    if not config.pretrained_model_name_or_path:
        raise ConfigError(
            "`pretrained_model_name_or_path` is not set. Give it in the YAML file or as "
            "pretrained_model_name_or_path=... on the command line."
        )
    if not any(getattr(config, name) for name in (*SOURCES, "train_cache_dir")):
        raise ConfigError(
            "No captions: none of `train_captions`, `train_data_dir`, `dataset_name`, `train_shards` and "
            "`train_cache_dir` is set. A text file with one caption a line is enough: train_captions=captions.txt."
        )
    # not for the options of a checkpoint, which can be of a run that has moved since
    problem = url_problem({name: getattr(config, name) for name in PATHS})
    if problem:
        raise ConfigError(problem)
    if not config.output_dir:
        raise ConfigError("`output_dir` is empty. Give the folder to write to, for example output_dir=runs/first.")
    return config


def reference() -> str:
    """configs/reference.yaml: every option with its default and meaning."""
    parts = ["# Every option, its default and its meaning. Written by: python training/train_perflow.py --reference"]
    for one in [*explained(DataOptions), *explained(TrainingOptions)]:
        parts += [f"\n# {one.section}"] * bool(one.section)
        text = yaml.safe_dump(one.default, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
        parts.append(f"{one.name}: {text}  # {one.meaning}" if one.meaning else f"{one.name}: {text}")
    return "\n".join(parts) + "\n"
