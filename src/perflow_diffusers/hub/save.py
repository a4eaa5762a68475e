"""Write an artefact's folder: weights with complete headers, settings, scheduler, card, pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from perflow_diffusers.errors import ArtifactError
from perflow_diffusers.hub.base import base_facts, base_weights, scheduler_config
from perflow_diffusers.hub.card import artifact_card
from perflow_diffusers.hub.find import CARD, SCHEDULER, SETTINGS, WEIGHTS
from perflow_diffusers.hub.said import FORMAT_VERSION, checked
from perflow_diffusers.hub.settings import Settings
from perflow_diffusers.io.documents import check_free, copy_file, inside, place, write_json, write_text
from perflow_diffusers.io.writer import write_safetensors
from perflow_diffusers.weights import DeltaError, WeightSource, content_hash, open_weights
from perflow_diffusers.weights.read.complete import check_difference
from perflow_diffusers.weights.read.keys import is_original_format
from perflow_diffusers.weights.read.lora import RESIDUAL_KEY, as_delta, open_residual

#: File names by form; the residual is what a LoRA cannot carry.
NAMES = {**WEIGHTS, "kohya": "perflow_kohya.safetensors"}
RESIDUAL_NAME = "pytorch_lora_weights.residual.safetensors"
_PREDICTS = "base_prediction_type"


def save_artifact(
    said: Settings,
    files: Mapping[str, Any],
    folder: Path,
    *,
    base: Any,
    samples: Sequence[tuple[str, Any]],
    overwrite: bool,
) -> None:
    """`PeRFlowArtifact.save`: everything is checked before the first file is written."""
    sources = {form: open_weights(given) for form, given in files.items() if form in NAMES}
    if not sources:
        raise ArtifactError("This artefact has no weights to save. Add them with `with_files(delta=...)`.")
    if "delta" in sources:
        _check_delta(sources["delta"])
    said = _completed(said, base)
    settings = said.settings
    checked(settings, "the artefact to save")
    residuals = {form: _residual(source) for form, source in sources.items()}
    scheduler = _scheduler(said, base)
    pictures = [f"images/sample-{number}.png" for number in range(len(samples))]
    weights = {form: NAMES[form] for form in sources}
    if any(residuals.values()):
        weights["residual"] = RESIDUAL_NAME
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*weights.values(), SETTINGS, SCHEDULER, CARD, *pictures):
        check_free(inside(folder, name), overwrite)
    for form, source in sources.items():
        header = {**source.metadata, **said.metadata}
        if residuals[form] is not None:
            header[RESIDUAL_KEY] = RESIDUAL_NAME
        _write(source, folder / NAMES[form], header, overwrite)
    for residual in [path for path in residuals.values() if path is not None][:1]:  # the same in every layout
        copy_file(residual, folder, RESIDUAL_NAME, overwrite=overwrite)
    for (_, picture), name in zip(samples, pictures, strict=True):
        place(folder, name, overwrite, lambda path, picture=picture: picture.save(path, "PNG"))  # type: ignore[misc]
    write_text(folder, SCHEDULER, scheduler, overwrite=overwrite)
    captions = [(prompt, name) for (prompt, _), name in zip(samples, pictures, strict=True)]
    card = artifact_card(said, folder.name, list(weights), captions)
    write_text(folder, CARD, str(card), overwrite=overwrite)
    content = {"format_version": FORMAT_VERSION, "weights": weights, **settings}
    write_json(folder, SETTINGS, content, overwrite=overwrite)


def _write(source: WeightSource, path: Path, header: dict[str, str], overwrite: bool) -> None:
    specs = {name: (source.shapes[name], source.dtypes[name]) for name in source}
    tensors = ((name, source[name]) for name in specs)
    write_safetensors(path, specs, tensors, dict(sorted(header.items())), overwrite=overwrite)


def _check_delta(source: WeightSource) -> None:
    """Raise `DeltaError` for a model in place of a delta."""
    if is_original_format(source):
        raise DeltaError(f"{source.name} is a complete checkpoint, not a delta. Make one with `compute_delta`.")
    delta = as_delta(source)
    if not delta.partial:
        check_difference(delta, delta.canonical[0])


def _residual(source: WeightSource) -> Path | None:
    """The file that a LoRA says it needs beside it."""
    files = open_residual(source).files
    return files[0] if files else None


def _completed(said: Settings, base: Any) -> Settings:
    """With what a pipeline (or its folder) says about itself, where the settings do not say it yet."""
    if base is None:
        return said
    more = base_facts(base)
    # Said by the training first: it may have rescaled the schedule of the pipeline that it started from.
    more = {key: value for key, value in more.items() if key not in ("noise", _PREDICTS) or not getattr(said, key)}
    if said.base_hash is None:
        more["base_hash"] = content_hash(base_weights(base))
    return replace(said, **more)


def _scheduler(said: Settings, base: Any) -> str:
    """The JSON of our scheduler's configuration."""
    known = {**said.noise, "prediction_type": said.base_prediction_type}
    if said.is_flow and base is None:
        known["_class_name"] = "FlowMatchEulerDiscreteScheduler"
    known = {key: value for key, value in known.items() if value is not None}
    own = scheduler_config(base)
    if "_use_default_values" in own:  # only of a live scheduler, by which it is told from a plain dict
        known["_use_default_values"] = [key for key in own["_use_default_values"] if key not in known]
    scheduler: Any = said.make_scheduler({**own, **known})
    return str(scheduler.to_json_string())
