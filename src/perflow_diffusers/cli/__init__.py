"""The command `perflow`: argument parsing, then one library call a command."""

import typer

from perflow_diffusers.cli.demo import demo

app = typer.Typer(
    name="perflow",
    help="Few-step sampling for Stable Diffusion pipelines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def perflow() -> None:
    """Few-step sampling for Stable Diffusion pipelines."""


app.command()(demo)


def main() -> None:
    """Entry point of the console script."""
    app()
