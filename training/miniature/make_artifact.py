"""The miniature's accelerator as it would be published: delta, LoRA in both layouts, settings, card, pictures.

python training/miniature/make_artifact.py runs/miniature/artifact
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from perflow_diffusers.hub import PeRFlowArtifact, load_perflow
from perflow_diffusers.miniature import load_miniature, miniature_folder, miniature_prompts
from perflow_diffusers.weights.make.convert import convert_lora
from perflow_diffusers.weights.make.extract import extract_lora

LICENCE = "apache-2.0"


def miniature_artifact(
    folder: str | Path, *, delta: str | Path | None = None, rank: int = 16, samples: int = 4, overwrite: bool = False
) -> PeRFlowArtifact:
    """Write the artefact of the embedded delta (or of `delta`) to `folder`, with a LoRA of `rank` in both layouts.

    `samples` pictures are drawn for the card, of held-out prompts.
    """
    delta = Path(delta or miniature_folder() / "delta" / "perflow.safetensors")
    pipe = load_miniature()
    artifact = replace(PeRFlowArtifact.from_header(delta), base_model="miniature", licence=LICENCE)
    with tempfile.TemporaryDirectory() as scratch:
        lora = Path(scratch, "pytorch_lora_weights.safetensors")
        kohya = Path(scratch, "perflow_kohya.safetensors")
        extract_lora(delta, lora, rank=rank)
        convert_lora(lora, kohya, "kohya")
        pictures = _pictures(pipe, artifact, samples)
        complete = artifact.with_files(lora=lora, kohya=kohya)
        return complete.save(folder, base=pipe, samples=pictures, overwrite=overwrite)


def _pictures(pipe, artifact: PeRFlowArtifact, count: int) -> list:
    """(prompt, picture) pairs, sampled as the artefact recommends."""
    if not count:
        return []
    prompts = miniature_prompts(count, seed=0)
    clone = load_miniature()
    clone.set_progress_bar_config(disable=True)
    load_perflow(clone, artifact)
    images = clone(
        prompts,
        num_inference_steps=artifact.steps,
        guidance_scale=artifact.guidance_scale,
        generator=torch.Generator().manual_seed(0),
    ).images
    return [(prompt, image.resize((256, 256), 0)) for prompt, image in zip(prompts, images, strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to write it")
    parser.add_argument("--delta", help="another delta than the embedded one")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA (default: 16)")
    parser.add_argument("--overwrite", action="store_true", help="replace an artefact that is there")
    options = parser.parse_args()
    print(miniature_artifact(options.folder, delta=options.delta, rank=options.rank, overwrite=options.overwrite))
