"""What comes out of a run: the EMA student, its difference to the teacher, a LoRA, and the artefact to publish."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from perflow_diffusers.hub.artifact import PeRFlowArtifact
from perflow_diffusers.hub.base import base_facts
from perflow_diffusers.io.writer import drop_shards, make_folder, write_folder, write_safetensors
from perflow_diffusers.weights import WeightSource, compute_delta, content_hash
from perflow_diffusers.weights.make.extract import extract_lora
from perflow_diffusers.weights.make.lora_file import LORA_FORMAT, LORA_NAME
from perflow_diffusers.weights.merge.files import WEIGHTS_NAME
from perflow_training.config import FORMS, ConfigError, TrainingConfig
from perflow_training.config.data import SOURCES
from perflow_training.lazy import as_source, read_afresh
from perflow_training.places import URL
from perflow_training.student import build_student, check_trained, trained
from perflow_training.student_weights import student_weights, trained_lora
from perflow_training.teacher.base import Base, base_in_folder, loaded_base
from perflow_training.teacher.load import MODEL_INDEX, load_pipeline

logger = logging.getLogger(__name__)
DELTA = "perflow.safetensors"
SHARD = 10 * 10**9  # bytes, as in diffusers


def open_base(config: TrainingConfig, folder: str | Path | None = None) -> Base:
    """The teacher for `write_products`; `folder` as in `load_pipeline`, and ConfigError for the same reasons."""
    name = config.pretrained_model_name_or_path
    title = _last_name(name)
    for place in (folder, name):
        if place is not None and (Path(place) / MODEL_INDEX).is_file():
            found = base_in_folder(Path(place), config.variant, title)
            if found is not None:
                return found
            break
    return loaded_base(load_pipeline(config, encoders=False, folder=folder), title)


def write_products(
    config: TrainingConfig,
    weights: Mapping[str, Tensor],
    out: str | Path,
    forms: Sequence[str] | None = None,
    *,
    lora_rank: int = 64,
    license: str | None = None,
    base: Base | None = None,
) -> dict[str, Path]:
    """Writes `forms` (of FORMS; None: those of `config`) of the trained `weights` by name; returns form -> path.

    student: `out`/unet, or what else the pipeline calls its network, as diffusers saves it. delta:
    `out`/perflow.safetensors, fp16. lora: `out`/lora, the one that was trained, or one of `lora_rank` extracted from
    the delta, which is then written, too. artifact: `out`/artifact, ready for `load_perflow`, with a card and what
    else is written of delta and LoRA; what was trained in any case.
    `base` is `open_base(config)` by default. Files of an older run are replaced.

    Memory: a few tensors, and the LoRA if it has to be extracted; `weights` can be lazy.
    """
    forms = config.forms if forms is None else forms
    unknown = sorted(set(forms) - set(FORMS))
    if unknown:
        raise ConfigError(f"{', '.join(unknown)} cannot be written; expected some of {', '.join(FORMS)}.")
    base = open_base(config) if base is None else base
    given = as_source(weights, "the trained weights")
    lora = trained_lora(config, given, base.component) if config.lora_rank else None
    expected = dict(base.network.named_parameters()) if lora is None else trained(build_student(base.network, config))
    check_trained(expected, given.shapes)
    student = student_weights(config, base.weights, given, base.component)
    facts = header(config, base.pipeline)
    out = make_folder(Path(out))
    paths: dict[str, Path] = {}
    if "student" in forms:
        paths["student"] = _write_student(base.network, student, out / base.component)
    base_hash = None
    if "delta" in forms or (lora is None and set(forms) & {"lora", "artifact"}):
        # files of an older run are replaced, as the student is: a run must not fail at its end for them
        delta = compute_delta(base.weights, student, out / DELTA, dtype=torch.float16, metadata=facts, overwrite=True)
        paths["delta"], base_hash = out / DELTA, delta.metadata["base_hash"]
    if lora is not None and set(forms) & {"lora", "artifact"}:
        origin = {"base_hash": base_hash or content_hash(base.weights)}
        paths["lora"] = _write_lora(lora, {**facts, **origin}, out / "lora")
    elif "lora" in forms:
        paths["lora"] = _extracted(out / DELTA, out / "lora", lora_rank)
    if "artifact" in forms:
        paths["artifact"] = _write_artifact(base.pipeline, paths, out / "artifact", license)
    return paths


#: options of the run on its machine, and those that can name a place on it
PRIVATE = ("output_dir", "resume_from_checkpoint", "report_to", "tracker_project_name", "product")
PLACES = ("pretrained_model_name_or_path", *SOURCES, "dataset_files", "train_cache_dir")


def header(config: TrainingConfig, base: DiffusionPipeline | Path) -> dict[str, Any]:
    """What travels in the header of every file: how it was trained, how it is to be used, and for which base."""
    scale = config.mean_guidance
    name = config.pretrained_model_name_or_path
    metadata: dict[str, Any] = {
        "base_model": None if _is_local(name) else name,  # a Hub id; a path says nothing to others
        "prediction_type": config.parameterisation,
        "num_time_windows": config.window_count,
        "window_boundaries": _boundaries(config),
        "window_shift": config.window_shift,
        "recommended_steps": config.recommended_steps,
        "solve_guidance": 0.0 if scale is None else scale,
        "recommended_guidance_scale": _sampled_with(config),
        "base": _last_name(name),
        "recipe": recipe(config),
        **base_facts(base),
    }
    if config.rescale_betas_zero_snr:  # the student knows the rescaled schedule, whatever that of its base was
        metadata["noise"] = {**metadata.get("noise", {}), "rescale_betas_zero_snr": True}
    return {name: value for name, value in metadata.items() if value is not None}


def _sampled_with(config: TrainingConfig) -> float | None:
    """The guidance scale for sampling: 1, off, where the teacher's guidance was solved in and no other is known."""
    if config.recommended_guidance_scale is not None:
        return config.recommended_guidance_scale
    return None if config.mean_guidance is None else 1.0


