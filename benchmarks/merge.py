"""Time and extra memory of merging a delta into a UNet of SD 1.5's real size (860 M random weights, fp16, CPU).

    OMP_NUM_THREADS=1 python benchmarks/merge.py [--repeat 3] [--folder TMP] [--small]

Compares `merge_delta` (three backups) with a bare loop of memory-mapped read + in-place add, and with the way of the
method's authors: load the delta as a model, build a new state dict, load that. Prints the best time and the largest
memory of the repeats; seconds of CPU are of this process and say more than the clock on a busy machine. "extra" is
anonymous memory (RssAnon), which the process cannot do without; pages of the memory-mapped file are not in it.
"""

import argparse
import ctypes
import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging
from safetensors import safe_open

from perflow_diffusers.io.writer import write_safetensors
from perflow_diffusers.weights import compute_delta, merge_delta, open_weights

SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SMALL = {"sample_size": 8, "cross_attention_dim": 64, "block_out_channels": (32, 64, 64, 64)}


def anonymous_memory() -> int:
    """Bytes of memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("This benchmark reads /proc/self/status: run it on Linux.")


@contextmanager
def measured(result: dict) -> Iterator[None]:
    """Seconds by the clock and of CPU, and the peak of anonymous memory above the start."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what an earlier way freed must not be a gift to the next one
    start, done, peak = anonymous_memory(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    clock, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        result.update(clock=time.perf_counter() - clock, cpu=time.process_time() - cpu)
        peak[0] = max(peak[0], anonymous_memory())
        done.set()
        watcher.join()
        result["extra"] = max(0, peak[0] - start)


def random_unet(config: dict) -> UNet2DConditionModel:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet = unet.to(torch.float16).to_empty(device="cpu").requires_grad_(False).eval()
    for weight in unet.parameters():
        weight.normal_(std=0.02)
    return unet


def write_delta(unet: UNet2DConditionModel, folder: Path) -> Path:
    """A random delta of the same shapes, as the folder of a diffusers model."""
    folder.mkdir(exist_ok=True)
    unet.save_config(folder)
    specs = {name: (tuple(weight.shape), weight.dtype) for name, weight in unet.state_dict().items()}
    tensors = ((name, torch.empty(shape, dtype=dtype).normal_(std=1e-3)) for name, (shape, dtype) in specs.items())
    return write_safetensors(
        folder / "diffusion_pytorch_model.safetensors", specs, tensors, {"format": "pt"}, overwrite=True
    )


@torch.no_grad()
def bare_loop(unet: UNet2DConditionModel, file: Path) -> None:
    with safe_open(file, "pt") as delta:
        for name, weight in unet.named_parameters():
            weight.add_(delta.get_tensor(name))


def authors_way(unet: UNet2DConditionModel, file: Path) -> None:
    """As in the authors' application: a second model, a second state dict, and a copy of it into the first."""
    delta = UNet2DConditionModel.from_pretrained(file.parent, torch_dtype=torch.float16).state_dict()
    weights = unet.state_dict()
    for name in delta:
        weights[name] = 1.0 * weights[name].to(delta[name].dtype) + delta[name].to(weights[name].device)
    unet.load_state_dict(weights, strict=True)


def plain_copy(file: Path, out: Path) -> None:
    """Read and write as many bytes as a delta has: what the disk alone takes."""
    with file.open("rb") as source, out.open("wb") as target:
        while part := source.read(1 << 24):
            target.write(part)
        os.fsync(target.fileno())


def ways(unet: UNet2DConditionModel, file: Path) -> dict[str, Callable[[], object]]:
    return {
        "bare loop": lambda: bare_loop(unet, file),
        "merge_delta, backup='none'": lambda: merge_delta(unet, file, backup="none"),
        "merge_delta, backup='cpu'": lambda: merge_delta(unet, file),
        "merge_delta, backup='disk'": lambda: merge_delta(unet, file, backup="disk"),
        "merge_delta, scale 0.7, backup='none'": lambda: merge_delta(unet, file, 0.7, backup="none"),
        "the authors' way": lambda: authors_way(unet, file),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the delta (1.7 GB) and the disk backup go")
    parser.add_argument("--small", action="store_true", help="a small UNet, to try the script")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    tempfile.tempdir = str(options.folder) if options.folder else None
    with tempfile.TemporaryDirectory() as folder:
        run(SMALL if options.small else SD15, Path(folder), options.repeat)


def run(config: dict, folder: Path, repeat: int) -> None:
    unet = random_unet(config)
    file = write_delta(unet, folder / "delta")
    largest = max(weight.nbytes for weight in unet.parameters())
    count = sum(weight.numel() for weight in unet.parameters())
    print(f"{count / 1e6:.0f} M weights, fp16, delta {file.stat().st_size / 2**30:.2f} GiB, largest tensor", end=" ")
    print(f"{largest / 2**20:.0f} MiB, {torch.get_num_threads()} thread(s), best of {repeat}\n")
    table: dict[str, dict] = {}
    for name in ways(unet, file):
        for _ in range(repeat):
            unet.__dict__.pop("_perflow_merges", None)
            result: dict = {}
            act = ways(unet, file)[name]
            with measured(result):
                kept = act()
            del kept
            best = table.setdefault(name, result)
            table[name] = {key: (max if key == "extra" else min)(best[key], result[key]) for key in result}
    undo = table["undo (backup='cpu')"] = {}
    unet.__dict__.pop("_perflow_merges", None)
    handle = merge_delta(unet, file)
    with measured(undo):
        handle.undo()
    difference = table["compute_delta to a file"] = {}
    with measured(difference):
        compute_delta(unet, open_weights(file), folder / "difference.safetensors")
    copy = table["plain copy of such a file, synced"] = {}
    with measured(copy):
        plain_copy(file, folder / "copy.safetensors")
    report(table, largest)


def report(table: dict[str, dict], largest: int) -> None:
    bare, authors = table["bare loop"], table["the authors' way"]
    print(
        "| | clock s | CPU s | clock / bare | authors' / this | CPU / bare | authors' / this | extra MiB | / largest |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in table.items():
        ratios = " | ".join(f"{row[t] / bare[t]:.2f} | {authors[t] / row[t]:.1f}" for t in ("clock", "cpu"))
        memory = f"{row['extra'] / 2**20:.0f} | {row['extra'] / largest:.2f}"
        print(f"| {name} | {row['clock']:.2f} | {row['cpu']:.2f} | {ratios} | {memory} |")


if __name__ == "__main__":
    main()
