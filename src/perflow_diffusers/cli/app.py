"""The command `perflow app`."""

from typing import Annotated

import typer

from perflow_diffusers.cli.terminal import failing, note


def app_command(
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
    offload: Annotated[
        str | None, typer.Option(help='For a small GPU: "model" or, slower and smaller still, "sequential".')
    ] = None,
    host: Annotated[str, typer.Option(help="The address to serve at; 0.0.0.0 for the whole network.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open a browser.")] = False,
    share: Annotated[
        bool, typer.Option("--share", help="Open a public address through Gradio's servers. Anyone may use it.")
    ] = False,
) -> None:
    """Serve a page that draws while you type.

    It shows the same model without its accelerator, too. Needs the extra "app": pip install
    "perflow-diffusers[app]". Stop it with Ctrl-C.

    Examples:

        perflow app

        perflow app --model Lykon/dreamshaper-8 --accelerator perflow-sd15-delta
    """
    with failing("app"):
        from perflow_diffusers.app.hosts import LOOPBACK
        from perflow_diffusers.app.server import serve

        if host not in LOOPBACK:
            note("app", f"everyone who reaches {host} can use this page.")
        try:
            serve(
                model,
                accelerator,
                host=host,
                port=port,
                browser=not no_browser,
                share=share,
                tell=lambda address: typer.echo(f"The page is at {address} (Ctrl-C stops it)"),
                device=device,
                dtype=dtype,
                offload=offload,
            )
        except KeyboardInterrupt:
            typer.echo("Stopped.")
