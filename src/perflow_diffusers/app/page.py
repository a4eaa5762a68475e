"""The page itself: what is on it, and what happens when something on it changes."""

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from perflow_diffusers.app import views
from perflow_diffusers.app.code import as_python
from perflow_diffusers.app.desk import DeskError, sentence
from perflow_diffusers.app.pictures import MAX_BYTES, PictureError, from_png
from perflow_diffusers.app.room import Room
from perflow_diffusers.app.settings import MAX_PROMPT, MAX_SCALE, MAX_STEPS, SOLVERS, Settings
from perflow_diffusers.app.studio import Studio
from perflow_diffusers.miniature import miniature_prompts, unknown_words_sentence

ASSETS = Path(__file__).parent / "assets"
KEPT = 48  # pictures in a window's gallery
FIRST = "a happy person with red hair and glasses"
#: settings that have a control of their own, in the order in which they are passed
NAMES = (
    "prompt",
    "negative_prompt",
    "seed",
    "steps",
    "guidance_scale",
    "accelerator_scale",
    "stock",
    "stock_steps",
    "stock_guidance_scale",
    "strength",
)


def theme() -> Any:
    """Quiet grays and one accent; fonts that the machine has, none from a network."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "monospace"]
    return gr.themes.Base(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=fonts, font_mono=mono
    ).set(block_border_width="0px", block_shadow="none", block_label_background_fill="transparent")


class Page:
    """The page of one room. `may_open`: whether visitors may have another model loaded."""

    def __init__(self, room: Room, folder: Path, may_open: bool = True) -> None:
        self.room, self.folder, self.may_open = room, folder, may_open
        self.blocks = self._build()

    # What happens

    def draw(self, request: gr.Request, mode: str, drawn: Any, stored: list[str], *values: Any) -> Iterator[Any]:
        """Redraw for a window: first the picture, then the one without, then the states, then the gallery."""
        settings, image, sorry = self._wish(mode, drawn, values)
        studio = self.room.studio
        if settings is None or studio is None:  # of a model that is not there the line above tells
            yield self._changes(note=views.message(sorry, "error"))
            return
        try:
            ticket = self.room.draw(request.session_hash or "one", settings, image)
        except DeskError as error:
            yield self._changes(note=views.message(str(error), "error"))
            return
        png, without = b"", None
        for kind, what in ticket:
            if kind == "picture":
                png = views.png_of(what, studio)
                code = as_python(settings, studio, "input.png" if image is not None else None)
                words = " ".join([self._about_words(settings.prompt), *what.notes]).strip()
                yield self._changes(picture=views.accelerated(what, png), note=views.message(words), code=code)
            elif kind == "comparison":
                without = views.png_of(what, studio, without=True) if what is not None else None
                yield self._changes(stock=views.comparison(what, without), slider=views.slider(png, without))
            elif kind == "states":
                stored = self._store(request, png, stored)
                yield self._changes(states=views.strip(what), stored=stored, shots=stored)
            elif kind == "failed":
                yield self._changes(note=views.message(what, "error"))
        yield self._changes()

    def _wish(self, mode: str, drawn: Any, values: tuple[Any, ...]) -> tuple[Settings | None, Any, str]:
        """The settings on the page, and the picture to begin from; or a sentence why not."""
        try:
            said = dict(zip(NAMES, values, strict=True))
            said["seed"] = 0 if said["seed"] is None else said["seed"]
            image = None
            if mode == "image":
                image = drawn
                if image is None:
                    return None, None, 'Upload a picture or draw one, then press "Begin from this picture".'
            else:
                said["strength"] = None
            return Settings.from_dict(said), image, ""
        except ValueError as error:
            return None, None, sentence(error)

    def _about_words(self, prompt: str) -> str:
        studio = self.room.studio
        return unknown_words_sentence(prompt, studio.model) if studio is not None and studio.is_miniature else ""

    def _store(self, request: gr.Request, png: bytes, stored: list[str]) -> list[str]:
        """Put a picture that stood until all was drawn into the window's gallery."""
        folder = self.folder / (request.session_hash or "one")
        folder.mkdir(exist_ok=True)
        if stored and Path(stored[0]).exists() and Path(stored[0]).read_bytes() == png:
            return stored
        with tempfile.NamedTemporaryFile("wb", dir=folder, prefix="perflow-", suffix=".png", delete=False) as file:
            file.write(png)
        for former in stored[KEPT - 1 :]:
            Path(former).unlink(missing_ok=True)
        return [file.name, *stored[: KEPT - 1]]

    def _changes(self, **changed: Any) -> list[Any]:
        return [changed.get(name, gr.skip()) for name in self._outputs]

    def leave(self, request: gr.Request) -> None:
        """A window was closed: its work ends, its files go."""
        window = request.session_hash or "one"
        self.room.desk.leave(window)
        folder = self.folder / window
        for file in folder.glob("*.png"):
            file.unlink(missing_ok=True)
        if folder.is_dir():
            folder.rmdir()

    def load_png(self, file: str | None) -> list[Any]:
        """The settings of a PNG into the controls."""
        if file is None:
            return [gr.skip()] * (len(NAMES) + 1)
        try:
            if Path(file).stat().st_size > MAX_BYTES:
                raise PictureError(f"The file is larger than {MAX_BYTES // 2**20} MB.")
            settings = from_png(Path(file).read_bytes())
        except ValueError as error:
            return [gr.skip()] * len(NAMES) + [views.message(sentence(error), "error")]
        said = settings.to_dict()
        if said["strength"] is None:
            said["strength"] = gr.skip()
        return [said[name] for name in NAMES] + [views.message("The settings of the picture are loaded.")]

    def choose(self, event: gr.SelectData, stored: list[str]) -> list[Any]:
        """A picture of the gallery was clicked: its settings into the controls."""
        index = event.index if isinstance(event.index, int) else event.index[0]
        return self.load_png(stored[index] if 0 <= index < len(stored) else None)

    def look(self, seen: int) -> list[Any]:
        """What a window that has just come, or waits for a model, is told; controls for a model that is new to it."""
        room = self.room
        kind = {"opening": "busy", "failed": "error"}.get(room.state)
        status = views.message(room.status, kind) if kind else ""
        ready = room.state == "ready" and room.studio is not None
        about = _about(room.studio) if room.studio is not None else "<h1>PeRFlow</h1><p>no model yet</p>"
        fresh: list[Any] = [gr.skip()] * len(NAMES)
        if ready and seen != room.number and room.studio is not None:
            said = room.studio.defaults().to_dict()
            said["prompt"] = FIRST if room.studio.is_miniature else ""
            fresh = [gr.skip() if name == "strength" else said[name] for name in NAMES]
            seen = room.number
        return [status, about, gr.Timer(active=room.state == "opening"), seen, *fresh]

    def open(self, model: str, accelerator: str) -> list[Any]:
        """Open another model for all windows."""
        if not model.strip():
            return [views.message("Name a model: a folder, a Hub id or a .safetensors file.", "error"), gr.skip()]
        self.room.open(model.strip(), accelerator.strip() or None)
        return [views.message(self.room.status, "busy"), gr.Timer(active=True)]

    def suggest(self) -> str:
        """A prompt of pictures that no training has seen."""
        studio = self.room.studio
        checkpoint = studio.model if studio is not None and studio.is_miniature else "avatars"
        return miniature_prompts(1, random.randrange(2**31), checkpoint)[0]

    # What is there

    def _build(self) -> gr.Blocks:
        with gr.Blocks(title="PeRFlow", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
            mode = gr.State("text")
            stored = gr.State([])
            seen = gr.State(0)
            drawn = gr.State(None)  # the picture to begin from
            timer = gr.Timer(0.5, active=True)
            about = gr.HTML("", elem_id="head")
            status = gr.HTML("", elem_id="status")
            with gr.Row(elem_id="ask", equal_height=True):
                prompt = gr.Textbox(
                    FIRST,
                    label="Prompt: the picture follows while you type",
                    elem_id="prompt",
                    lines=1,
                    max_lines=4,
                    max_length=MAX_PROMPT,
                    autofocus=True,
                    scale=6,
                )
                suggest = gr.Button("Suggest a prompt", elem_id="suggest", scale=1, min_width=140)
            note = gr.HTML("", elem_id="note")
            with gr.Row(elem_id="columns"):
                with gr.Column(scale=5, min_width=320):
                    with gr.Row(elem_id="pictures"):
                        with gr.Column(min_width=300):
                            picture = gr.HTML(views.EMPTY.format("The picture"), elem_id="picture")
                        with gr.Column(min_width=300):
                            stock = gr.HTML(views.EMPTY.format("Without the accelerator"), elem_id="stock-picture")
                    gr.HTML('<p class="small-label">What each step foresees of the picture</p>')
                    states = gr.HTML("", elem_id="states")
                with gr.Column(scale=2, min_width=280, elem_id="controls"):
                    steps = gr.Slider(1, MAX_STEPS, 4, step=1, label="Steps", elem_id="steps")
                    guidance = gr.Slider(0, 15, 1, step=0.1, label="Guidance", elem_id="guidance")
                    scale = gr.Slider(0, MAX_SCALE, 1, step=0.05, label="Accelerator strength", elem_id="strength")
                    with gr.Row():
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=110)
                        renew = gr.Button("New noise", elem_id="renew", min_width=110)
                    negative = gr.Textbox(
                        "", label="Negative prompt (needs guidance above 1)", elem_id="negative", max_length=MAX_PROMPT
                    )
                    with gr.Accordion("The picture without", open=True, elem_id="without"):
                        solver = gr.Dropdown(
                            list(SOLVERS), value="DPM-Solver++", label="Solver", elem_id="stock", filterable=False
                        )
                        stock_steps = gr.Slider(1, 100, 4, step=1, label="Its steps", elem_id="stock-steps")
                        stock_guidance = gr.Slider(
                            0, 15, 7.5, step=0.1, label="Its guidance", elem_id="stock-guidance"
                        )
            with gr.Tabs(elem_id="tabs"):
                with gr.Tab("Text to image", id="text", elem_id="tab-text") as text_tab:
                    slider = gr.HTML("", elem_id="slider")
                with gr.Tab("Image to image", id="image", elem_id="tab-image") as image_tab:
                    strength = gr.Slider(
                        0.05, 1, 0.7, step=0.05, label="How far from the picture", elem_id="image-strength"
                    )
                    editor = gr.ImageEditor(
                        type="pil",
                        label="Upload or draw the picture to begin from",
                        elem_id="upload",
                        sources=("upload", "clipboard"),
                        canvas_size=(512, 512),
                        layers=False,
                        height=420,
                        format="png",
                        buttons=[],
                    )
                    # The canvas sends itself again and again to whoever listens to its changes: it is asked instead.
                    use = gr.Button("Begin from this picture", variant="primary", elem_id="use")
                with gr.Tab("Gallery and settings", id="gallery", elem_id="tab-gallery"):
                    gr.HTML(
                        '<p class="small-label">Pictures of this window. Click one to take its settings; '
                        "its PNG carries them, too.</p>"
                    )
                    shots = gr.Gallery(
                        label="Gallery",
                        elem_id="shots",
                        columns=6,
                        fit_columns=False,
                        height="auto",
                        object_fit="contain",
                        format="png",
                        interactive=False,
                        buttons=["download"],
                    )
                    png = gr.File(
                        label="Load settings from a PNG", file_types=[".png"], type="filepath", elem_id="load-png"
                    )
                with gr.Tab("Python", id="code", elem_id="tab-code"):
                    gr.HTML('<p class="small-label">This draws the accelerated picture, to the same pixels.</p>')
                    code = gr.Code("", language="python", label="Python", elem_id="code", interactive=False)
                if self.may_open:
                    with gr.Tab("Model", id="model", elem_id="tab-model"):
                        gr.HTML(
                            '<p class="small-label">Another model, for all windows of this server. "miniature" is '
                            "the one that comes with the package.</p>"
                        )
                        model = gr.Textbox(
                            "", label="Model: a folder, a Hub id or a .safetensors checkpoint", elem_id="model"
                        )
                        accelerator = gr.Textbox(
                            "",
                            label="Accelerator: a folder, file, Hub id or short name (none if it is in the weights)",
                            elem_id="accelerator",
                        )
                        start = gr.Button("Load", variant="primary", elem_id="open")
                        start.click(
                            self.open,
                            [model, accelerator],
                            [status, timer],
                            show_progress="hidden",
                            api_visibility="private",
                        )
            controls: list[Any] = [
                prompt, negative, seed, steps, guidance, scale, solver, stock_steps, stock_guidance, strength,
            ]  # fmt: skip
            outputs = {
                "picture": picture,
                "stock": stock,
                "slider": slider,
                "states": states,
                "note": note,
                "code": code,
                "stored": stored,
                "shots": shots,
            }
            self._outputs = tuple(outputs)
            quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            live: dict[str, Any] = {
                "fn": self.draw,
                "inputs": [mode, drawn, stored, *controls],
                "outputs": list(outputs.values()),
                "trigger_mode": "multiple",
                "concurrency_limit": None,
                **quiet,
            }
            # A prompt is pasted, dictated and put there by scripts, too, which `input` does not see.
            typed = [control.input for control in controls if control is not prompt] + [prompt.change]
            gr.on(typed, **live)
            text_tab.select(lambda: "text", None, mode, **quiet).then(**live)
            image_tab.select(lambda: "image", None, mode, **quiet).then(**live)
            use.click(_picture_of, editor, drawn, **quiet).then(**live)
            renew.click(lambda: random.randrange(2**31), None, seed, **quiet).then(**live)
            suggest.click(self.suggest, None, prompt, **quiet).then(**live)
            png.upload(self.load_png, png, [*controls, note], **quiet).then(**live)
            shots.select(self.choose, stored, [*controls, note], **quiet)
            told = [status, about, timer, seen, *controls]
            timer.tick(self.look, seen, told, **quiet)
            seen.change(**live)
            blocks.load(self.look, seen, told, **quiet)
            blocks.unload(self.leave)
        return blocks


def _about(studio: Studio) -> str:
    from html import escape

    from perflow_diffusers.app.room import described

    return f"<h1>PeRFlow</h1><p>{escape(described(studio))}</p>"


def _picture_of(drawn: Any) -> Image.Image | None:
    """What was uploaded or drawn, on white; None for an empty canvas."""
    if drawn is None:
        return None
    picture = drawn.get("composite") if isinstance(drawn, dict) else drawn
    if picture is None:
        return None
    picture = picture.convert("RGBA")
    if picture.getextrema()[3][1] == 0:
        return None
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
