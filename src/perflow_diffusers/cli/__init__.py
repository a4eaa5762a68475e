"""The command `perflow`: argument parsing, then one library call a command."""

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from perflow_diffusers._version import __version__
from perflow_diffusers.cli.app import app_command
from perflow_diffusers.cli.demo import demo
from perflow_diffusers.cli.draw import draw
from perflow_diffusers.cli.env import env
from perflow_diffusers.cli.help import help_of
from perflow_diffusers.cli.hub import info, pull, push
from perflow_diffusers.cli.terminal import interrupted
from perflow_diffusers.cli.weights import combine, convert, diff, extract_lora, merge

app = typer.Typer(
    name="perflow",
    help="Few-step sampling for Stable Diffusion pipelines: accelerators made, merged, converted, published.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes cut the names of options, and take [app] in a text for markup
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


def _interruptible(command: Callable[..., None], name: str) -> Callable[..., None]:
    """The command with a sentence for Ctrl-C, also while it imports torch and diffusers, which takes seconds."""

    @functools.wraps(command)
    def run(*words: Any, **options: Any) -> None:
        try:
            command(*words, **options)
        except KeyboardInterrupt:
            interrupted(name)

    return run


for command in (demo, draw, info, diff, merge, extract_lora, combine, convert, push, pull, env):
    name = command.__name__.replace("_", "-")
    app.command(name, help=help_of(command))(_interruptible(command, name))
app.command("app", help=help_of(app_command))(_interruptible(app_command, "app"))


def main() -> None:
    """Entry point of the console script."""
    app()
