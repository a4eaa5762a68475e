"""A sentence -> a picture -> six normal maps and six colour views of the object, four steps each.

    python examples/text_to_multiview.py "a red sports car, white background" --wonder3d wonder3d-v1.0
    python examples/text_to_multiview.py --tiny    # offline, in seconds: random weights draw noise

Writes a contact sheet (PNG) and a turntable (GIF). docs/wonder3d.md says how to get the Wonder3D folder; cutting the
object out needs `pip install "rembg[cpu]"`.
"""

import argparse
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

import perflow_diffusers as pf
from perflow_diffusers.pipelines import wonder3d

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a happy person with red hair")
parser.add_argument("--wonder3d", default="wonder3d-v1.0", help="folder or Hub id of the Wonder3D pipeline")
parser.add_argument("--delta", default="perflow-sd15-delta", help="delta for both pipelines")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="multiview", help="name of the PNG and the GIF, without ending")
parser.add_argument("--tiny", action="store_true")
args = parser.parse_args()

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
if args.tiny:
    device, guidance = "cpu", 1.0
    text, views = pf.load_miniature(), wonder3d.tiny_wonder3d()
    pf.load_perflow(text, "miniature")
    views.scheduler = pf.PeRFlowScheduler.from_config(views.scheduler.config, prediction_type="ddim_eps")
else:
    guidance = 4.5
    text = StableDiffusionPipeline.from_pretrained("Lykon/dreamshaper-8", dtype=dtype)
    views = wonder3d.Wonder3DPipeline.from_pretrained(args.wonder3d, dtype=dtype)
    for pipe in (text, views):
        pf.load_perflow(pipe, args.delta)  # weights and scheduler: of perflow-sd15-delta it knows diff_eps, 4 windows
for pipe in (text, views):
    pipe.to(device)

noise = torch.Generator(device).manual_seed(args.seed)
picture = text(args.prompt, num_inference_steps=args.steps, guidance_scale=guidance, generator=noise).images[0]
cut = picture.convert("RGBA") if args.tiny else wonder3d.remove_background(picture)
cut = wonder3d.centre_object(cut, size=views.unet.config.sample_size * views.vae_scale_factor)
drawn: Any = views(cut, num_inference_steps=args.steps, generator=noise)

wonder3d.contact_sheet(drawn.normals, drawn.images).save(f"{args.out}.png")
frames = wonder3d.turntable(drawn.normals, drawn.images)
frames[0].save(f"{args.out}.gif", save_all=True, append_images=frames[1:], duration=300, loop=0)
print(f"{args.out}.png: normals above, colours below. {args.out}.gif: the views in turn.")
