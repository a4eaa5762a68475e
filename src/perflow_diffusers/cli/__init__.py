"""The command `perflow`: argument parsing, then one library call a command."""

from typing import Annotated

import typer

from perflow_diffusers._version import __version__
from perflow_diffusers.cli.app import app_command
from perflow_diffusers.cli.demo import demo
from perflow_diffusers.cli.draw import draw
from perflow_diffusers.cli.hub import info, pull, push
from perflow_diffusers.cli.weights import combine, convert, diff, extract_lora, merge

app = typer.Typer(
    name="perflow",
    help="Few-step sampling for Stable Diffusion pipelines: accelerators made, merged, converted, published.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"perflow-diffusers {__version__}")
        raise typer.Exit


@app.callback()
def perflow(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Few-step sampling for Stable Diffusion pipelines: accelerators made, merged, converted, published."""


for command in (demo, draw, info, diff, merge, extract_lora, combine, convert, push, pull):
    app.command()(command)
app.command(name="app")(app_command)


def main() -> None:
    """Entry point of the console script."""
    app()
