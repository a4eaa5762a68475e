"""The command `perflow draw`."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from perflow_diffusers.cli.terminal import failing, note
from perflow_diffusers.io.atomic import unfinished


def draw(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help='What to draw: "a person with red hair"')],
    out: Annotated[
        Path | None, typer.Option(help="The .png file to write. Default: named by the prompt; nothing is overwritten.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, max=1000, help="Pictures to draw, of seeds one after another.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise of the first picture.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, max=16, help="Default: as the accelerator says.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, max=30, help="Default: as the accelerator says.")] = None,
    model: Annotated[
        str, typer.Option(help='A folder, a Hub id or a .safetensors checkpoint; "miniature" needs no network.')
    ] = "miniature",
    accelerator: Annotated[
        str | None, typer.Option(help="What load_perflow takes; leave it out if PeRFlow is in the model's weights.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu. Default: the first that is there.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16 or float32. Default: float16, on a CPU float32.")
    ] = None,
) -> None:
    """Draw a picture in a few steps.

    Its path is printed, and its settings are in the PNG.

    Examples:

        perflow draw "a person with red hair"

        perflow draw "a cat" --model Lykon/dreamshaper-8 --accelerator perflow-sd15-delta
    """
    with failing("draw"):
        if not prompt.strip():
            raise ValueError('The prompt is empty. Say what to draw: perflow draw "a person with red hair".')
        if out is not None and out.suffix.lower() != ".png":
            raise ValueError(f"The output {out} is not a .png file. Choose a name that ends in .png.")
        folder = Path() if out is None else out.parent
        if not folder.is_dir():
            raise ValueError(f"The folder {folder} does not exist. Create it first.")
        if out is not None and n == 1 and out.exists():
            raise ValueError(f"{out} exists already. Choose another name.")
        import transformers

        transformers.logging.set_verbosity_error()  # it names what is not installed and not needed
        from perflow_diffusers.app.opening import open_studio
        from perflow_diffusers.app.pictures import enlarge, to_png
        from perflow_diffusers.app.settings import Settings
        from perflow_diffusers.miniature import unknown_words_sentence

        studio = open_studio(model, accelerator, device=device, dtype=dtype)
        if studio.is_miniature:
            sentence = unknown_words_sentence(prompt, studio.model)
            if sentence:
                note("draw", sentence)
        studio.pipe.set_progress_bar_config(disable=True if studio.is_miniature else None, leave=False)
        studio.prepare_thread()
        for number in range(n):
            settings = Settings(
                prompt,
                seed=seed + number,
                steps=min(studio.steps, 16) if steps is None else steps,
                guidance_scale=studio.guidance_scale if guidance is None else guidance,
            )
            drawing = studio.draw(settings)
            for text in drawing.notes:
                note("draw", text)
            path = _write(to_png(enlarge(drawing.picture), settings, studio.about), out or Path(_named(prompt)))
            typer.echo(str(path))


def _named(prompt: str) -> str:
    slug = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
    return (slug[:60].rstrip("-") or "picture") + ".png"


def _write(png: bytes, path: Path) -> Path:
    """Write to the path, or to the next free one, name-2.png and so on; whole or not at all."""
    partial = unfinished(path)
    partial.write_bytes(png)
    try:
        number = 1
        while True:
            free = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
            try:
                os.link(partial, free)  # fails if the name is taken, also by another process meanwhile
                return free
            except FileExistsError:
                number += 1
            except OSError:  # a file system without links
                if not free.exists():
                    os.replace(partial, free)
                    return free
                number += 1
    finally:
        partial.unlink(missing_ok=True)
