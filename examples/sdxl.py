"""SDXL in four steps: a published pipeline that has its accelerator in it. It has no offline form (no small SDXL)."""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

import perflow_diffusers as pf


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--prompt", default="a colorful bird on a branch, open beak, photo, 8k uhd", help="what to draw (%(default)s)")
    add("--negative-prompt", default="blurry, low quality, over-saturated", help="what to keep out (%(default)s)")
    add("--model", default="hansyan/perflow-sdxl-dreamshaper", help="Hub id or folder (%(default)s)")
    add("--variant", default="v0-fix", help="which of its files; '' for those without a variant (%(default)s)")
    add("--prediction-type", default="ddim_eps", help="how its PeRFlow weights were trained (%(default)s)")
    add("--steps", type=int, default=4, help="4 is fast, 8 is finer (%(default)s)")
    add("--guidance-scale", type=float, default=2.0, help="1.5 to 2.5 suits these weights (%(default)s)")
    add("--size", type=int, default=1024, help="width and height in pixels (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the noise, the same on every device (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run (here %(default)s)")
    add("--out", type=Path, default=Path("sdxl.png"), help="the picture to write (%(default)s)")
    args = parser.parse_args(argv)

    dtype = torch.float16 if args.device.startswith("cuda") else torch.float32
    pipe = StableDiffusionXLPipeline.from_pretrained(args.model, variant=args.variant or None, dtype=dtype)
    pipe.to(args.device)
    pipe.scheduler = pf.PeRFlowScheduler.from_config(
        pipe.scheduler.config, prediction_type=args.prediction_type, num_time_windows=4
    )
    picture = pipe(
        args.prompt,
        negative_prompt=args.negative_prompt,
        width=args.size,
        height=args.size,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
    ).images[0]
    print("replacing" if args.out.exists() else "writing", args.out)
    picture.save(args.out)


if __name__ == "__main__":
    main()
