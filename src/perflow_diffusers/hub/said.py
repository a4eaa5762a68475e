"""What files say of an artefact, as checked values: headers (str -> str), `perflow.json`, scheduler configurations."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from perflow_diffusers.errors import ArtifactError
from perflow_diffusers.flow import BASE_TYPES, PREDICTION_TYPES, flow_facts, noise_facts
from perflow_diffusers.flow.path import BETA_SCHEDULES
from perflow_diffusers.io.documents import parse_json, plain_name
from perflow_diffusers.words.shown import shown

#: Of `perflow.json`; a higher one is refused.
FORMAT_VERSION = 1
#: What `process` says of an accelerator of a flow-matching base; those of a diffusion with betas say nothing.
FLOW = "flow"
#: The class of its scheduler.
FLOW_SCHEDULER = "FlowMatchPeRFlowScheduler"

_ENDS = {"t_noise": 1.0, "t_clean": 0.0}
_MAX_TIMESTEPS, _MAX_WINDOWS, _MAX_STEPS, _MAX_TEXT = 100_000, 1000, 64, 500
#: What files of before call a setting that has another name now.
_FORMER = {"solve_guidance": ("guidance_scale",), "license": ("licence",)}
_TEXTS = (
    "prediction_type",
    "process",
    "base_model",
    "base_hash",
    "license",
    "licence",
    "base_prediction_type",
    "perflow_residual",
)
_OTHERS = (
    *(
        "num_time_windows",
        "window_boundaries",
        "window_shift",
        "recommended_steps",
        "recommended_guidance_scale",
        "solve_guidance",
    ),
    *("guidance_scale", "network", "base_sample", "noise", "recipe", "format_version", "t_noise", "t_clean"),
)
_FORMATS = re.compile(r"(delta|delta-int8|lora|delta-residual)-(\d{1,9})")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")


def _rule(test: Callable[[Any], Any], expected: str) -> Any:
    """A field that is None where nothing is said; `test` holds for what may be said, which is `expected` in words."""
    return field(default=None, metadata={"test": test, "expected": expected})


@shown
@dataclass(frozen=True)
class Said:
    """Checked settings as far as a file says them; None where it does not."""

    prediction_type: str | None = _rule(
        lambda v: v in tuple(PREDICTION_TYPES), f"one of {', '.join(PREDICTION_TYPES)}"
    )
    process: str | None = _rule(lambda v: v == FLOW, f"'{FLOW}', or nothing for a diffusion with betas")
    base_prediction_type: str | None = _rule(lambda v: v in BASE_TYPES, f"one of {', '.join(BASE_TYPES)}")
    num_time_windows: int | None = _rule(
        lambda v: _integer(v, 1, _MAX_WINDOWS), f"an integer from 1 to {_MAX_WINDOWS}"
    )
    window_boundaries: tuple[int, ...] | tuple[float, ...] | None = _rule(
        lambda v: (_integers(v, _MAX_WINDOWS + 1, 0, _MAX_TIMESTEPS) or _levels(v)) and len(v) >= 2,
        f"a list of 2 to {_MAX_WINDOWS + 1} falling integers, or of noise levels from 1 to 0 for a flow",
    )
    window_shift: float | None = _rule(lambda v: _number(v, 1e-3, 1e3), "a number from 0.001 to 1000")
    t_noise: float | None = _rule(lambda v: _number(v, 0, 1), "a number from 0 to 1")
    t_clean: float | None = _rule(lambda v: _number(v, 0, 1), "a number from 0 to 1")
    recommended_steps: tuple[int, ...] | None = _rule(
        lambda v: _integers(v, _MAX_STEPS, 1, 1000), f"a list of at most {_MAX_STEPS} integers from 1 to 1000"
    )
    recommended_guidance_scale: float | None = _rule(lambda v: _number(v, 0, 100), "a number from 0 to 100")
    solve_guidance: float | None = _rule(lambda v: _number(v, 0, 100), "a number from 0 to 100")
    base_model: str | None = _rule(lambda v: _text(v), f"a name of at most {_MAX_TEXT} printable characters")
    base_hash: str | None = _rule(
        lambda v: isinstance(v, str) and _HASH.fullmatch(v), "sha256: and 64 hexadecimal digits"
    )
    license: str | None = _rule(lambda v: _text(v), f"a name of at most {_MAX_TEXT} printable characters")
    network: Mapping[str, Any] | None = _rule(lambda v: _object(v), "an object")
    base_sample: Mapping[str, Any] | None = _rule(
        lambda v: _samples(v), "an object of at most 64 short lists of numbers"
    )
    noise: Mapping[str, Any] | None = _rule(lambda v: _object(v), "an object")
    recipe: Mapping[str, Any] | None = _rule(lambda v: _object(v), "an object")
    #: the file that a LoRA needs beside it, and the files of an artefact by form; each checked by `checked`
    residual: str | None = None
    weights: Mapping[str, str] | None = None

    def over(self, other: "Said") -> "Said":
        """All that this says, and what only the other does."""
        return replace(other, **{key: value for key, value in vars(self).items() if value is not None})


def from_metadata(header: Mapping[str, str], where: str) -> Said:
    """What the header of a delta or LoRA says; `where` names it in errors."""
    _check_format(header.get("perflow_format"), where)
    content: dict[str, Any] = {key: header[key] for key in _TEXTS if header.get(key)}
    wanted = {key: header[key] for key in _OTHERS if key in header}
    try:
        content.update({key: json.loads(text) for key, text in wanted.items() if len(text) < 1 << 20})
        parse_json(json.dumps(content), where)  # the same limits: depth, NaN
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"The header of {where} is not usable ({error}). Download it again.") from error
    return checked(content, f"the header of {where}")


def _check_format(name: Any, where: str) -> None:
    if name is None:
        return
    match = _FORMATS.fullmatch(str(name))
    if match is None or int(match[2]) > 1:
        raise ArtifactError(
            f"{where} has the format {str(name)[:40]!r}; this version knows delta-1, delta-int8-1 and lora-1. Upgrade "
            "perflow-diffusers, or ask its author for an older format."
        )


def from_scheduler(config: Mapping[str, Any], where: str) -> Said:
    """What a configuration of `PeRFlowScheduler` says, of any age, or one of `FlowMatchPeRFlowScheduler`.

    Before `perflow_type` existed, `prediction_type` said how the PeRFlow weights were trained, and "epsilon" in it
    meant "diff_eps".
    """
    if config.get("_class_name") == FLOW_SCHEDULER:
        windows = {key: config.get(key) for key in ("num_time_windows", "window_boundaries", "window_shift")}
        facts = {"prediction_type": "velocity", "process": FLOW, "noise": flow_facts(config)}
        return checked({**facts, **{key: value for key, value in windows.items() if value is not None}}, where)
    given, kind = config.get("prediction_type"), config.get("perflow_type")
    ours = config.get("_class_name") == "PeRFlowScheduler"
    if kind is None and (given in PREDICTION_TYPES or (ours and given == "epsilon")):
        kind, given = "diff_eps" if given == "epsilon" else given, None
    if kind is None:
        raise ArtifactError(
            f"{where} says nothing about how PeRFlow weights were trained (prediction_type={given!r:.50}, no "
            f"perflow_type). Expected one of {', '.join(PREDICTION_TYPES)}."
        )
    noise = noise_facts(config)
    if not isinstance(noise.get("trained_betas"), list):
        noise.pop("trained_betas", None)
    content = {
        "prediction_type": kind,
        "base_prediction_type": given,
        "noise": noise,
        **{key: config.get(key) for key in ("num_time_windows", "window_boundaries")},
        **{key: config.get(key) for key, usual in _ENDS.items() if config.get(key) != usual},
    }
    return checked({key: value for key, value in content.items() if value is not None}, where)


def checked(content: Mapping[str, Any], where: str) -> Said:
    """What is known of `content`, each within its limits; unknown keys are left out. Raises `ArtifactError`."""
    version = content.get("format_version", FORMAT_VERSION)
    if not _integer(version, 1, 10**9):
        raise _wrong(where, "format_version", version, "1")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{where} has format version {version}; this version of perflow-diffusers reads up to {FORMAT_VERSION}. "
            "Install a newer one."
        )
    said: dict[str, Any] = {}
    for one in fields(Said):
        for key in (one.name, *_FORMER.get(one.name, ())):
            value = content.get(key)
            if value is None or not one.metadata:
                continue
            if not one.metadata["test"](value):
                raise _wrong(where, key, value, one.metadata["expected"])
            said.setdefault(one.name, tuple(value) if isinstance(value, list) else value)
    process = process_of(said)
    if process is not None:
        said["process"] = process
        _check_flow(said, where)
    _check_boundaries(said, where)
    if "noise" in said:
        said["noise"] = _checked_noise(said["noise"], where, _FLOW_NOISE if process else _BETAS)
    if "weights" in content:
        said["weights"] = _checked_files(content["weights"], where)
    if "perflow_residual" in content:
        said["residual"] = plain_name(content["perflow_residual"], where)
    return Said(**said)


def _wrong(where: str, key: str, value: Any, expected: str) -> ArtifactError:
    shown = repr(value)
    return ArtifactError(f"{where} has {key}={shown[:80]}; expected {expected}. Do not use it, or ask its author.")


def _integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any, low: float, high: float) -> bool:
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    return fine and math.isfinite(value) and low <= value <= high


def _integers(value: Any, count: int, low: int, high: int) -> bool:
    fine = isinstance(value, list | tuple) and 1 <= len(value) <= count
    return fine and all(_integer(item, low, high) for item in value)


def _levels(value: Any) -> bool:
    """Whether these are noise levels of a flow, at most 1001."""
    fine = isinstance(value, list | tuple) and 1 <= len(value) <= _MAX_WINDOWS + 1
    return fine and all(_number(item, 0, 1) for item in value)


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT and value.isprintable()


def _samples(value: Any) -> bool:
    fine = isinstance(value, dict) and len(value) <= 64
    return (
        fine
        and all(_text(k) and isinstance(v, list) and len(v) <= 256 for k, v in value.items())
        and all(_number(item, -1e30, 1e30) for numbers in value.values() for item in numbers)
    )


def _object(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= 500


def expectation(name: str, value: Any) -> str | None:
    """What is expected of a setting whose value is out of its limits; None for what is fine, missing or unknown."""
    rule = next((one.metadata for one in fields(Said) if one.name == name and one.metadata), None)
    return None if rule is None or value is None or rule["test"](value) else rule["expected"]


def process_of(said: Mapping[str, Any]) -> str | None:
    """`FLOW` for settings that say so, or have a shift of time or boundaries that are no integers; else None."""
    fractions = any(isinstance(one, float) for one in said.get("window_boundaries") or ())
    return FLOW if said.get("process") == FLOW or said.get("window_shift") is not None or fractions else None


def flow_misfit(said: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first of the settings of a flow that cannot be one's, and what is expected of it; None if all can."""
    boundaries, kind = said.get("window_boundaries"), said.get("prediction_type")
    if kind not in (None, "velocity"):
        return "prediction_type", "velocity, for a flow-matching base"
    if boundaries and not _levels(boundaries):
        return "window_boundaries", "falling noise levels from 1 to 0, for a flow-matching base"
    ends = next((key for key in _ENDS if said.get(key) not in (None, _ENDS[key])), None)
    if ends is not None:
        return ends, "nothing: the first and the last of window_boundaries say it for a flow-matching base"
    return None


