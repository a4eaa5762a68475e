"""Starting and stopping the page's server."""

import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

from perflow_diffusers.app.hosts import LOOPBACK

FIRST_PORT, LAST_PORT = 7860, 7959
MISSING = 'The page needs Gradio. Install it with: pip install "perflow-diffusers[app]"'


class ServerError(ValueError):
    """The page cannot be served; says what to do."""


def free_port(host: str, port: int | None) -> int:
    """The port that was asked for, or the first free one from 7860. Raises ServerError for one that is taken."""
    for candidate in (port,) if port is not None else range(FIRST_PORT, LAST_PORT + 1):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
                return candidate
            except OSError as error:
                reason = error.strerror
    asked = f"The port {port}" if port is not None else f"Every port from {FIRST_PORT} to {LAST_PORT}"
    raise ServerError(f"{asked} of {host} cannot be had ({reason}). Choose another with --port or --host.")


def serve(
    model: str = "miniature",
    accelerator: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = True,
    share: bool = False,
    tell: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> None:
    """Serve the page until Ctrl-C. `tell` is given its address; `options`: device, dtype, offload of `open_studio`.

    Raises ServerError without Gradio, or for a port that is taken.
    """
    # Before Gradio and the Hub's client are imported, which read them: nothing is reported to anyone.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    chosen = free_port(host, port)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Gradio's own age; nothing that its user could mend
        try:
            from perflow_diffusers.app.live import Live
            from perflow_diffusers.app.page import build, head, theme
            from perflow_diffusers.app.pictures import MAX_BYTES
            from perflow_diffusers.app.room import Room
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in ("gradio", "gradio_client"):
                raise
            raise ServerError(MISSING) from None
    import transformers

    transformers.logging.set_verbosity_error()  # it names what is not installed and not needed
    room = Room(**options)
    room.open(model, accelerator)
    may_open = host in LOOPBACK and not share
    live = Live(room, may_open)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blocks = build(may_open)
        try:
            blocks.launch(
                server_name=host,
                server_port=chosen,
                share=share,
                inbrowser=browser,
                prevent_thread_lock=True,
                quiet=True,
                theme=theme(),
                head=head(),
                footer_links=[],
                max_file_size=MAX_BYTES,
                ssr_mode=False,
                show_error=False,
                app_kwargs={"routes": live.routes()},
            )
            shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
            tell(f"http://{shown}:{chosen}/")
            blocks.block_thread()
        finally:
            room.close()
            blocks.close(verbose=False)
