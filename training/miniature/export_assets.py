"""Writes trained parts of the miniature, in fp16, to where the package embeds them.

    python export_assets.py --base runs/miniature/base --disco runs/miniature/disco

Each part is optional: the base is exported before the delta is trained, so that the delta belongs to the fp16 weights.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel

from perflow_diffusers import extract_lora
from perflow_diffusers.miniature import MINIATURE_FLOW_LEFT_OUT, load_miniature, miniature_folder
from pictures import load_pictures

LORA_RANK = 8  # what fits into 15 MB; what other ranks keep: benchmarks/delta_sizes.py


def export_base(source: Path, out: Path) -> None:
    """The pipeline in fp16, with the sampler that its reference pictures come from."""
    pipe = StableDiffusionPipeline.from_pretrained(source, dtype=torch.float16)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    shutil.rmtree(out, ignore_errors=True)
    pipe.save_pretrained(out)


def export_flow(source: Path, out: Path) -> None:
    """The flow-matching pipeline in fp16, without the autoencoder, which is the base's."""
    left_out = dict.fromkeys(MINIATURE_FLOW_LEFT_OUT)
    pipe = StableDiffusion3Pipeline.from_pretrained(source, dtype=torch.float16, **left_out)
    shutil.rmtree(out, ignore_errors=True)
    pipe.save_pretrained(out)
    shutil.rmtree(out / "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of the trained base pipeline")
    parser.add_argument("--flow", type=Path, help="folder of the trained flow-matching pipeline")
    parser.add_argument("--disco", type=Path, help="folder of the fine-tuned pipeline")
    parser.add_argument("--delta", type=Path, help="safetensors file of the accelerator")
    parser.add_argument("--whole-flow", type=Path, help="write the embedded flow-matching pipeline, whole, to here")
    parser.add_argument("--flow-delta", type=Path, help="safetensors file of the flow-matching pipeline's accelerator")
    parser.add_argument("--out", type=Path, default=miniature_folder(), help="folder of the embedded weights")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = {style: load_pictures(style, "test").captions for style in ("avatars", "disco")}
    (args.out / "prompts.json").write_text(json.dumps(prompts, indent=0) + "\n")
    if args.base:
        export_base(args.base, args.out / "avatars")
    if args.flow:
        export_flow(args.flow, args.out / "flow")
    if args.disco:
        unet = UNet2DConditionModel.from_pretrained(args.disco, subfolder="unet", dtype=torch.float16)
        unet.save_pretrained(args.out / "disco" / "unet")
    if args.delta:
        (args.out / "delta").mkdir(exist_ok=True)
        shutil.copy(args.delta, args.out / "delta" / "perflow.safetensors")
        extract_lora(args.delta, args.out / "lora", rank=LORA_RANK, exact=True, overwrite=True)
    if args.whole_flow:  # as it is embedded, in fp16, so that the delta belongs to these weights
        load_miniature("flow").save_pretrained(args.whole_flow)
    if args.flow_delta:
        (args.out / "flow-delta").mkdir(exist_ok=True)
        shutil.copy(args.flow_delta, args.out / "flow-delta" / "perflow.safetensors")
    total = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
