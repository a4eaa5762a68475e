"""Time and error of extracting a LoRA from a delta of SD 1.5's real size (860 M random numbers, fp16, CPU).

    OMP_NUM_THREADS=2 python benchmarks/lora.py [--rank 64] [--full] [--write] [--folder TMP] [--small]

Gaussian noise is the hardest delta there is for a method that takes a random basis: its spectrum is flat, and the best
directions are hardly better than the others. Compares `extract_lora` (reading, factors, their error, writing) with
`torch.linalg.svd` (full_matrices=False) alone on the same matrices in fp32: of each shape one matrix, times the number
of matrices of that shape. The optimal error of every layer comes from the eigenvalues of its Gram matrix, in fp32:
with a flat spectrum that is right to six digits. --full takes the SVD of every matrix, and the eigenvalues in float64.
`extract_lora` runs before and after the SVDs and the mean counts, in case the machine's load changes; seconds of CPU
count all threads and say more than the clock on a busy machine. --write also writes the table to
benchmarks/results/lora_extraction.md.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging

from merge import SD15, SMALL, measured, write_delta
from perflow_diffusers.weights import open_weights
from perflow_diffusers.weights.make.extract import extract_lora

RESULT = Path(__file__).parent / "results" / "lora_extraction.md"


def svd_times(delta: Path, names: list[str], full: bool, full_matrices: bool = False) -> dict:
    """Seconds of torch.linalg.svd for all `names`; one of each shape is timed unless `full`."""
    source = open_weights(delta)
    groups = defaultdict(list)
    for name in names:
        shape = source.shapes[name]
        groups[shape[0], torch.Size(shape[1:]).numel()].append(name)
    total = {"clock": 0.0, "cpu": 0.0}
    for group in groups.values():
        timed = group if full else group[:1]
        for name in timed:
            matrix = source[name].float().flatten(1)
            clock, cpu = time.perf_counter(), time.process_time()
            torch.linalg.svd(matrix, full_matrices=full_matrices)
            total["clock"] += (time.perf_counter() - clock) * len(group) / len(timed)
            total["cpu"] += (time.process_time() - cpu) * len(group) / len(timed)
    return total


def optimal_errors(delta: Path, names: list[str], rank: int, dtype: torch.dtype) -> list[float]:
    """Eckart-Young: relative errors of the best approximations."""
    source, errors = open_weights(delta), []
    for name in names:
        matrix = source[name].flatten(1).to(dtype)
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        squares = torch.linalg.eigvalsh(wide @ wide.T).double().clamp(min=0)
        errors.append((squares[:-rank].sum() / squares.sum()).sqrt().item())
    return errors


def lora_bytes(shapes: list[tuple[int, ...]], rank: int) -> int:
    """Bytes of fp16 factors of one rank, less where a matrix is smaller."""
    sizes = [(shape[0], torch.Size(shape[1:]).numel()) for shape in shapes]
    return sum(2 * min(rank, rows, columns) * (rows + columns) for rows, columns in sizes)


def run(config: dict, folder: Path, rank: int, full: bool, default_call: bool) -> str:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).to(torch.float16)
    delta = write_delta(unet, folder / "delta")
    before: dict = {}
    after: dict = {}
    with measured(before):
        report = extract_lora(delta, folder / "lora", rank=rank)
    names = [layer.name for layer in report.layers]
    best = optimal_errors(delta, names, rank, torch.float64 if full else torch.float32)
    svds = {"torch.linalg.svd, full_matrices=False": svd_times(delta, names, full)}
    if default_call:
        svds["torch.linalg.svd as called by default"] = svd_times(delta, names, full, full_matrices=True)
    with measured(after):
        extract_lora(delta, folder / "lora", rank=rank, overwrite=True)
    row = {key: (before[key] + after[key]) / 2 for key in before}
    pairs = [
        (layer.relative_error / optimal, layer.name)
        for layer, optimal in zip(report.layers, best, strict=True)
        if layer.rank < min(layer.shape[0], torch.Size(layer.shape[1:]).numel())
    ]
    worst, where = max(pairs)
    what = "every matrix" if full else "one matrix of each shape, times their number"
    rows = [
        f"{sum(weight.numel() for weight in unet.parameters()) / 1e6:.0f} M random numbers, fp16, "
        f"{report.delta_nbytes / 2**20:.0f} MiB; {len(report.layers)} layers, rank {rank}; {torch.get_num_threads()} "
        f"thread(s); torch.linalg.svd timed on {what}.",
        "",
        "| | clock s | CPU s | clock / extract_lora | CPU / extract_lora | extra memory MiB |",
        "|---|---|---|---|---|---|",
        f"| `extract_lora` | {row['clock']:.1f} | {row['cpu']:.1f} | 1 | 1 | {row['extra'] / 2**20:.0f} |",
    ]
    for label, svd in svds.items():
        ratios = f"{svd['clock'] / row['clock']:.1f} | {svd['cpu'] / row['cpu']:.1f}"
        rows.append(f"| {label} | {svd['clock']:.1f} | {svd['cpu']:.1f} | {ratios} | |")
    above = sum(ratio > 1.005 for ratio, _ in pairs)
    rows += [
        "",
        f"Largest error over the optimal one (Eckart-Young) of a layer: {worst:.5f} ({where});",
        f"{above} of {len(pairs)} layers above 1.005.",
        f"Error of the whole: {report.relative_error:.4f} of the delta's norm.",
        "Extra memory holds the LoRA itself and a few fp32 tensors of the delta.",
        "",
        "| rank | LoRA, fp16 MiB | of the delta |",
        "|---|---|---|",
    ]
    for size in (8, 16, 32, 64, 128, 256):
        nbytes = lora_bytes([layer.shape for layer in report.layers], size)
        rows.append(f"| {size} | {nbytes / 2**20:.1f} | {100 * nbytes / report.delta_nbytes:.1f} % |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--full", action="store_true", help="every SVD, and optima in float64 (15 minutes)")
    parser.add_argument(
        "--default-call", action="store_true", help="also with full_matrices=True, torch's default (15 minutes, 4 GB)"
    )
    parser.add_argument("--write", action="store_true", help=f"write the table to {RESULT.name}")
    parser.add_argument("--folder", type=Path, help="where the delta (1.7 GB) goes")
    parser.add_argument("--small", action="store_true", help="a small UNet, to try the script")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    tempfile.tempdir = str(options.folder) if options.folder else None
    with tempfile.TemporaryDirectory() as folder:
        table = run(SMALL if options.small else SD15, Path(folder), options.rank, options.full, options.default_call)
    print(table)
    if options.write:
        RESULT.write_text(f"# Extracting a LoRA from a delta\n\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
