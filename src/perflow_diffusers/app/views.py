"""Pictures as HTML: whole pixels enlarged by whole factors, what they cost, and the states of their steps."""

import base64
import io
from html import escape

from PIL import Image

from perflow_diffusers.app.pictures import enlarge, to_png
from perflow_diffusers.app.settings import SAME
from perflow_diffusers.app.studio import Drawing, Studio

SIDE = 384  # pixels at least of a picture on the page
EMPTY = '<div class="frame empty">{}</div>'


def png_of(drawing: Drawing, studio: Studio, without: bool = False) -> bytes:
    """The PNG that is shown and downloaded: enlarged if it is small, with its settings."""
    about = studio.about
    if without:
        about = {**about, "accelerator": "", "picture": "without the accelerator"}
    return to_png(enlarge(drawing.picture, SIDE), drawing.settings, about)


def uri(png: bytes) -> str:
    """A data URI of PNG bytes."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def cost(drawing: Drawing) -> str:
    """Evaluations and time, in words."""
    evaluations = f"{drawing.evaluations} network evaluation{'s' if drawing.evaluations != 1 else ''}"
    ms = drawing.milliseconds
    return f"{evaluations}, {ms:.0f} ms" if ms < 10_000 else f"{evaluations}, {ms / 1000:.1f} s"


def accelerated(drawing: Drawing, png: bytes) -> str:
    """The accelerated picture with its caption and download link."""
    s = drawing.settings
    what = f"PeRFlow, {s.steps} step{'s' if s.steps != 1 else ''}"
    if s.accelerator_scale != 1:
        what += f", strength {s.accelerator_scale:g}"
    return _figure(what, cost(drawing), png, s.prompt, f"perflow-{s.seed}.png")


def comparison(drawing: Drawing | None, png: bytes | None) -> str:
    """The picture without the accelerator, or why there is none."""
    if drawing is None or png is None:
        return EMPTY.format("This model has its accelerator in its weights:<br>there is no picture without it.")
    s = drawing.settings
    solver = "PeRFlow's solver" if s.stock == SAME else s.stock
    what = f"without, {solver}, {s.stock_steps} step{'s' if s.stock_steps != 1 else ''}"
    return _figure(what, cost(drawing), png, s.prompt, f"without-{s.seed}.png")


def _figure(what: str, facts: str, png: bytes, prompt: str, name: str) -> str:
    source = uri(png)
    return (
        f'<figure><img class="frame" src="{source}" alt="{escape(what)}: {escape(prompt[:200])}">'
        f'<figcaption><b>{escape(what)}</b> <a href="{source}" download="{escape(name)}">Save PNG</a><br>'
        f'<span class="facts">{escape(facts)}</span></figcaption></figure>'
    )


def slider(left: bytes, right: bytes | None) -> str:
    """Both pictures over each other, and a handle between them."""
    if right is None:
        return ""
    return (
        '<div class="curtain" style="--at: 50%">'
        f'<img class="frame" src="{uri(right)}" alt="Without the accelerator">'
        f'<img class="frame over" src="{uri(left)}" alt="Accelerated">'
        '<input type="range" min="0" max="100" value="50" aria-label="How much of the accelerated picture is seen"'
        " oninput=\"this.parentElement.style.setProperty('--at', this.value + '%')\">"
        '<span class="tag left">PeRFlow</span><span class="tag right">without</span></div>'
    )


def strip(states: list[Image.Image]) -> str:
    """What each step foresaw, in a row."""
    figures = []
    for number, state in enumerate(states, 1):
        out = io.BytesIO()
        small = enlarge(state, 96)
        if small.width > 192:
            small = small.resize((192, round(192 * small.height / small.width)), Image.Resampling.LANCZOS)
        small.save(out, "PNG")
        figures.append(
            f'<figure><img src="{uri(out.getvalue())}" alt="Foreseen after step {number}">'
            f"<figcaption>step {number}</figcaption></figure>"
        )
    return f'<div class="strip">{"".join(figures)}</div>'


def message(text: str, kind: str = "note") -> str:
    """A sentence in a box; nothing for none."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="message {kind}" role="{role}">{escape(text)}</div>' if text else ""
