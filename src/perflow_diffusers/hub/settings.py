"""How an accelerator was trained and is to be used, without its files: `Settings`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from perflow_diffusers.errors import ArtifactError
from perflow_diffusers.hub.said import expectation
from perflow_diffusers.schedulers.scheduling_perflow import PeRFlowScheduler
from perflow_diffusers.words.shown import LongDict, shorten


@dataclass(frozen=True, repr=False)
class Settings:
    """What `perflow.json`, a header and a card say of an accelerator; the fields are those of `PeRFlowArtifact`.

    Raises `ArtifactError` for settings out of their limits.
    """

    prediction_type: str
    num_time_windows: int = 4
    window_boundaries: tuple[int, ...] | None = None
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

    def __post_init__(self) -> None:
        for name in (one.name for one in fields(self)):
            value = getattr(self, name)
            stored = "recommended_guidance_scale" if name == "guidance_scale" else name
            expected = expectation(stored, value) if value != () else None
            if expected is not None:
                raise ArtifactError(f"PeRFlowArtifact({name}={value!r:.80}); expected {expected}.")
        shorten(self)

    @property
    def facts(self) -> dict[str, Any]:
        """What people want to know, by its name in words, as far as it is said."""
        boundaries = f", boundaries {list(self.window_boundaries)}" if self.window_boundaries else ""
        rows = {
            "prediction type": self.prediction_type,
            "time windows": f"{self.num_time_windows}{boundaries}",
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
            "num_time_windows": self.num_time_windows,
            "window_boundaries": list(self.window_boundaries) if self.window_boundaries else None,
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

    def make_scheduler(self, config: Any) -> PeRFlowScheduler:
        """PeRFlow's scheduler for these weights, from the configuration of the pipeline's own scheduler.

        Raises ValueError if the noise schedule does not allow the prediction type.
        """
        options: dict[str, Any] = {"num_time_windows": self.num_time_windows}
        if self.window_boundaries is not None:
            options["window_boundaries"] = list(self.window_boundaries)
        for key in ("t_noise", "t_clean"):
            if getattr(self, key) is not None:
                options[key] = getattr(self, key)
        return PeRFlowScheduler.from_config(config, prediction_type=self.prediction_type, **options)