def _check_flow(said: dict[str, Any], where: str) -> None:
    wrong = flow_misfit(said)
    if wrong is not None:
        raise _wrong(where, wrong[0], said.get(wrong[0]), wrong[1])
    if said.get("window_boundaries") is not None:
        said["window_boundaries"] = tuple(float(one) for one in said["window_boundaries"])


def _check_boundaries(fields: dict[str, Any], where: str) -> None:
    """Boundaries fall, and their number is that of the windows."""
    given = fields.get("window_boundaries")
    if given is None:
        return
    if any(a <= b for a, b in pairwise(given)):
        raise _wrong(where, "window_boundaries", list(given), "strictly falling numbers")
    if fields.setdefault("num_time_windows", len(given) - 1) != len(given) - 1:
        raise _wrong(where, "num_time_windows", fields["num_time_windows"], f"{len(given) - 1}, as the boundaries say")


_TRUTH = (lambda v: isinstance(v, bool), "true or false")
_TIMESTEPS = (lambda v: _integer(v, 1, _MAX_TIMESTEPS), f"an integer from 1 to {_MAX_TIMESTEPS}")
#: What `noise` may say of a diffusion's betas, and of a flow.
_BETAS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "num_train_timesteps": _TIMESTEPS,
    "beta_start": (lambda v: _number(v, 0, 1), "a number from 0 to 1"),
    "beta_end": (lambda v: _number(v, 0, 1), "a number from 0 to 1"),
    "beta_schedule": (lambda v: v in BETA_SCHEDULES, f"one of {', '.join(BETA_SCHEDULES)}"),
    "rescale_betas_zero_snr": _TRUTH,
    "trained_betas": (
        lambda v: isinstance(v, list | tuple) and len(v) <= _MAX_TIMESTEPS and all(_number(b, 0, 1) for b in v),
        f"a list of at most {_MAX_TIMESTEPS} numbers from 0 to 1",
    ),
}
_FLOW_NOISE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "num_train_timesteps": _TIMESTEPS,
    "invert_sigmas": _TRUTH,
    "shift": (lambda v: _number(v, 1e-3, 1e3), "a number from 0.001 to 1000"),
    "use_dynamic_shifting": _TRUTH,
}


def _checked_noise(
    noise: Mapping[str, Any], where: str, rules: Mapping[str, tuple[Callable[[Any], Any], str]]
) -> dict[str, Any]:
    for key, (test, expected) in rules.items():
        if noise.get(key) is not None and not test(noise[key]):
            raise _wrong(where, key, noise[key], expected)
    return {key: noise[key] for key in rules if noise.get(key) is not None}


def _checked_files(weights: Any, where: str) -> dict[str, str]:
    known = ("delta", "lora", "kohya", "residual")
    if not isinstance(weights, dict) or not weights or any(key not in known for key in weights):
        raise _wrong(where, "weights", weights, f"an object with some of the keys {', '.join(known)}")
    return {key: plain_name(name, where) for key, name in weights.items()}
