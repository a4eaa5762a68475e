"""Image to image in four steps: noise a picture half-way, and let the prompt lead it back. Writes before | after."""

import argparse
from pathlib import Path

import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionPipeline
from diffusers.utils import load_image, make_image_grid

import perflow_diffusers as pf


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--prompt", default="a sad person with blue hair and fair skin", help="what it shall become (%(default)s)")
    add("--image", help="the picture to change, path or URL (by default one of --image-prompt is drawn first)")
    add("--image-prompt", default="a happy person with brown hair and fair skin", help="(%(default)s)")
    add("--strength", type=float, default=0.75, help="how far to go, times --steps at least 1 (%(default)s)")
    add("--model", default="Lykon/dreamshaper-8", help="a checkpoint of SD 1.5, Hub id or folder (%(default)s)")
    add("--delta", default="perflow-sd15-delta", help="the accelerator, short name or file (%(default)s)")
    add("--steps", type=int, default=4, help="steps of a full run; strength times these are taken (%(default)s)")
    add("--guidance-scale", type=float, help="4.5 suits 4 steps, 7.5 suits 8 (4.5; the miniature's is 1)")
    add("--seed", type=int, default=0, help="seed of the noise, the same on every device (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run (here %(default)s)")
    add("--out", type=Path, default=Path("image-to-image.png"), help="the picture to write (%(default)s)")
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
    options = {
        "num_inference_steps": args.steps,
        "guidance_scale": guidance_scale if args.guidance_scale is None else args.guidance_scale,
        "generator": torch.Generator().manual_seed(args.seed),
    }
    before = load_image(args.image) if args.image else pipe(args.image_prompt, **options).images[0]
    before = before.resize(2 * [pipe.unet.config.sample_size * pipe.vae_scale_factor])  # 512; the miniature: 32
    editor = AutoPipelineForImage2Image.from_pipe(pipe)  # the same networks, the same scheduler
    after = editor(args.prompt, image=before, strength=args.strength, **options).images[0]
    print("replacing" if args.out.exists() else "writing", args.out)
    make_image_grid([before, after], rows=1, cols=2).resize((1024, 512), 0).save(args.out)


if __name__ == "__main__":
    main()
