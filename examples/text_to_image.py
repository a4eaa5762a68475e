"""Text to image in four steps: any Stable Diffusion 1.5 checkpoint with PeRFlow's delta added to its UNet."""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import perflow_diffusers as pf


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--prompt", default="a happy person with red hair and glasses", help="what to draw (%(default)s)")
    add("--negative-prompt", help="what to keep out; read only where the guidance is above 1")
    add("--model", default="Lykon/dreamshaper-8", help="a checkpoint of SD 1.5, Hub id or folder (%(default)s)")
    add("--delta", default="perflow-sd15-delta", help="the accelerator, short name or file (%(default)s)")
    add("--steps", type=int, default=4, help="4 is fast, 8 is finer (%(default)s)")
    add("--guidance-scale", type=float, help="4.5 suits 4 steps, 7.5 suits 8 (4.5; the miniature's is 1)")
    add("--seed", type=int, default=0, help="seed of the noise, the same on every device (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run (here %(default)s)")
    add("--out", type=Path, default=Path("text-to-image.png"), help="the picture to write (%(default)s)")
    add("--miniature", action="store_true", help="run offline on the package's own pipeline: 32 x 32 avatars")
    args = parser.parse_args(argv)

    dtype = torch.float16 if args.device.startswith("cuda") else torch.float32
    if args.miniature:
        pipe, delta, guidance_scale = pf.load_miniature(), "miniature", 1.0
    else:
        pipe, delta = StableDiffusionPipeline.from_pretrained(args.model, dtype=dtype), args.delta
        guidance_scale = 4.5
    pipe.to(args.device)

    pf.load_perflow(pipe, delta)  # weights and scheduler: of perflow-sd15-delta it knows diff_eps, 4 windows
    picture = pipe(
        args.prompt,
        negative_prompt=args.negative_prompt,
        num_inference_steps=args.steps,
        guidance_scale=guidance_scale if args.guidance_scale is None else args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
    ).images[0]

    if args.miniature:
        picture = picture.resize((256, 256), Image.Resampling.NEAREST)
    print("replacing" if args.out.exists() else "writing", args.out)
    picture.save(args.out)


if __name__ == "__main__":
    main()
