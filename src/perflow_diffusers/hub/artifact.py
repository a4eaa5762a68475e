"""An accelerator with everything that it needs to be used rightly: `PeRFlowArtifact`."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from perflow_diffusers.errors import ArtifactError
from perflow_diffusers.hub.find import Found, find, from_folder
from perflow_diffusers.hub.push import push_perflow
from perflow_diffusers.hub.said import FORMAT_VERSION, from_metadata
from perflow_diffusers.hub.save import save_artifact
from perflow_diffusers.hub.settings import AnyScheduler, Settings
from perflow_diffusers.io.names import HubOptions, Where
from perflow_diffusers.weights import WeightSource
from perflow_diffusers.weights.make.delta import content_hash
from perflow_diffusers.weights.read.live import find_network
from perflow_diffusers.words.arguments import path_of
from perflow_diffusers.words.shown import folded, html_facts

#: The keys of `PeRFlowArtifact.files`.
FILE_FORMS = ("delta", "lora", "kohya")


class _Former(str):
    """A value that was read by the former name of its field."""


@dataclass(frozen=True, repr=False)
class PeRFlowArtifact(Settings):
    """A delta or LoRA, how it was trained, and how it is to be used.

    Fields: `prediction_type` and `num_time_windows` or `window_boundaries`: what the scheduler needs. `process`,
    `window_shift`: the same of a flow-matching base ("flow", and the shift of its windows' time), whose
    `window_boundaries` are noise levels.
    `recommended_steps` and `guidance_scale`: for sampling (`steps` is the first of them). `solve_guidance`: of the
    teacher while training. `base_model`, `base_hash`, `base_prediction_type`, `network`, `base_sample`, `noise`,
    `t_noise`, `t_clean`: what the pipeline must be like. `license`, `recipe`: for people. `files`: form ("delta",
    "lora", "kohya") -> local file or opened weights. `residual`: the file that a LoRA needs beside it. `folder` and
    `name`: where it was found. `version`: of the format.

    Raises `ArtifactError` for settings out of their limits.
    """

    files: Mapping[str, Path | WeightSource] = field(default_factory=dict)
    residual: str | None = None
    folder: Path | None = None
    name: str = ""
    version: int = FORMAT_VERSION

    #: the former name of `license`
    licence: InitVar[str | None] = None

    def __post_init__(self, licence: str | None) -> None:
        if licence is not None and not isinstance(licence, _Former):
            object.__setattr__(self, "license", licence)
        super().__post_init__()

    def __repr__(self) -> str:
        guidance = "" if self.guidance_scale is None else f", guidance {self.guidance_scale:g}"
        has = ", ".join(self.files) or "no weights"
        return folded(
            f"<PeRFlowArtifact {self.name or 'without a name'}: {self.prediction_type}, {self.num_time_windows} "
            f"windows, steps {self.steps_in_words}{guidance}; base {self.base_model or 'not said'}; {has}>"
        )

    def _repr_html_(self) -> str:
        return html_facts(self.name, {**self.facts, "licence": self.license or "not said"}.items())

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
        """From `source`: a folder, a file, a short name or a Hub id, in this order.

        `weights`: "auto" (the delta if there is one, else the LoRA), "delta", "lora", "all", or "none" for settings
        alone. `where`: the options of `open_weights`, as in diffusers. Errors as above.
        """
        return cls.of(find(source, weights, Where(**where)))

    @classmethod
    def of(cls, found: Found) -> "PeRFlowArtifact":
        """From what was found and checked; `ArtifactError` if nothing says how the weights were trained."""
        said = found.said
        if said.prediction_type is None:
            raise ArtifactError(
                f"{found.name} does not say how it was trained (no prediction_type in a header, perflow.json or "
                "scheduler/scheduler_config.json). Look at its card; then merge it with `merge_delta` and set "
                "`PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type=...)` yourself."
            )
        own = cls.__dataclass_fields__.keys() - {"guidance_scale", "licence"}
        known = {key: value for key, value in vars(said).items() if key in own and value is not None}
        sampling = said.recommended_guidance_scale
        return cls(**known, guidance_scale=sampling, files=dict(found.sources), folder=found.folder, name=found.name)

    def is_base(self, pipe_or_unet: Any) -> bool:
        """Whether a network is bit for bit the base (in the same dtype); reads all of its weights."""
        return self.base_hash is not None and content_hash(find_network(pipe_or_unet)) == self.base_hash

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
        save_artifact(self, self.files, place, base=base, samples=list(samples), overwrite=overwrite)
        return PeRFlowArtifact.from_folder(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish the folder that this artefact was saved to; `repo_id`, `options` and errors as in `push_perflow`."""
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


# What `replace` reads of the old artefact by the former name must not win over what it is given by the new one.
PeRFlowArtifact.licence = property(  # type: ignore[attr-defined]
    lambda artifact: None if artifact.license is None else _Former(artifact.license)
)


def perflow_scheduler(config: Any, metadata: Mapping[str, str]) -> AnyScheduler:
    """PeRFlow's scheduler for a pipeline's scheduler config and what a delta's header says of its training."""
    return PeRFlowArtifact.from_header(dict(metadata)).make_scheduler(config)
