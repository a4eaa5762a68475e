"""Memory of a training run on the CPU, and of the product that is written at its end.

    OMP_NUM_THREADS=1 python benchmarks/training_memory.py --out benchmarks/results/training_memory.md

A UNet with random weights in the place of the miniature's is trained for two steps, each run in a process of its own:
all weights in float32, and a LoRA in bf16 and in float32. Peak: of the resident memory (VmRSS, looked at every few
milliseconds), less that of the process when torch, diffusers and the package are imported; before and after the
message that the training is done.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "all weights, float32": [],
    "LoRA of rank 16, bf16": ["lora_rank=16", "mixed_precision=bf16"],
    "LoRA of rank 16, float32": ["lora_rank=16"],
}
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def resident() -> int:
    """Bytes of memory that this process has, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def child(words: list[str]) -> None:
    """One run; prints the peaks as JSON."""
    sys.path.insert(0, str(ROOT / "training"))
    import train_perflow
    from perflow_training.config import load_config

    at_start, peaks, phase = resident(), {"training": 0, "product": 0}, ["training"]

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "The training is done" in record.getMessage():
                phase[0] = "product"

    def look() -> None:
        while phase[0] != "done":
            peaks[phase[0]] = max(peaks[phase[0]], resident() - at_start)
            time.sleep(0.002)

    logging.basicConfig(level=logging.INFO, handlers=[Watch()])
    looking = threading.Thread(target=look)
    looking.start()
    try:
        train_perflow.run(load_config(None, words))
    finally:
        phase[0] = "done"
        looking.join()
    print(json.dumps(peaks))


def teacher(folder: Path, width: int) -> float:
    """The miniature with a wider UNet of random weights; returns its weights in millions."""
    import torch
    from diffusers import UNet2DConditionModel

    from perflow_diffusers.miniature import miniature_folder

    shutil.copytree(miniature_folder() / "avatars", folder)
    config = dict(UNet2DConditionModel.load_config(folder / "unet"))
    config["block_out_channels"] = [width * (i + 1) for i in range(len(config["block_out_channels"]))]
    shutil.rmtree(folder / "unet")
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config)
    unet.save_pretrained(folder / "unet")
    return sum(value.numel() for value in unet.parameters()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="channels of the first block (default 256)")
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return child(args.run)
    lines = [
        "| run | peak in training (MB) | peak in the product | product / training |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "teacher"
        size = teacher(folder, args.width)
        for number, (name, options) in enumerate(RUNS.items()):
            words = [
                f"pretrained_model_name_or_path={folder}", f"output_dir={place}/run-{number}", "max_train_steps=2",
                f"train_captions={ROOT / 'training' / 'miniature' / 'data' / 'thumbs-test.parquet'}",
                "solve_batch_size=2", "solver_steps=1", "train_batch_size=2", "dataloader_num_workers=0", *options,
            ]  # fmt: skip
            command = [sys.executable, __file__, "--run", *words]
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode:
                sys.exit(ended.stderr[-3000:])
            got = json.loads(ended.stdout.splitlines()[-1])
            cells = [f"{got[key] / 1e6:.0f}" for key in ("training", "product")]
            lines.append(" | ".join([f"| {name}", *cells, f"{got['product'] / got['training']:.2f}"]) + " |")
            print(lines[-1], flush=True)
            shutil.rmtree(f"{place}/run-{number}")
    text = f"A UNet of {size:.0f} M weights ({size * 4:.0f} MB in float32).\n\n" + "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
