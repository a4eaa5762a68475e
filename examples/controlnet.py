"""ControlNet in four steps: the edges of one picture hold another in shape. Writes picture | edges | result."""

import argparse
from pathlib import Path

import torch
from diffusers import AutoPipelineForText2Image, ControlNetModel, StableDiffusionPipeline
from diffusers.utils import load_image, make_image_grid
from PIL import ImageFilter, ImageOps

import perflow_diffusers as pf


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--prompt", default="a sad person with blue hair and fair skin", help="what to draw (%(default)s)")
    add("--image", help="the picture that gives the edges, path or URL (by default one is drawn first)")
    add("--model", default="Lykon/dreamshaper-8", help="a checkpoint of SD 1.5, Hub id or folder (%(default)s)")
    add("--delta", default="perflow-sd15-delta", help="the accelerator, short name or file (%(default)s)")
    add("--controlnet", default="lllyasviel/control_v11p_sd15_canny", help="Hub id or folder (%(default)s)")
    add("--steps", type=int, default=4, help="4 is fast, 8 is finer (%(default)s)")
    add("--guidance-scale", type=float, help="4.5 suits 4 steps, 7.5 suits 8 (4.5; the miniature's is 1)")
    add("--seed", type=int, default=0, help="seed of the noise, the same on every device (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run (here %(default)s)")
    add("--out", type=Path, default=Path("controlnet.png"), help="the picture to write (%(default)s)")
    add("--miniature", action="store_true", help="run offline on 32 x 32 avatars, with a ControlNet yet untrained")
    args = parser.parse_args(argv)

    dtype = torch.float16 if args.device.startswith("cuda") else torch.float32
    if args.miniature:
        pipe, delta, guidance_scale = pf.load_miniature(), "miniature", 1.0
        # A new ControlNet adds zero. Three widths, two halvings: edges of 32 x 32 meet latents of 8 x 8.
        controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 64))
        print("this ControlNet is untrained: the edges have no effect yet")
    else:
        pipe, delta = StableDiffusionPipeline.from_pretrained(args.model, dtype=dtype), args.delta
        controlnet, guidance_scale = ControlNetModel.from_pretrained(args.controlnet, dtype=dtype), 4.5
    pipe.to(args.device)
    pf.load_perflow(pipe, delta)  # weights and scheduler: of perflow-sd15-delta it knows diff_eps, 4 windows
    options = {"num_inference_steps": args.steps, "generator": torch.Generator().manual_seed(args.seed)}
    options["guidance_scale"] = guidance_scale if args.guidance_scale is None else args.guidance_scale
    image = load_image(args.image) if args.image else pipe("a happy person with brown hair", **options).images[0]
    image = image.resize(2 * [pipe.unet.config.sample_size * pipe.vae_scale_factor])  # 512; the miniature: 32
    edges = image.convert("L").filter(ImageFilter.FIND_EDGES).point(lambda value: 255 * (value > 60))
    edges = ImageOps.expand(ImageOps.crop(edges, 1), 1).convert("RGB")  # a filter leaves the outermost pixels as is

    controlled = AutoPipelineForText2Image.from_pipe(pipe, controlnet=controlnet.to(args.device))
    result = controlled(args.prompt, image=edges, **options).images[0]
    print("replacing" if args.out.exists() else "writing", args.out)
    make_image_grid([image, edges, result], rows=1, cols=3).resize((1536, 512), 0).save(args.out)


if __name__ == "__main__":
    main()
