"""Second moments of what flows into each layer, E[x x^T]: `measure_moments(unet, run)`, weights for `extract_lora`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from perflow_diffusers.weights.read import keys
from perflow_diffusers.weights.read.live import find_unet
from perflow_diffusers.words.arguments import in_words
from perflow_diffusers.words.shown import LongDict


def measure_moments(pipe_or_unet: Any, run: Callable[[], object], *, full: bool = False) -> dict[str, torch.Tensor]:
    """Run the model and average the squares of every linear and convolution layer's inputs.

    `run` is called once, without gradients; it draws pictures with the model for prompts like those to come, with the
    scheduler, steps and guidance to come. Returns `{canonical weight name: moment}`, fp32 on the CPU, for layers that
    were called: (in_features,) of a linear layer, (in_channels,) of a convolution, the mean over batch and positions
    of x_i^2. With `full`, linear layers get E[x x^T], (in_features, in_features): more faithful, but 100 MiB for a
    layer with 5120 inputs.

    Raises `MergeError` if there is no UNet, ValueError if `run` never called it or is no function.
    """
    unet = find_unet(pipe_or_unet)
    if not callable(run):
        raise ValueError(
            f"`run` is {in_words(run)}, not a function. Pass one that draws pictures when it is called: "
            "`measure_moments(pipe, lambda: pipe(prompts))`."
        )
    sums: dict[str, tuple[torch.Tensor, int]] = {}
    hooks = []
    try:
        for module_name, module in unet.named_modules():
            name = keys.canonical(f"{module_name}.weight")
            if name is not None and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                hooks.append(module.register_forward_pre_hook(partial(_add, sums, name, full)))
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    if not sums:
        raise ValueError("`run` never called the UNet. Pass a function that draws pictures with the same pipeline.")
    return LongDict({name: (total / count).float() for name, (total, count) in sums.items()})


def _add(
    sums: dict[str, tuple[torch.Tensor, int]], name: str, full: bool, module: torch.nn.Module, inputs: tuple
) -> None:
    """Add one call's squares to the sums (float64 on the CPU), whatever dtype and device the model has."""
    given = inputs[0].detach()
    rows = given.movedim(1, -1) if isinstance(module, torch.nn.Conv2d) else given
    rows = rows.reshape(-1, rows.shape[-1]).float()
    products = rows.T @ rows if full and isinstance(module, torch.nn.Linear) else rows.square().sum(dim=0)
    total, count = sums.get(name, (torch.zeros(products.shape, dtype=torch.float64, device="cpu"), 0))
    sums[name] = (total + products.cpu().double(), count + len(rows))
