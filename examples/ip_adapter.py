"""IP-Adapter in four steps: a picture as a prompt, beside the words. Writes picture | result."""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import load_image, make_image_grid
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import perflow_diffusers as pf


def zero_adapter(pipe) -> dict:
    """An IP-Adapter of zeros behind a small random image encoder: it runs, and changes nothing."""
    print("this IP-Adapter is untrained: the picture has no effect yet")
    config = CLIPVisionConfig(hidden_size=12, num_hidden_layers=1, image_size=32, projection_dim=16)
    pipe.image_encoder = CLIPVisionModelWithProjection(config).eval()
    width, layers = 96, [layer for name, layer in pipe.unet.named_modules() if name.endswith("attn2")]
    values = {f"{2 * i + 1}.to_{x}_ip.weight": torch.zeros(80, width) for i in range(len(layers)) for x in "kv"}
    image = {"proj.weight": torch.zeros(4 * width, 16), "proj.bias": torch.zeros(4 * width)}
    image |= {name: torch.zeros(width) for name in ("norm.weight", "norm.bias")}
    return {"image_proj": image, "ip_adapter": values}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--prompt", default="a happy person with red hair and glasses", help="what to draw (%(default)s)")
    add("--image", help="the picture to draw like, path or URL (by default one is drawn first)")
    add("--scale", type=float, default=0.6, help="strength of the picture, from 0 to 1 (%(default)s)")
    add("--model", default="Lykon/dreamshaper-8", help="a checkpoint of SD 1.5, Hub id or folder (%(default)s)")
    add("--delta", default="perflow-sd15-delta", help="the accelerator, short name or file (%(default)s)")
    add("--adapter", default="h94/IP-Adapter", help="Hub id or folder (%(default)s)")
    add("--steps", type=int, default=4, help="4 is fast, 8 is finer (%(default)s)")
    add("--guidance-scale", type=float, help="4.5 suits 4 steps, 7.5 suits 8 (4.5; the miniature's is 1)")
    add("--seed", type=int, default=0, help="seed of the noise, the same on every device (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run (here %(default)s)")
    add("--out", type=Path, default=Path("ip-adapter.png"), help="the picture to write (%(default)s)")
    add("--miniature", action="store_true", help="run offline on 32 x 32 avatars, with an adapter yet untrained")
    args = parser.parse_args(argv)

    dtype = torch.float16 if args.device.startswith("cuda") else torch.float32
    pipe = pf.load_miniature() if args.miniature else StableDiffusionPipeline.from_pretrained(args.model, dtype=dtype)
    delta, guidance_scale = ("miniature", 1.0) if args.miniature else (args.delta, 4.5)
    pipe.to(args.device)
    pf.load_perflow(pipe, delta)  # weights and scheduler: of perflow-sd15-delta it knows diff_eps, 4 windows
    options = {"num_inference_steps": args.steps, "generator": torch.Generator().manual_seed(args.seed)}
    options["guidance_scale"] = guidance_scale if args.guidance_scale is None else args.guidance_scale
    image = load_image(args.image) if args.image else pipe("a sad person with black hair", **options).images[0]
    adapter = zero_adapter(pipe) if args.miniature else args.adapter
    pipe.load_ip_adapter(adapter, "models", "ip-adapter_sd15.safetensors")
    pipe.to(args.device).set_ip_adapter_scale(args.scale)
    result = pipe(args.prompt, ip_adapter_image=image, **options).images[0]
    print("replacing" if args.out.exists() else "writing", args.out)
    make_image_grid([image.resize(result.size), result], rows=1, cols=2).resize((1024, 512), 0).save(args.out)


if __name__ == "__main__":
    main()
