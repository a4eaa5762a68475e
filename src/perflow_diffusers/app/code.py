"""The Python that draws a picture of the page: complete, with public names only."""

import json
from pathlib import Path

from perflow_diffusers.app.settings import Settings
from perflow_diffusers.app.studio import Studio


def as_python(settings: Settings, studio: Studio, image: str | None = None) -> str:
    """A script that draws the accelerated picture of these settings to the same pixels.

    `image`: name of the file that an image to image began from.
    """
    loading = _loading(studio)
    scale = f", scale={settings.accelerator_scale:g}" if settings.accelerator_scale != 1 else ""
    lines = [*loading, _accelerating(studio, scale)]
    width, height = settings.width or studio.size[0], settings.height or studio.size[1]
    options = [
        f"{_text(settings.prompt)},",
        *([f"negative_prompt={_text(settings.negative_prompt)},"] if settings.negative_prompt else []),
        f"num_inference_steps={settings.steps},",
        f"guidance_scale={settings.guidance_scale:g},",
        f"generator=torch.Generator().manual_seed({settings.seed}),",
    ]
    imports = ["import torch"]
    if image is not None and settings.strength is not None:
        imports += ["from diffusers import AutoPipelineForImage2Image", "from PIL import Image, ImageOps"]
        lines += [
            "pipe = AutoPipelineForImage2Image.from_pipe(pipe)",
            f'image = ImageOps.fit(Image.open({_text(image)}).convert("RGB"), ({width}, {height}), Image.LANCZOS)',
        ]
        options += ["image=image,", f"strength={settings.strength:g},"]
    elif (width, height) != studio.size:
        options += [f"width={width},", f"height={height},"]
    if not studio.is_miniature:
        imports.insert(1, f"from diffusers import {type(studio.pipe).__name__}")
    call = "\n".join(f"    {option}" for option in options)
    lines += [f"image = pipe(\n{call}\n).images[0]", 'image.save("picture.png")']
    return "\n".join([*imports, "", "import perflow_diffusers as pf", "", *lines]) + "\n"


def _loading(studio: Studio) -> list[str]:
    if studio.is_miniature:
        checkpoint = "" if studio.model == "avatars" else _text(studio.model)
        return [f"pipe = pf.load_miniature({checkpoint})"]
    kind, dtype = type(studio.pipe).__name__, str(studio.pipe.dtype)
    how = "from_single_file" if Path(studio.model).is_file() else "from_pretrained"
    lines = [f"pipe = {kind}.{how}({_text(studio.model)}, dtype={dtype})"]
    device = studio.pipe.device.type
    if studio.offload:
        lines.append(f"pipe.enable_{'model' if studio.offload == 'model' else 'sequential'}_cpu_offload()")
    elif device != "cpu":
        lines.append(f"pipe.to({_text(device)})")
    return lines


def _accelerating(studio: Studio, scale: str) -> str:
    if not studio.accelerator:
        return "pf.set_scheduler(pipe)"
    return f"pf.load_perflow(pipe, {_text(studio.accelerator)}{scale})"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
