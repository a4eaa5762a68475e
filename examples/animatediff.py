"""AnimateDiff in four steps: a motion adapter ties the frames of any Stable Diffusion 1.5 checkpoint together."""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, StableDiffusionPipeline
from PIL import Image

import perflow_diffusers as pf


def zero_adapter(unet: Any) -> Any:
    """A motion adapter that fits the UNet and adds zero: it runs, and every frame stays a picture of its own."""
    print("this motion adapter is untrained: the frames are pictures of their own, not a movement")
    sizes: dict[str, Any] = {"motion_num_attention_heads": 4, "motion_norm_num_groups": 16}
    adapter: Any = MotionAdapter(unet.config.block_out_channels, 1, **sizes)
    for name, weights in adapter.named_parameters():
        if ".proj_out." in name:
            torch.nn.init.zeros_(weights)
    return adapter


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--prompt", default="a happy person with red hair and glasses", help="what to draw (%(default)s)")
    add("--frames", type=int, default=16, help="length of the animation, 8 frames a second (%(default)s)")
    add("--model", default="Lykon/dreamshaper-8", help="a checkpoint of SD 1.5, Hub id or folder (%(default)s)")
    add("--delta", default="perflow-sd15-delta", help="the accelerator, short name or file (%(default)s)")
    add("--motion", default="guoyww/animatediff-motion-adapter-v1-5-2", help="Hub id or folder (%(default)s)")
    add("--steps", type=int, default=4, help="4 is fast, 8 is finer (%(default)s)")
    add("--guidance-scale", type=float, help="4.5 suits 4 steps, 7.5 suits 8 (4.5; the miniature's is 1)")
    add("--seed", type=int, default=0, help="seed of the noise, the same on every device (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run (here %(default)s)")
    add("--out", type=Path, default=Path("animatediff.gif"), help="a .gif, .webp or animated .png (%(default)s)")
    add("--miniature", action="store_true", help="run offline on 32 x 32 avatars, with a motion adapter yet untrained")
    args = parser.parse_args(argv)

    dtype = torch.float16 if args.device.startswith("cuda") else torch.float32
    base = pf.load_miniature() if args.miniature else StableDiffusionPipeline.from_pretrained(args.model, dtype=dtype)
    motion = zero_adapter(base.unet) if args.miniature else MotionAdapter.from_pretrained(args.motion, dtype=dtype)
    delta, guidance_scale = ("miniature", 1.0) if args.miniature else (args.delta, 4.5)
    parts = {name: part for name, part in base.components.items() if name != "safety_checker"}
    pipe: Any = AnimateDiffPipeline(motion_adapter=motion, **parts)
    pipe.to(args.device)
    pf.load_perflow(pipe, delta)  # weights and scheduler: of perflow-sd15-delta it knows diff_eps, 4 windows
    options = {"num_inference_steps": args.steps, "generator": torch.Generator().manual_seed(args.seed)}
    options["guidance_scale"] = guidance_scale if args.guidance_scale is None else args.guidance_scale
    frames = pipe(args.prompt, num_frames=args.frames, **options).frames[0]
    if args.miniature:
        frames = [frame.resize((256, 256), Image.Resampling.NEAREST) for frame in frames]
    print("replacing" if args.out.exists() else "writing", args.out)
    frames[0].save(args.out, save_all=True, append_images=frames[1:], duration=125, loop=0)


if __name__ == "__main__":
    main()
