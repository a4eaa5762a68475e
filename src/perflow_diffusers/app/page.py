"""The page itself: Gradio's controls, and frames that assets/page.js fills with what `live` answers.

No event here runs on the server: a change of a control hands all values to the script, which asks for a picture.
"""

from pathlib import Path
from typing import Any

import gradio as gr

from perflow_diffusers.app.live import FIRST, NAMES, STRENGTH
from perflow_diffusers.app.settings import MAX_PROMPT, MAX_SCALE, MAX_SEED, MAX_STEPS, SOLVERS

ASSETS = Path(__file__).parent / "assets"
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")

_FIGURE = """<figure aria-live="off"><img class="frame" alt="" hidden><div class="frame empty">{empty}</div>
<figcaption><span class="title"><b>{title}</b> <a class="save" hidden>Save PNG</a></span>
<span class="facts"></span></figcaption></figure>"""
_CURTAIN = """<h2>Before and after</h2><div class="curtain" hidden>
<img class="frame" alt="Without the accelerator"><img class="frame over" alt="Accelerated">
<span class="tag left">PeRFlow</span><span class="tag right">without</span>
<input type="range" min="0" max="100" value="50" aria-label="How much of the accelerated picture is seen"></div>"""
_STATES = """<h2>What each step foresees</h2><div class="strip"></div>"""
_CODE = """<details><summary>Show the Python</summary>
<p class="hint">This draws the accelerated picture, to the same pixels.
<a id="input-png" download="input.png" hidden>Save input.png, the picture it begins from</a></p>
<div class="code"><button type="button" class="small" id="copy">Copy</button><pre tabindex="0"
aria-label="Python that draws the accelerated picture"><code></code></pre></div></details>"""
_CANVAS = """<div class="easel"><canvas width="256" height="256" tabindex="0" role="img"
aria-label="The picture to begin from. Draw on it with the pointer, or upload one"></canvas>
<div class="tools"><label class="button">Upload a picture<input type="file"
accept="image/png,image/jpeg,image/webp"></label>
<label>Colour <input type="color" value="#c0392b" id="brush-colour"></label>
<label>Brush <input type="range" min="1" max="40" value="14" id="brush-size"></label>
<button type="button" class="small" id="undo">Undo</button>
<button type="button" class="small" id="clear">Clear</button></div></div>"""
_SHOTS = """<p class="hint">The pictures of this window, the newest first. Click one to take its settings.</p>
<div class="shots"><p class="none">Nothing has been drawn yet.</p></div>"""
_LOAD = """<label class="button">Load settings from a PNG<input type="file" accept="image/png"></label>
<p class="hint">Every PNG saved here carries its settings.</p>"""
_MODEL = """<p class="hint">Another model, for all windows of this server. "miniature" is the one that comes with the
package.</p>"""
_MODELS = "A folder, a Hub id or a .safetensors checkpoint."
_ACCELERATORS = "A folder, file, Hub id or short name; none if it is in the model's weights."


def theme() -> Any:
    """Quiet grays and one accent; fonts that the machine has, none from a network."""
    made = gr.themes.Base(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=MONO)
    return made.set(
        block_border_width="0px",
        block_shadow="none",
        block_background_fill="transparent",
        block_padding="0px",
        block_label_background_fill="transparent",
        body_background_fill="#ffffff",
        body_background_fill_dark="#12161d",
        background_fill_primary_dark="#12161d",
        input_background_fill="#f4f6f8",
        input_background_fill_dark="#1d232d",
        block_background_fill_dark="transparent",
        body_text_color_subdued="*neutral_600",  # the base's own grays and links are too faint on white
        block_info_text_color="*neutral_600",
        link_text_color="*secondary_700",
        link_text_color_active="*secondary_700",
        link_text_color_hover="*secondary_800",
        link_text_color_visited="*secondary_700",
        color_accent="*primary_700",
        slider_color="*primary_700",
        slider_color_dark="*primary_600",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
    )


def head() -> str:
    """Style and script, for the page's head: Gradio would rewrite the selectors of a style that is passed as `css`."""
    style, script = ((ASSETS / name).read_text("utf-8") for name in ("page.css", "page.js"))
    return f"<style>{style}</style><script>{script}</script>"


