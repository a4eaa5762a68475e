"""The command `perflow env`."""

import os
import platform
from importlib import metadata

import typer

#: what a report of a fault needs the versions of
PACKAGES = (
    "perflow-diffusers",
    "torch",
    "diffusers",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "accelerate",
    "peft",
    "gradio",
)
#: variables that change how the Hub and torch behave
VARIABLES = (
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ENABLE_MPS_FALLBACK",
    "OMP_NUM_THREADS",
)


def env() -> None:
    """Print versions and devices, for a report of a fault. No paths, names or tokens are in it.

    Example:

        perflow env
    """
    lines = {name: _version(name) for name in PACKAGES}
    lines["Python"] = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    lines["devices"] = _devices()
    lines |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    width = max(map(len, lines))
    for name, value in lines.items():
        typer.echo(f"{name:{width}}  {value}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    found = [f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"]
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        found.append(f"cuda:{number} ({facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda})")
    if torch.backends.mps.is_available():
        found.append("mps")
    return ", ".join(found)
