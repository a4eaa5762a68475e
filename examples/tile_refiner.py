"""Tile refiner: a picture of four steps is enlarged to twice its size, then given detail in four more steps."""

import argparse
from pathlib import Path

import torch
from diffusers import AutoPipelineForImage2Image, ControlNetModel, StableDiffusionPipeline
from diffusers.utils import make_image_grid

import perflow_diffusers as pf


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--prompt", default="a happy person with red hair and glasses", help="what to draw (%(default)s)")
    add("--strength", type=float, help="how far the refiner may go, times --steps at least 1 (1; the miniature's 0.5)")
    add("--model", default="Lykon/dreamshaper-8", help="a checkpoint of SD 1.5, Hub id or folder (%(default)s)")
    add("--delta", default="perflow-sd15-delta", help="the accelerator, short name or file (%(default)s)")
    add("--controlnet", default="lllyasviel/control_v11f1e_sd15_tile", help="Hub id or folder (%(default)s)")
    add("--steps", type=int, default=4, help="steps of either stage (%(default)s)")
    add("--guidance-scale", type=float, help="4.5 suits 4 steps, 7.5 suits 8 (4.5; the miniature's is 1)")
    add("--seed", type=int, default=0, help="seed of the noise, the same on every device (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run (here %(default)s)")
    add("--out", type=Path, default=Path("tile-refiner.png"), help="the picture to write (%(default)s)")
    add("--miniature", action="store_true", help="run offline on 32 x 32 avatars, with a ControlNet yet untrained")
    args = parser.parse_args(argv)

    dtype = torch.float16 if args.device.startswith("cuda") else torch.float32
    if args.miniature:
        pipe, delta, guidance_scale, strength = pf.load_miniature(), "miniature", 1.0, 0.5
        # A new ControlNet adds zero. Three widths, two halvings: pictures of 32 x 32 meet latents of 8 x 8.
        controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 64))
        print("this ControlNet is untrained: only the lower strength keeps the picture")
    else:
        pipe, delta = StableDiffusionPipeline.from_pretrained(args.model, dtype=dtype), args.delta
        controlnet = ControlNetModel.from_pretrained(args.controlnet, dtype=dtype)
        guidance_scale, strength = 4.5, 1.0  # the ControlNet holds the picture
    pipe.to(args.device)
    pf.load_perflow(pipe, delta)  # weights and scheduler: of perflow-sd15-delta it knows diff_eps, 4 windows
    options = {"num_inference_steps": args.steps, "generator": torch.Generator().manual_seed(args.seed)}
    options["guidance_scale"] = guidance_scale if args.guidance_scale is None else args.guidance_scale
    strength = strength if args.strength is None else args.strength
    small = pipe(args.prompt, **options).images[0]
    if args.miniature:
        small = small.resize((16, 16))  # it knows pictures of 32 x 32 only: these are halved, then refined
    large = small.resize((2 * small.width, 2 * small.height))  # 512 -> 1024
    refiner = AutoPipelineForImage2Image.from_pipe(pipe, controlnet=controlnet.to(args.device))
    refined = refiner(args.prompt, image=large, control_image=large, strength=strength, **options).images[0]
    if args.miniature:
        refined = make_image_grid([large, refined], rows=1, cols=2).resize((1024, 512), 0)
    print("replacing" if args.out.exists() else "writing", args.out)
    refined.save(args.out)


if __name__ == "__main__":
    main()
