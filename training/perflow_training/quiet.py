"""No line that the user did not cause. The scripts import it first, before torch and diffusers, which take seconds."""

import os
import sys
from types import TracebackType


def _said(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _said
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it names what is not installed and not needed


def calm() -> None:
    """Before models are loaded: one bar at a time, and none in pipes and logs."""
    import datasets
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers

    transformers.logging.disable_progress_bar()  # inside diffusers' own
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
