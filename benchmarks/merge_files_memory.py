"""Memory of `compute_delta` and `merge_files` on a sharded transformer as wide as those of 12 billion parameters.

    OMP_NUM_THREADS=1 python benchmarks/merge_files_memory.py [--blocks 2] [--folder TMP]

A FluxTransformer2DModel of its real width (3072, random bfloat16 weights) with `--blocks` joint and as many single
blocks, saved in shards of 1 GB, and a fine-tuned copy. Prints a row for each of the two: seconds and the peak of
anonymous memory (RssAnon) above the start, also in units of the largest tensor. Anonymous memory is what the process
cannot do without; pages of memory-mapped files, which the system takes back when it needs them, are not in it.
"""

import argparse
import gc
import tempfile
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from merge import measured
from perflow_diffusers.weights import compute_delta, merge_files, open_weights


def random_transformer(blocks: int) -> FluxTransformer2DModel:
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=blocks, num_single_layers=blocks, guidance_embeds=True)
    model = model.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=0.02)
    return model


def write_models(folder: Path, blocks: int) -> tuple[int, int]:
    """Base and tuned in shards; bytes of the model and of its largest tensor."""
    model = random_transformer(blocks)
    model.save_pretrained(folder / "base" / "transformer", max_shard_size="1GB")
    for weight in model.parameters():
        weight += 0.01 * torch.randn_like(weight)
    model.save_pretrained(folder / "tuned" / "transformer", max_shard_size="1GB")
    sizes = [weight.nbytes for weight in model.parameters()]
    return sum(sizes), max(sizes)


def exactly_merged(base: Path, delta: Path, merged: Path) -> bool:
    """Whether every weight is the sum in float64, rounded once."""
    have, change, got = map(open_weights, (base, delta, merged))
    return all(
        torch.equal(got[name], (have[name].double() + change[name].double()).to(have[name].dtype)) for name in have
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2, help="joint and single blocks each (the real one: 19 and 38)")
    parser.add_argument("--folder", type=Path, help="where to write, four times the model")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        folder = Path(place)
        total, largest = write_models(folder, given.blocks)
        shards = len(list((folder / "base" / "transformer").glob("*.safetensors")))
        gc.collect()
        print(f"{total / 1e9:.2f} GB in {shards} shards, largest tensor {largest / 1e6:.0f} MB\n")
        print("| from file to file | seconds | CPU s | peak memory | in largest tensors |\n|---|---|---|---|---|")
        base, tuned, delta = folder / "base", folder / "tuned", folder / "delta.safetensors"
        jobs = {
            "compute_delta": lambda: compute_delta(base, tuned, delta),
            "merge_files": lambda: merge_files(base, delta, folder / "merged"),
        }
        for name, job in jobs.items():
            result: dict[str, float] = {}
            with measured(result):
                job()
            extra = result["extra"]
            print(
                f"| `{name}` | {result['clock']:.1f} | {result['cpu']:.1f} | {extra / 1e6:.0f} MB "
                f"| {extra / largest:.2f} |",
                flush=True,
            )
        exact = exactly_merged(base, delta, folder / "merged")
        print(f"\nmerged weights equal to the sum in float64, rounded once: {'all' if exact else 'NOT all'}")


if __name__ == "__main__":
    main()
