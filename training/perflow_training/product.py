"""What comes out of a run: the EMA student, its difference to the teacher, a LoRA, and the artefact to publish."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from perflow_diffusers.hub.base import base_facts
from perflow_diffusers.weights import Delta, compute_delta
from perflow_diffusers.weights.extract import extract_lora
from perflow_diffusers.weights.lora_layers import adapter_metadata
from perflow_diffusers.weights.writer import specs_of, write_safetensors

from .checkpoint import readable
from .config import ConfigError, TrainingConfig
from .student import build_student, load_trained

logger = logging.getLogger(__name__)
FORMS = ("student", "delta", "lora", "artifact")
DELTA, LORA = "perflow.safetensors", "pytorch_lora_weights.safetensors"
WITHOUT_ENCODERS = (
    "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder", "feature_extractor",
    "safety_checker",
)  # fmt: skip


def load_pipeline(
    config: TrainingConfig, *, encoders: bool = True, folder: str | Path | None = None
) -> DiffusionPipeline:
    """The teacher's pipeline in float32; without `encoders` only its network and schedule are read.

    `folder` is where `folder_of` has found it when it was read before: the Hub is not asked again, where its files may
    have changed or be out of reach. Raises ConfigError for a name that is no pipeline.
    """
    name, where = config.pretrained_model_name_or_path, {"revision": config.revision}
    if folder is not None and (Path(folder) / "model_index.json").is_file():
        name, where = str(folder), {}
    left_out: dict[str, Any] = {}
    try:
        components = DiffusionPipeline.load_config(name, **where)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`pretrained_model_name_or_path={name}` is neither the folder of a diffusers pipeline nor a Hub id that "
            f"can be had: {error}"
        ) from error
    if not encoders:
        left_out = {part: None for part in WITHOUT_ENCODERS if part in components}
    elif "safety_checker" in components:
        left_out = {"safety_checker": None, "requires_safety_checker": False}
    return DiffusionPipeline.from_pretrained(name, dtype=torch.float32, variant=config.variant, **where, **left_out)


def folder_of(pipe: DiffusionPipeline) -> Path | None:
    """The folder that a pipeline was read from, in the Hub's cache or elsewhere; None if that is not known."""
    folder = Path(str(pipe.unet.config.get("_name_or_path", ""))).absolute().parent
    return folder if (folder / "model_index.json").is_file() else None


def write_products(
    config: TrainingConfig,
    weights: dict[str, Tensor],
    out: str | Path,
    forms: Sequence[str] = ("student", "delta"),
    *,
    lora_rank: int = 64,
    licence: str | None = None,
    base: DiffusionPipeline | None = None,
) -> dict[str, Path]:
    """Writes what `forms` names (of FORMS) from the trained `weights` by name; returns form -> path.

    student: `out`/unet, as diffusers saves it. delta: `out`/perflow.safetensors, fp16. lora: `out`/lora, the one that
    was trained, or one of `lora_rank` extracted from the delta. artifact: `out`/artifact, with card, delta and LoRA,
    ready for `load_perflow`. `base`: the teacher's pipeline in float32, read again by default. Files of an older run
    are replaced.
    """
    unknown = sorted(set(forms) - set(FORMS))
    if unknown:
        raise ConfigError(f"{', '.join(unknown)} cannot be written; expected some of {', '.join(FORMS)}.")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    base = load_pipeline(config, encoders=False) if base is None else base
    student = build_student(base.unet, config, share=False)
    load_trained(student, weights)
    if config.lora_rank:
        student.fuse_lora()
        student.unload_lora()
    paths: dict[str, Path] = {}
    if "student" in forms:
        student.eval().save_pretrained(out / "unet")
        readable(out / "unet", out / "unet" / "config.json")
        paths["student"] = out / "unet"
    if set(forms) & {"delta", "lora", "artifact"}:
        delta = _write_delta(config, base, student, out / DELTA)
        paths["delta"] = out / DELTA
        if "lora" in forms or ("artifact" in forms and config.lora_rank):
            paths["lora"] = _write_lora(config, weights, delta, out / "lora", lora_rank)
    if "artifact" in forms:
        paths["artifact"] = _write_artifact(base, paths, out / "artifact", licence)
    return paths


def header(config: TrainingConfig, base: DiffusionPipeline) -> dict[str, Any]:
    """What travels in the header of every file: how it was trained, how it is to be used, and for which base."""
    scale = config.solve_guidance
    name = config.pretrained_model_name_or_path
    metadata: dict[str, Any] = {
        "base_model": None if Path(name).exists() else name,  # a Hub id; a path says nothing to others
        "prediction_type": config.prediction_type,
        "num_time_windows": config.window_count,
        "window_boundaries": config.window_boundaries,
        "recommended_steps": config.recommended_steps,
        "guidance_scale": 0.0 if scale is None else scale,
        "recommended_guidance_scale": None if scale is None else 1.0,
        "recipe": config.to_dict(),
        **base_facts(base),
    }
    if config.rescale_betas_zero_snr:  # the student knows the rescaled schedule, whatever that of its base was
        metadata["noise"] = {**metadata.get("noise", {}), "rescale_betas_zero_snr": True}
    return {name: value for name, value in metadata.items() if value is not None}


def _write_delta(config: TrainingConfig, base: DiffusionPipeline, student: nn.Module, path: Path) -> Delta:
    return compute_delta(
        base.unet.state_dict(),
        student.state_dict(),
        path,
        dtype=torch.float16,
        metadata=header(config, base),
        overwrite=True,  # as the student beside it: a run must not fail at its end for an older run's file
    )


def _write_lora(config: TrainingConfig, weights: dict[str, Tensor], delta: Delta, folder: Path, rank: int) -> Path:
    """The trained LoRA as diffusers stores one, or the best one for the delta."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LORA
    if not config.lora_rank:
        logger.info("%s", extract_lora(delta, path, rank=rank, overwrite=True))
        return path
    tensors = {f"unet.{name.replace('.default.', '.')}": value.half() for name, value in weights.items()}
    modules = {
        name.removeprefix("unet.").removesuffix(".lora_A.weight"): (
            value.shape[0],
            config.lora_alpha or config.lora_rank,
        )
        for name, value in tensors.items()
        if name.endswith(".lora_A.weight")
    }
    metadata = {
        **delta.metadata,
        "perflow_format": "lora-1",
        "lora_adapter_metadata": json.dumps(adapter_metadata(modules)),
    }
    return write_safetensors(path, specs_of(tensors), tensors.items(), metadata, overwrite=True)


def _write_artifact(base: DiffusionPipeline, paths: dict[str, Path], folder: Path, licence: str | None) -> Path:
    from perflow_diffusers.hub.artifact import PeRFlowArtifact

    artifact = PeRFlowArtifact.from_header(paths["delta"])
    if "lora" in paths:
        artifact = artifact.with_files(lora=paths["lora"])
    if licence is not None:
        artifact = replace(artifact, licence=licence)
    artifact.save(folder, base=base, overwrite=True)
    return folder
