"""The miniature's flow-matching pipeline with an accelerator of random weights, and what diffusers alone draws."""

from types import SimpleNamespace

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from perflow_diffusers import load_miniature
from perflow_diffusers.hub import PeRFlowArtifact
from perflow_diffusers.weights import compute_delta
from perflow_diffusers.weights.make.extract import extract_lora

PROMPT = "a happy person with red hair"
#: s u / (1 + (s - 1) u) at u = 1, 3/4, 1/2, 1/4, 0 and s = 2
BOUNDARIES = [1.0, 6 / 7, 2 / 3, 2 / 5, 0.0]
SETTINGS = {
    "prediction_type": "velocity",
    "window_boundaries": BOUNDARIES,
    "window_shift": 2.0,
    "recommended_steps": [4],
    "recommended_guidance_scale": 1.0,
}


def flow_pipe(**scheduler):
    """The pipeline, its scheduler's configuration changed by `scheduler`."""
    pipe = load_miniature("flow")
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **scheduler)
    return pipe


def changed(pipe):
    """The pipeline with other weights, each moved by at most a hundredth of its own size, on a grid that sums exactly.

    Layers only: a LoRA of high rank can hold them, too.
    """
    torch.manual_seed(5)
    for name, weight in pipe.transformer.state_dict().items():
        if weight.ndim == 2 and "transformer_blocks" in name:
            weight.add_(torch.randn_like(weight) * weight.std() * 0.05)
    return pipe


def make_accelerator(folder, **settings):
    """An artefact with delta and LoRA; fields: folder, delta, lora."""
    base, tuned = flow_pipe(), changed(flow_pipe())
    delta, lora = folder / "delta.safetensors", folder / "lora.safetensors"
    compute_delta(base.transformer, tuned.transformer, delta, metadata={**SETTINGS, **settings})
    extract_lora(delta, lora, rank=96, dtype=torch.float32)
    artifact = PeRFlowArtifact.from_header(delta).with_files(lora=lora)
    artifact.save(folder / "artifact", base=base)
    return SimpleNamespace(folder=folder / "artifact", delta=delta, lora=lora)


def draw(pipe, steps=4, guidance_scale=1.0, **options):
    """Pictures (B, 32, 32, 3), two of one prompt unless `options` say another."""
    return pipe(
        options.pop("prompt", [PROMPT] * 2),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **options,
    ).images


def drawn_by_diffusers(pipe, levels, guidance_scale=1.0, **options):
    """The same on the noise levels `levels` (the end 0 left out), with diffusers' Euler scheduler and its weights."""
    former = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    try:
        return draw(pipe, len(levels), guidance_scale, sigmas=np.array(levels), **options)
    finally:
        pipe.scheduler = former
