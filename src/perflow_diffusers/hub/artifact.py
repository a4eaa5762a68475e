"""An accelerator with everything that it needs to be used rightly: `PeRFlowArtifact`."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from perflow_diffusers.errors import ArtifactError
from perflow_diffusers.hub.find import Found, find, from_folder
from perflow_diffusers.hub.push import push_perflow
from perflow_diffusers.hub.save import save_artifact
from perflow_diffusers.hub.settings import FORMAT_VERSION, expectation, from_metadata
from perflow_diffusers.io.names import HubOptions, Where
from perflow_diffusers.schedulers.scheduling_perflow import PeRFlowScheduler
from perflow_diffusers.weights import WeightSource
from perflow_diffusers.weights.make.delta import content_hash
from perflow_diffusers.weights.read.live import find_unet
from perflow_diffusers.words.arguments import path_of
from perflow_diffusers.words.shown import LongDict, folded, html_facts, shorten

#: The keys of `PeRFlowArtifact.files`.
FILE_FORMS = ("delta", "lora", "kohya")


@dataclass(frozen=True, repr=False)
class PeRFlowArtifact:
    """A delta or LoRA, how it was trained, and how it is to be used.

    Fields: `prediction_type` and `num_time_windows` or `window_boundaries`: what the scheduler needs.
    `recommended_steps` and `guidance_scale`: for sampling (`steps` is the first of them). `solve_guidance`: of the
    teacher while training. `base_model`, `base_hash`, `base_prediction_type`, `network`, `base_sample`, `noise`,
    `t_noise`, `t_clean`: what the pipeline must be like. `licence`, `recipe`: for people. `files`: form ("delta",
    "lora", "kohya") -> local file or opened weights. `residual`: the file that a LoRA needs beside it. `folder` and
    `name`: where it was found. `version`: of the format.

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
    licence: str | None = None
    t_noise: float | None = None
    t_clean: float | None = None
    network: Mapping[str, Any] = field(default_factory=dict)
    base_sample: Mapping[str, Any] = field(default_factory=dict)
    noise: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path | WeightSource] = field(default_factory=dict)
    residual: str | None = None
    folder: Path | None = None
    name: str = ""
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        stored = {"guidance_scale": "recommended_guidance_scale", "solve_guidance": "guidance_scale"}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            expected = expectation(stored.get(name, name), value) if value != () else None
            if expected is not None:
                raise ArtifactError(f"PeRFlowArtifact({name}={value!r:.80}); expected {expected}.")
        shorten(self)

    def __repr__(self) -> str:
        guidance = "" if self.guidance_scale is None else f", guidance {self.guidance_scale:g}"
        has = ", ".join(self.files) or "no weights"
        return folded(
            f"<PeRFlowArtifact {self.name or 'without a name'}: {self.prediction_type}, {self.num_time_windows} "
            f"windows, steps {self.steps_in_words}{guidance}; base {self.base_model or 'not said'}; {has}>"
        )

    def _repr_html_(self) -> str:
        return html_facts(self.name, {**self.facts, "licence": self.licence or "not said"}.items())

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
    def lora_file(self) -> Path:
        """The file of the LoRA, which pipelines read with their own loader; `ArtifactError` if there is none."""
        given = self.files.get("lora")
        files = given.files if isinstance(given, WeightSource) else (given,) if given is not None else ()
        if len(files) != 1:
            raise ArtifactError(f"{self.name} has no LoRA in one .safetensors file. Write it to one first.")
        return files[0]

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "PeRFlowArtifact":
        """The artefact in a folder that `save` wrote, or any folder of weights whose header says enough.

        Raises `ArtifactError` (a ValueError) for settings that are missing, contradictory or out of their limits.
        """
        place = path_of(folder, "folder", 'PeRFlowArtifact.from_folder("artefact")', ArtifactError)
        return cls.of(from_folder(place, "all"))

    @classmethod
    def from_header(cls, source: Any) -> "PeRFlowArtifact":
        """From bare weights (a file, an opened source) or from their header alone (str -> str). Errors as above."""
        if isinstance(source, Mapping) and all(isinstance(value, str) for value in source.values()):
            return cls.of(Found("the given header", from_metadata(source, "the given header")))
        return cls.of(find(source, "all"))

    @classmethod
    def from_pretrained(cls, source: Any, weights: str = "auto", **where: Unpack[HubOptions]) -> "PeRFlowArtifact":
        """From a folder, a file, a short name or a Hub id, in this order.

        `weights`: "auto" (the delta if there is one, else the LoRA), "delta", "lora", "all", or "none" for settings
        alone. `where`: the options of `open_weights`, as in diffusers. Errors as above.
        """
        return cls.of(find(source, weights, Where(**where)))

    @classmethod
    def of(cls, found: Found) -> "PeRFlowArtifact":
        """From what was found and checked; `ArtifactError` if nothing says how the weights were trained."""
        fields = dict(found.fields)
        if "prediction_type" not in fields:
            raise ArtifactError(
                f"{found.name} does not say how it was trained (no prediction_type in a header, perflow.json or "
                "scheduler/scheduler_config.json). Look at its card; then merge it with `merge_delta` and set "
                "`PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type=...)` yourself."
            )
        solve, sampling = fields.pop("guidance_scale", None), fields.pop("recommended_guidance_scale", None)
        known = {key: value for key, value in fields.items() if key in cls.__dataclass_fields__}
        return cls(
            **known,
            guidance_scale=sampling,
            solve_guidance=solve,
            files=dict(found.sources),
            folder=found.folder,
            name=found.name,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """All of it that is not a file, as `perflow.json` holds it (JSON types)."""
        content = {
            "prediction_type": self.prediction_type,
            "num_time_windows": self.num_time_windows,
            "window_boundaries": list(self.window_boundaries) if self.window_boundaries else None,
            "recommended_steps": list(self.recommended_steps) or None,
            "recommended_guidance_scale": self.guidance_scale,
            "guidance_scale": self.solve_guidance,
            "base_model": self.base_model,
            "base_hash": self.base_hash,
            "base_prediction_type": self.base_prediction_type,
            "licence": self.licence,
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

    def is_base(self, pipe_or_unet: Any) -> bool:
        """Whether a UNet is bit for bit the base (in the same dtype); reads all of its weights."""
        return self.base_hash is not None and content_hash(find_unet(pipe_or_unet)) == self.base_hash

    def save(
        self,
        folder: str | os.PathLike,
        *,
        base: Any = None,
        samples: Iterable[tuple[str, Any]] = (),
        overwrite: bool = False,
    ) -> "PeRFlowArtifact":
        """Write everything into `folder`: weights with complete headers, settings, scheduler, card, pictures.

        `base`: the pipeline (or its folder) that it was trained on; adds the network's signature and a sample of its
        weights, by which loading recognises it. Merges that can be undone do not count as the base's. `samples`:
        (prompt, PIL picture) pairs for the card. Returns the artefact in `folder`. Raises `ArtifactError` or
        `WeightWriteError` if something is there already or cannot be written, `DeltaError` if the delta is a complete
        model, `MergeError` if the base's own weights are gone.
        """
        place = path_of(folder, "folder", 'artifact.save("artefact", base=pipe)', ArtifactError)
        save_artifact(self, place, base=base, samples=list(samples), overwrite=overwrite)
        return PeRFlowArtifact.from_folder(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish the folder that this artefact was saved to; `options` and errors as in `push_perflow`."""
        if self.folder is None or not (self.folder / "perflow.json").is_file():
            raise ArtifactError("This artefact is not in a folder yet. Call `save(folder)` first and push its result.")
        return push_perflow(self.folder, repo_id, **options)

    def with_files(self, **files: Any) -> "PeRFlowArtifact":
        """A copy with more files: `with_files(lora="my_lora.safetensors", kohya="for_webui.safetensors")`."""
        unknown = [form for form in files if form not in FILE_FORMS]
        if unknown:
            raise ArtifactError(f"{unknown[0]}=... is no form of weights. Pass {', '.join(FILE_FORMS)}.")
        order = 'with_files(lora="my_lora.safetensors")'
        paths = {form: path_of(path, form, order, ArtifactError) for form, path in files.items()}
        return replace(self, files={**self.files, **paths})


def perflow_scheduler(config: Any, metadata: Mapping[str, str]) -> PeRFlowScheduler:
    """PeRFlow's scheduler for a pipeline's scheduler config and what a delta's header says of its training."""
    return PeRFlowArtifact.from_header(dict(metadata)).make_scheduler(config)
