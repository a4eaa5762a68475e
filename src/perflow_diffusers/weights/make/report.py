"""What an extraction kept and what it lost, per layer and in total: a table for people, a dict for JSON."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perflow_diffusers.weights.read import keys
from perflow_diffusers.words.shown import html_table, plain, shorten, shown, size_in_words

_SHOWN = 8


@shown
@dataclass(frozen=True)
class LayerReport:
    """One layer of a LoRA. Errors are relative to the norm of the layer's difference, 0 = exact, 1 = nothing kept.

    `shape` is the weight's; `norm` the Frobenius norm of its difference; `relative_error` that of the factors as they
    are stored, rounding included; `weighted_error` the same weighted by the inputs' moments (None without moments);
    `optimal_error` the Eckart-Young bound, in the weighted norm if there are moments (None where it is not known:
    with the randomised method); `nbytes` of both factors.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    relative_error: float
    weighted_error: float | None
    optimal_error: float | None
    nbytes: int


@shown
@dataclass(frozen=True)
class LoraReport:
    """What `extract_lora` did.

    `layers` are in the LoRA; `zero` are layers whose difference is 0, which the LoRA leaves out; `not_carried` are
    tensors that no LoRA can hold (biases, norms, ...), in `residual_path` or, if that is None, dropped.
    `not_carried_energy` is their share of the delta's squared norm (0..1). `relative_error` is that of the LoRA
    alone, `relative_error_with_residual` that of both files together. Sizes are bytes of tensors.
    """

    path: Path
    residual_path: Path | None
    layers: tuple[LayerReport, ...]
    zero: tuple[str, ...]
    not_carried: tuple[str, ...]
    not_carried_energy: float
    relative_error: float
    relative_error_with_residual: float
    nbytes: int
    residual_nbytes: int
    delta_nbytes: int

    def __post_init__(self) -> None:
        shorten(self)

    def _repr_html_(self) -> str:
        """The layers of each block: errors in the norm of the block's difference."""
        layers, rows = {layer.name: layer for layer in self.layers}, []
        for block, names in keys.by_block(layers).items():
            found = [layers[name] for name in names]
            norm = sum(layer.norm**2 for layer in found) ** 0.5
            lost = sum((layer.relative_error * layer.norm) ** 2 for layer in found) ** 0.5
            ranks = sorted({layer.rank for layer in found})
            span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            size = size_in_words(sum(layer.nbytes for layer in found))
            rows.append((block, len(found), span, f"{lost / norm if norm else 0:.4f}", f"{norm:.3f}", size))
        columns = ("block", "layers", "rank", "error", "norm", "size")
        return html_table("\n".join(str(self).splitlines()[:4]), columns, rows)

    def __str__(self) -> str:
        """A summary and a table of the layers with the largest share of the lost energy."""
        ranks = sorted(layer.rank for layer in self.layers)
        both = self.nbytes + self.residual_nbytes
        where = self.residual_path.name if self.residual_path else "dropped"
        span = f"rank {ranks[0]}"
        if ranks[0] != ranks[-1]:
            span += f" to {ranks[-1]} (median {ranks[len(ranks) // 2]})"
        share = 100 * self.not_carried_energy
        lines = [
            f"{self.path}: {len(self.layers)} layers, {span}",
            f"size      {both / 2**20:.1f} MiB, {100 * both / self.delta_nbytes:.1f} % of the delta"
            + (f" ({self.residual_nbytes / 2**20:.1f} MiB of it residual)" if self.residual_path else ""),
            f"error     {self.relative_error:.4f} of the delta's norm"
            + (f", {self.relative_error_with_residual:.4f} with the residual" if self.residual_path else ""),
            f"no LoRA   {len(self.not_carried)} tensors with {share:.3f} % of the energy: {where}",
        ]
        if self.zero:
            lines.append(f"zero      {len(self.zero)} layers without a difference: {keys.grouped(self.zero)}")
        worst = sorted(self.layers, key=lambda layer: -layer.relative_error * layer.norm)[:_SHOWN]
        width = max(len(layer.name) for layer in worst)
        lines += ["", f"{'largest losses':{width}} {'shape':>18} {'rank':>5} {'error':>7} {'norm':>9}"]
        for layer in worst:
            shape = "x".join(map(str, layer.shape))
            error = f"{layer.relative_error:7.4f} {layer.norm:9.3g}"
            lines.append(f"{layer.name:{width}} {shape:>18} {layer.rank:5d} {error}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it, fit for `json.dumps`."""
        return plain(self)
