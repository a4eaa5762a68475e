"""What the page shows of a picture: its PNG, its name and cost in words, and the states of its steps."""

import base64
import io
from typing import Any

from PIL import Image

from perflow_diffusers.app.drawing import Drawing
from perflow_diffusers.app.pictures import to_png
from perflow_diffusers.app.settings import SAME
from perflow_diffusers.app.studio import Studio

STATE = 192  # pixels at most of the longer side of a step's state
NONE = "This model has its accelerator in its weights: there is no picture without it."


def accelerated(drawing: Drawing, studio: Studio) -> dict[str, Any]:
    """The accelerated picture: PNG (base64, with its settings), title, facts, description and file name."""
    s = drawing.settings
    title = f"PeRFlow, {_steps(s.steps)}"
    if s.accelerator_scale != 1:
        title += f", strength {s.accelerator_scale:g}"
    return _shown(drawing, title, to_png(drawing.picture, s, studio.about), f"perflow-{s.seed}.png")


def comparison(drawing: Drawing | None, studio: Studio) -> dict[str, Any]:
    """The same of the picture without the accelerator, or why there is none."""
    if drawing is None:
        return {"none": NONE}
    s = drawing.settings
    solver = "PeRFlow's solver" if s.stock == SAME else s.stock
    about = {**studio.about, "accelerator": "", "picture": "without the accelerator"}
    png = to_png(drawing.picture, s, about)
    return _shown(drawing, f"without, {solver}, {_steps(s.stock_steps)}", png, f"without-{s.seed}.png")


def _shown(drawing: Drawing, title: str, png: bytes, name: str) -> dict[str, Any]:
    width, height = drawing.picture.size
    return {
        "title": title,
        "facts": cost(drawing),
        "alt": f"{title}: {drawing.settings.prompt}",
        "png": base64.b64encode(png).decode(),
        "width": width,
        "height": height,
        "name": name,
    }


def cost(drawing: Drawing) -> str:
    """Evaluations and time, in words."""
    evaluations = f"{drawing.evaluations} network evaluation{'s' if drawing.evaluations != 1 else ''}"
    ms = drawing.milliseconds
    return f"{evaluations}, {ms:.0f} ms" if ms < 10_000 else f"{evaluations}, {ms / 1000:.1f} s"


def state(picture: Image.Image) -> str:
    """What a step foresaw, as a PNG (base64); large ones are made smaller."""
    small = picture
    if max(picture.size) > STATE:
        small = picture.copy()
        small.thumbnail((STATE, STATE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def _steps(count: int) -> str:
    return f"{count} step{'s' if count != 1 else ''}"
