"""Second moments of what flows into each layer, E[x x^T]: `measure_moments(unet, run)`, and how they weigh errors."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from perflow_diffusers.errors import DeltaError
from perflow_diffusers.weights.read import keys
from perflow_diffusers.weights.read.live import find_unet
from perflow_diffusers.words.arguments import in_words
from perflow_diffusers.words.shown import LongDict

_FLOOR = 1e-6  # of the mean moment: an input that was never on must not make the weights of others infinite


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


def check_moments(moments: Any) -> None:
    """Raises `DeltaError` for what is no tensor by weight."""
    fine = isinstance(moments, Mapping) and all(isinstance(moment, torch.Tensor) for moment in moments.values())
    if moments is not None and not fine:
        raise DeltaError(
            f"moments is {in_words(moments)}, not a tensor by weight. Pass what "
            "`measure_moments(pipe, lambda: pipe(prompt))` returns."
        )


def root_of(name: str, moment: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """R with R R^T = the moment, (columns,) for a diagonal or lower triangular; None without weighting.

    Raises `DeltaError` if the moment does not fit the weight or is none.
    """
    if moment is None:
        return None
    columns, places = torch.Size(shape[1:]).numel(), torch.Size(shape[2:]).numel()
    given = moment.detach().cpu().double()
    if given.shape == (shape[1],):
        given = given.repeat_interleave(places)
    if given.shape not in ((columns,), (columns, columns)):
        raise DeltaError(
            f"The moment of {name} has shape {tuple(moment.shape)}, its weight {shape}. Expected ({shape[1]},) or "
            f"({columns}, {columns}), as `measure_moments` gives it for the same model."
        )
    diagonal = given if given.ndim == 1 else given.diagonal()
    mean = diagonal.mean().item()
    if not (given.isfinite().all() and (diagonal >= 0).all()):
        raise DeltaError(f"The moment of {name} has NaN, Inf or negative squares. Measure it again.")
    if mean == 0:
        return None
    given = given / mean
    if given.ndim == 1:
        return (given + _FLOOR).sqrt().float()
    root, failed = torch.linalg.cholesky_ex(
        given + _FLOOR * torch.eye(columns, dtype=torch.float64, device=given.device)
    )
    if failed.item():
        raise DeltaError(f"The moment of {name} is not positive semidefinite, so it is no mean of x x^T.")
    return root.float()


def weighted_by(matrix: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """The matrix (m, n) times the root, so that its squared norm is the mean square of what the layer puts out."""
    return matrix * root if root.ndim == 1 else matrix @ root


def unweighted(matrix: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """The inverse of `weighted_by`."""
    if root.ndim == 1:
        return matrix / root
    return torch.linalg.solve_triangular(root, matrix, upper=False, left=False)
