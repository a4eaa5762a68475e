"""What a smaller form of the miniature's delta costs: file size against weight error and image error.

    python benchmarks/delta_sizes.py --out benchmarks/results/delta_sizes.md --plot docs/delta_sizes.png

Forms: float16, bfloat16, int8 with a scale per output channel, and LoRAs of several ranks with a float16 residual of
biases and norms. Weight error: ||stored - delta|| / ||delta|| in float64. Pixel error: 4 steps, guidance 1, to the
checkpoint's own 100-step picture from the same noise. Gain kept: (stock - form) / (stock - delta), where stock is the
best stock sampler's pixel error at 4 and at 8 network evaluations.
"""

import argparse
import statistics
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from miniature_quality import Bench, best
from perflow_diffusers import (
    MINIATURE_GUIDANCE,
    extract_lora,
    measure_moments,
    merge_delta,
    open_weights,
    shrink_delta,
)
from perflow_diffusers.hub import perflow_scheduler
from perflow_diffusers.weights.read.lora import as_delta

RANKS = (4, 8, 16, 32, 48)


@dataclass
class Form:
    """A stored form of the delta: its files' bytes, relative weight error, and pixel errors by seed."""

    label: str
    nbytes: int
    weight_error: float
    pixel: list[float]

    @property
    def error(self) -> float:
        return statistics.mean(self.pixel)


def weight_error(exact, stored) -> float:
    """||stored - exact|| / ||exact|| over all tensors, float64."""
    stored = as_delta(open_weights(stored))
    difference = norm = 0.0
    for name in exact:
        whole = exact[name].double()
        have = stored[name].double() if name in stored else torch.zeros_like(whole)
        difference += float((have - whole).pow(2).sum())
        norm += float(whole.pow(2).sum())
    return (difference / norm) ** 0.5


def activation_moments(bench: Bench, delta: str):
    """Second moments of every layer's inputs while the accelerated pipeline draws held-out prompts in 4 steps."""
    with merge_delta(bench.pipe, delta) as merged:
        bench.pipe.scheduler = perflow_scheduler(bench.config, merged.metadata)
        return measure_moments(bench.pipe, lambda: bench.draw(seed=99, steps=4, guidance=1.0))


def forms(folder: Path, delta: str, moments) -> list[tuple[str, Path, int]]:
    """(label, file, bytes) of every form, written to `folder`."""
    made = []
    for dtype in ("float16", "bfloat16", "int8"):
        path = folder / f"{dtype}.safetensors"
        shrink_delta(delta, path, dtype)
        made.append((dtype, path, path.stat().st_size))
    for rank, weighting in product(RANKS, (None, moments)):
        path = folder / f"rank-{rank}-{'plain' if weighting is None else 'weighted'}.safetensors"
        extract_lora(delta, path, rank=rank, exact=True, moments=weighting)
        size = sum(file.stat().st_size for file in folder.glob(f"{path.stem}*.safetensors"))
        made.append((f"LoRA rank {rank}" + ("" if weighting is None else ", weighted by activations"), path, size))
    return made


def table(rows: list[Form], stock: dict[int, float]) -> str:
    """Markdown; the first row is the delta as it is shipped."""
    whole = rows[0].error
    lines = [
        "| form | kB | weight error | pixel error | gain kept (stock, 4 evaluations) | (stock, 8 evaluations) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        kept = [f"{100 * (stock[e] - row.error) / (stock[e] - whole):.1f} %" for e in (4, 8)]
        cells = [row.label, f"{row.nbytes / 1000:.0f}", f"{row.weight_error:.4f}", f"{row.error:.4f}", *kept]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"\nBest stock sampler: {stock[4]:.4f} at 4 evaluations, {stock[8]:.4f} at 8.")
    return "\n".join(lines) + "\n"


def plot(rows: list[Form], stock: dict[int, float], path: Path) -> None:
    """Size against gain kept, one point a form."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5))
    whole = rows[0].error
    loras = [row for row in rows if row.label.startswith("LoRA")]
    groups = {
        "delta": ("s", "none", [row for row in rows if row not in loras]),
        "LoRA + residual": ("o", "-", [row for row in loras if "weighted" not in row.label]),
        "LoRA weighted by activations": ("^", "--", [row for row in loras if "weighted" in row.label]),
    }
    for label, (marker, line, chosen) in groups.items():
        x = [row.nbytes / 1000 for row in chosen]
        y = [100 * (stock[4] - row.error) / (stock[4] - whole) for row in chosen]
        axes.plot(x, y, marker, linestyle=line, label=label)
        for row, a, b in zip(chosen, x, y, strict=True):
            if "weighted" not in row.label and row.label not in ("bfloat16", "as shipped (float16)"):
                name = row.label.removeprefix("LoRA ").replace("float16", "16 bits")
                axes.annotate(name, (a, b), (4, -12), textcoords="offset points", fontsize=8)
    axes.axhline(80, color="gray", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlabel="size of the files, kB", ylabel="gain kept, %")
    axes.set_title("The miniature's accelerator in smaller forms, 4 steps")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--delta", default="miniature")
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    parser.add_argument("--plot", type=Path, help="write the plot to this PNG")
    args = parser.parse_args()
    bench = Bench("avatars", args.pictures, args.seeds)
    bench.measure("reference", 100, MINIATURE_GUIDANCE, reference=True)
    lines = bench.stock(2, MINIATURE_GUIDANCE) + bench.stock(4, MINIATURE_GUIDANCE)
    stock = {evaluations: best(lines, evaluations) for evaluations in (4, 8)}
    exact = open_weights(args.delta)
    with tempfile.TemporaryDirectory() as folder:
        rows = [Form("as shipped (float16)", exact.nbytes, 0.0, bench.perflow(args.delta, "", [4], 1.0)[0].pixel)]
        for label, path, nbytes in tqdm(
            forms(Path(folder), args.delta, activation_moments(bench, args.delta)), desc="forms"
        ):
            line = bench.perflow(path, label, [4], 1.0)[0]
            rows.append(Form(label, nbytes, weight_error(exact, path), line.pixel))
    text = f"{args.pictures} held-out prompts, {args.seeds} noise seeds; `python benchmarks/delta_sizes.py`\n\n"
    text += table(rows, stock)
    print(text)
    if args.out:
        args.out.write_text(text)
    if args.plot:
        plot(rows, stock, args.plot)


if __name__ == "__main__":
    main()
