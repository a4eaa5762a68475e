"""torch.compile for teacher and student: said before it takes minutes, left out with a sentence where it fails."""

import logging
import warnings
from typing import cast

import torch

logger = logging.getLogger(__name__)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, tried on a function of one line; says why not.

    It needs a C++ compiler on a CPU, and Triton with a C compiler on a GPU. A failure of the network's own would come
    a minute later, out of the middle of a step, as a hundred lines.
    """
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a", category=UserWarning)  # diffusers' caches
    try:
        # as much as the CPU's code generator vectorises, so that it is asked for, too
        torch.compile(torch.cos, dynamic=False)(torch.ones(64, device=device))
    except Exception as error:
        torch.compiler.reset()
        logger.warning(
            "`torch_compile=true` cannot be had here, and the run goes on without it, to the same end but slower: %s "
            "Install a C++ compiler (g++ or clang; on a GPU Triton, too), or set `torch_compile=false`.",
            _reason(error),
        )
        return False
    logger.info("Compiling teacher and student: 1 to 2 minutes before the first step, and again for a new batch size.")
    return True


def compiled(network: torch.nn.Module, dynamic: bool | None) -> torch.nn.Module:
    """The network, compiled when it is first called; `dynamic` as `torch.compile` has it."""
    return cast(torch.nn.Module, torch.compile(network, dynamic=dynamic))


def _reason(error: Exception) -> str:
    """The first line that says something, as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines[0] if lines else type(error).__name__)[:200]
    return text if text.endswith(".") else f"{text}."
