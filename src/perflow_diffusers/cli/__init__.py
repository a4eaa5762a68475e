"""The command `perflow`: argument parsing, then one library call a command."""

import typer

from perflow_diffusers.cli.demo import demo
from perflow_diffusers.cli.hub import info, pull, push
from perflow_diffusers.cli.weights import combine, convert, diff, extract_lora, merge

app = typer.Typer(
    name="perflow",
    help="Few-step sampling for Stable Diffusion pipelines: accelerators made, merged, converted, published.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def perflow() -> None:
    """Few-step sampling for Stable Diffusion pipelines: accelerators made, merged, converted, published."""


for command in (demo, info, diff, merge, extract_lora, combine, convert, push, pull):
    app.command()(command)


def main() -> None:
    """Entry point of the console script."""
    app()
