"""The command `perflow demo`."""

from pathlib import Path
from typing import Annotated

import typer

from perflow_diffusers.cli.terminal import failing, note
from perflow_diffusers.io.atomic import whole


def demo(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPTS", help='What to draw, one column each: "a person with red hair and glasses"'),
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture to write, a .png file.")] = Path("perflow-demo.png"),
    columns: Annotated[int, typer.Option(min=1, max=24, help="Prompts to draw when none is given.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the noise, and of the choice of prompts.")] = 0,
) -> None:
    """Draw few steps beside many, on the embedded small pipeline.

    Every column starts from the same noise. Rows: 100 steps, stock samplers at 4 steps, PeRFlow at 4 and 8 steps; then
    the same for a fine-tuned checkpoint that the accelerator has never seen. Needs no network; takes about ten seconds
    of one core.

    Examples:

        perflow demo

        perflow demo "a person with red hair and glasses" "a sad person with a purple hat" --out mine.png
    """
    with failing("demo"):
        import transformers

        from perflow_diffusers import demo as demonstration

        transformers.logging.set_verbosity_error()  # it names what is not installed and not needed
        demonstration.check_output(out)
        for sentence in demonstration.remarks(prompts or ()):
            note("demo", sentence)
        typer.echo("Drawing with the embedded miniature (32 x 32 pictures, 1.9 M parameters).")
        rows = demonstration.draw_rows(prompts, columns, seed, on_row=lambda row: typer.echo(f"  {row.label}"))
        try:
            with whole(out) as partial:
                demonstration.compose(rows).save(partial, "PNG")
        except OSError as error:
            raise ValueError(f"{out} cannot be written ({error}). Choose another output with --out.") from None
        typer.echo(f"{demonstration.table(rows)}\n{out}")
