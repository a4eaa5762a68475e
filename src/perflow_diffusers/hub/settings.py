"""How an accelerator was trained and is to be used, without its files: `Settings`."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from perflow_diffusers.errors import ArtifactError
from perflow_diffusers.flow import SigmaWindows
from perflow_diffusers.hub.said import expectation, flow_misfit, process_of
from perflow_diffusers.schedulers.scheduling_flow_match_perflow import FlowMatchPeRFlowScheduler
from perflow_diffusers.schedulers.scheduling_perflow import PeRFlowScheduler
from perflow_diffusers.words.shown import LongDict, shorten

AnyScheduler = PeRFlowScheduler | FlowMatchPeRFlowScheduler


@dataclass(frozen=True, repr=False)
class Settings:
    """What `perflow.json`, a header and a card say of an accelerator; the fields are those of `PeRFlowArtifact`.

    One of a flow-matching base has `process` "flow", `window_boundaries` that are noise levels, and their
    `window_shift`; any of the three says so.

    Raises `ArtifactError` for settings out of their limits.
    """

    prediction_type: str
    num_time_windows: int = 4
    window_boundaries: tuple[int, ...] | tuple[float, ...] | None = None
    recommended_steps: tuple[int, ...] = ()
    guidance_scale: float | None = None
    solve_guidance: float | None = None
    base_model: str | None = None
    base_hash: str | None = None
    base_prediction_type: str | None = None
    license: str | None = None
    t_noise: float | None = None
    t_clean: float | None = None
    network: Mapping[str, Any] = field(default_factory=dict)
    base_sample: Mapping[str, Any] = field(default_factory=dict)
    noise: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    process: str | None = None
    window_shift: float | None = None

    def __post_init__(self) -> None:
        for name in (one.name for one in fields(self)):
            value = getattr(self, name)
            stored = "recommended_guidance_scale" if name == "guidance_scale" else name
            expected = expectation(stored, value) if value != () else None
            if expected is not None:
                raise ArtifactError(f"PeRFlowArtifact({name}={value!r:.80}); expected {expected}.")
        object.__setattr__(self, "process", process_of(vars(self)))
        if self.is_flow:
            self._complete_flow()
        shorten(self)

    def _complete_flow(self) -> None:
        wrong = flow_misfit(vars(self))
        if wrong is not None:
            raise ArtifactError(f"PeRFlowArtifact({wrong[0]}={getattr(self, wrong[0])!r:.80}); expected {wrong[1]}.")
        if self.window_shift is None:
            raise ArtifactError(
                "PeRFlowArtifact(window_shift=None) for a flow-matching base; expected the shift of the time in which "
                "the steps inside its windows are even, as it was trained (1.0 for even noise levels)."
            )
        try:
            windows = SigmaWindows.of(self.window_boundaries, self.num_time_windows, self.window_shift)
        except ValueError as error:
            raise ArtifactError(f"PeRFlowArtifact(window_boundaries=...): {error}") from None
        object.__setattr__(self, "window_boundaries", windows.boundaries)
        object.__setattr__(self, "num_time_windows", windows.num_windows)
        object.__setattr__(self, "window_shift", windows.shift)

    @property
    def is_flow(self) -> bool:
        """Whether its base is one of flow matching, rather than a diffusion with betas."""
        return self.process is not None

    @property
    def facts(self) -> dict[str, Any]:
        """What people want to know, by its name in words, as far as it is said."""
        rows = {
            "prediction type": self.prediction_type,
            "process": self.process,
            "time windows": self.windows_in_words,
            "recommended steps": self.steps_in_words,
            "recommended guidance": self.guidance_scale,
            "guidance in training": self.solve_guidance,
            "base": self.base_model,
            "base hash": self.base_hash,
            "base predicts": self.base_prediction_type,
            "network": ", ".join(f"{key} {value}" for key, value in self.network.items()) or None,
        }
        return LongDict({name: value for name, value in rows.items() if value is not None})

    @property
    def windows_in_words(self) -> str:
        """Number, boundaries and shift of the windows: "4, boundaries [1.0, 0.8571, 0.6667, 0.4, 0.0], shift 2"."""
        shift = "" if self.window_shift is None else f", shift {self.window_shift:g}"
        boundaries = f", boundaries {short(self.window_boundaries)}" if self.window_boundaries else ""
        return f"{self.num_time_windows}{boundaries}{shift}"

    @property
    def steps_in_words(self) -> str:
        """The recommended numbers of steps: "4 or 8"."""
        return " or ".join(map(str, self.recommended_steps or (self.steps,)))

    @property
    def steps(self) -> int:
        """Steps to sample with: the first recommended number, or one a window."""
        return self.recommended_steps[0] if self.recommended_steps else self.num_time_windows

    @property
    def settings(self) -> dict[str, Any]:
        """All of it that is not a file, as `perflow.json` holds it (JSON types)."""
        content = {
            "prediction_type": self.prediction_type,
            "process": self.process,
            "num_time_windows": self.num_time_windows,
            "window_boundaries": list(self.window_boundaries) if self.window_boundaries else None,
            "window_shift": self.window_shift,
            "recommended_steps": list(self.recommended_steps) or None,
            "recommended_guidance_scale": self.guidance_scale,
            "solve_guidance": self.solve_guidance,
            "base_model": self.base_model,
            "base_hash": self.base_hash,
            "base_prediction_type": self.base_prediction_type,
            "license": self.license,
            "t_noise": self.t_noise,
            "t_clean": self.t_clean,
            "network": dict(self.network) or None,
            "base_sample": dict(self.base_sample) or None,
            "noise": dict(self.noise) or None,
            "recipe": dict(self.recipe) or None,
        }
        return LongDict({key: value for key, value in content.items() if value is not None})

    @property
    def metadata(self) -> dict[str, str]:
        """The same for the header of a safetensors file (str -> str, others as JSON)."""
        said = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in self.settings.items()}
        return LongDict(said)

    def make_scheduler(self, config: Any) -> AnyScheduler:
        """PeRFlow's scheduler for these weights, from the configuration of the pipeline's own scheduler.

        `FlowMatchPeRFlowScheduler` for those of a flow-matching base, whose windows do not depend on the pipeline.
        Raises ValueError if the base is of another process, or its noise schedule does not allow the prediction type.
        """
        if self.is_flow:
            windows = {"window_boundaries": list(self.window_boundaries or ()), "window_shift": self.window_shift}
            return FlowMatchPeRFlowScheduler.from_config(config, reshift=False, **windows)
        options: dict[str, Any] = {"num_time_windows": self.num_time_windows}
        if self.window_boundaries is not None:
            options["window_boundaries"] = list(self.window_boundaries)
        for key in ("t_noise", "t_clean"):
            if getattr(self, key) is not None:
                options[key] = getattr(self, key)
        return PeRFlowScheduler.from_config(config, prediction_type=self.prediction_type, **options)


def short(boundaries: Iterable[float]) -> list[float]:
    """Boundaries for people: noise levels to four decimals, timesteps as they are."""
    return [round(boundary, 4) for boundary in boundaries]