def _boundaries(config: TrainingConfig) -> list[float] | list[int] | None:
    """Timesteps as whole numbers, noise levels as they are."""
    given = config.window_boundaries
    return given if given is None or config.flow else [int(boundary) for boundary in given]


def recipe(config: TrainingConfig) -> dict[str, Any]:
    """The options as they may be published: what a run is told of its machine is left out, of paths the last name.

    Addresses lose what may be a secret: user, password and query.
    """
    said = {name: value for name, value in config.to_dict().items() if name not in PRIVATE}
    for name in PLACES:
        value = said.get(name)
        if value:
            said[name] = [_last_name(one) for one in value] if isinstance(value, list) else _last_name(value)
    return said


def _last_name(place: str) -> str:
    """What a path, an address or a shell command may say to others; a Hub id stays as it is."""
    if place.startswith("pipe:"):
        return "pipe:..."
    if URL.match(place):
        parts = urlsplit(place)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return Path(place).name if _is_local(place) else place


def _is_local(place: str) -> bool:
    """Whether a name is a path, be it here or, as for an export elsewhere, no longer; a Hub id has two parts."""
    path = Path(place)
    return path.exists() or path.is_absolute() or len(path.parts) > 2 or place.startswith(("~", "."))


def _write_student(network: Any, weights: WeightSource, folder: Path) -> Path:
    """Config and weights, in shards from the size on from which diffusers writes shards."""
    network.save_config(make_folder(folder))
    specs = {name: (weights.shapes[name], weights.dtypes[name]) for name in weights}
    tensors = ((name, weights[name]) for name in specs)
    if weights.nbytes > SHARD:
        write_folder(folder, specs, tensors, max_shard_size=SHARD, overwrite=True)
        (folder / WEIGHTS_NAME).unlink(missing_ok=True)
    else:
        write_safetensors(folder / WEIGHTS_NAME, specs, tensors, {"format": "pt"}, overwrite=True)
        drop_shards(folder)  # diffusers would go on loading those of an older student
    return folder


def _write_lora(lora: WeightSource, facts: dict[str, Any], folder: Path) -> Path:
    """The trained LoRA in fp16, as diffusers stores one."""
    specs = {name: (shape, torch.float16) for name, shape in lora.shapes.items()}
    said = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    fixed = {"format": "pt", "perflow_format": LORA_FORMAT, "dtype": "F16"}
    return write_safetensors(
        make_folder(folder) / LORA_NAME,
        specs,
        ((name, lora[name].half()) for name in specs),
        {**said, **fixed, **lora.metadata},
        overwrite=True,
    )


def _extracted(delta: Path, folder: Path, rank: int) -> Path:
    """The best LoRA of a rank for a delta."""
    path = make_folder(folder) / LORA_NAME
    logger.info("%s", extract_lora(read_afresh(delta), path, rank=rank, overwrite=True))
    return path


def _write_artifact(base: DiffusionPipeline | Path, paths: dict[str, Path], folder: Path, license: str | None) -> Path:
    weights = {form: paths[form] for form in ("delta", "lora") if form in paths}
    artifact = PeRFlowArtifact.from_header(next(iter(weights.values()))).with_files(**weights)
    if license is not None:
        artifact = replace(artifact, license=license)
    artifact.save(folder, base=base, overwrite=True)
    return folder