def build(may_open: bool = True) -> gr.Blocks:
    """The page's controls. `may_open`: with a tab for another model."""
    with gr.Blocks(title="PeRFlow", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.HTML("<header><h1>PeRFlow</h1><p></p></header>", elem_id="head")
        gr.HTML("", elem_id="status")
        # Gradio builds what is in a tab when it is first opened; the script needs its frames from the beginning.
        names = {"text": "Text to image", "image": "Image to image", "gallery": "Gallery", "model": "Model"}
        if not may_open:
            names.pop("model")
        with gr.Tabs(elem_id="tabs"):
            tabs = {name: gr.Tab(label, id=name, elem_id=f"tab-{name}") for name, label in names.items()}
        with gr.Row(elem_id="sheet-image", elem_classes="sheet"):
            gr.HTML(_CANVAS, elem_id="upload", min_width=260)
            with gr.Column(min_width=240):
                strength = gr.Slider(
                    0.05,
                    1,
                    STRENGTH,
                    step=0.05,
                    label="How far from the picture",
                    info="The first steps are skipped: fewer are drawn, and more of the picture stays.",
                    elem_id="image-strength",
                    buttons=[],
                )
        with gr.Column(elem_id="sheet-gallery", elem_classes="sheet"):
            gr.HTML(_SHOTS, elem_id="shots")
            gr.HTML(_LOAD, elem_id="load-png")
        if may_open:
            with gr.Column(elem_id="sheet-model", elem_classes="sheet"):
                gr.HTML(_MODEL)
                with gr.Row(equal_height=False):
                    model = gr.Textbox("", label="Model", info=_MODELS, elem_id="model", min_width=260)
                    accelerator = gr.Textbox(
                        "", label="Accelerator", info=_ACCELERATORS, elem_id="accelerator", min_width=260
                    )
                    start = gr.Button("Load", variant="primary", elem_id="open", scale=0, min_width=100)
                start.click(None, [model, accelerator], None, js="(m, a) => { window.perflow.open(m, a); }")
        with gr.Row(elem_id="ask", equal_height=False):
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
            suggest = gr.Button("Suggest one", elem_id="suggest", scale=0, min_width=120)
        gr.HTML("", elem_id="note")
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=3, min_width=320, elem_id="results"):
                gr.HTML(_FIGURE.format(empty="The picture", title="PeRFlow"), elem_id="picture")
                gr.HTML(_FIGURE.format(empty="Without the accelerator", title="without"), elem_id="stock-picture")
                gr.HTML(_CURTAIN, elem_id="curtain")
                gr.HTML(_STATES, elem_id="states")
            with gr.Column(scale=1, min_width=280, elem_id="controls"):
                steps = gr.Slider(1, MAX_STEPS, 4, step=1, label="Steps", elem_id="steps", buttons=[])
                guidance = gr.Slider(0, 15, 1, step=0.1, label="Guidance", elem_id="guidance", buttons=[])
                scale = gr.Slider(
                    0, MAX_SCALE, 1, step=0.05, label="Accelerator strength", elem_id="strength", buttons=[]
                )
                with gr.Row(elem_id="noise", equal_height=False):
                    seed = gr.Number(
                        0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed", min_width=110
                    )
                    renew = gr.Button("New seed", elem_id="renew", min_width=110, scale=0)
                negative = gr.Textbox(
                    "",
                    label="Negative prompt",
                    info="Works with guidance above 1.",
                    elem_id="negative",
                    max_length=MAX_PROMPT,
                )
                gr.HTML("<h2>Without the accelerator</h2>")
                solver = gr.Dropdown(
                    list(SOLVERS), value="DPM-Solver++", label="Solver", elem_id="stock", filterable=False
                )
                stock_steps = gr.Slider(1, 100, 4, step=1, label="Its steps", elem_id="stock-steps", buttons=[])
                stock_guidance = gr.Slider(
                    0, 15, 7.5, step=0.1, label="Its guidance", elem_id="stock-guidance", buttons=[]
                )
        gr.HTML(_CODE, elem_id="code")
        hands = gr.HTML(
            "", elem_id="hands", visible="hidden", js_on_load="window.perflow.hands = () => trigger('click');"
        )
        controls: list[Any] = [
            prompt, negative, seed, steps, guidance, scale, solver, stock_steps, stock_guidance, strength,
        ]  # fmt: skip
        if len(controls) != len(NAMES):
            raise AssertionError("one control a name")
        # A prompt is pasted, dictated and put there by scripts, too, which `input` does not see.
        changes = [prompt.change, *(control.input for control in controls[1:])]
        gr.on(changes, None, controls, None, js="(...values) => { window.perflow.wish(values); }")
        hands.click(None, None, controls, js="() => window.perflow.given()")
        for name, tab in tabs.items():
            tab.select(None, None, None, js=f"() => {{ window.perflow.tab('{name}'); }}")
        renew.click(None, None, None, js="() => { window.perflow.renew(); }")
        suggest.click(None, None, None, js="() => { window.perflow.suggest(); }")
    return blocks
