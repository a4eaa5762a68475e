"""How many weights of a small fp16 UNet are no longer what they were after many merges and undos.

    OMP_NUM_THREADS=1 python benchmarks/merge_cycles.py [--cycles 1000]

Compares `merge_delta` + `undo` of a delta and of a LoRA with `fuse_lora` + `unfuse_lora` of diffusers for the same
LoRA. The strength varies from cycle to cycle, as when trying some. Prints the share of changed weights after 1, 10,
100, ... cycles.
"""

import argparse
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging
from peft import LoraConfig

from perflow_diffusers.weights import merge_delta

SMALL = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}
SCALES = (1.0, 0.7, 0.3, 1.5)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out", "ff.net.2"]


def small_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**SMALL).half().eval().requires_grad_(False)


def copy_of(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """All weights but those of adapters."""
    return {name: weight.clone() for name, weight in unet.state_dict().items() if ".lora_" not in name}


def share_changed(unet: UNet2DConditionModel, before: dict[str, torch.Tensor]) -> float:
    now = copy_of(unet)
    return sum((now[name] != before[name]).sum().item() for name in now) / sum(w.numel() for w in now.values())


def with_adapter() -> UNet2DConditionModel:
    """The UNet with a random LoRA of rank 8 attached."""
    unet = small_unet()
    torch.manual_seed(1)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False), "style")
    for name, weight in unet.state_dict().items():
        if ".lora_" in name:
            weight.mul_(0.3)
    return unet


def ways() -> dict[str, tuple[UNet2DConditionModel, Callable[[int], None]]]:
    plain, packed, fused = small_unet(), small_unet(), with_adapter()
    delta = {name: torch.randn_like(weight) * 0.01 for name, weight in plain.state_dict().items()}
    lora = {name: weight for name, weight in fused.state_dict().items() if ".lora_" in name}

    def fuse(cycle: int) -> None:
        fused.set_adapters("style", SCALES[cycle % len(SCALES)])
        fused.fuse_lora()
        fused.unfuse_lora()

    return {
        "merge_delta + undo, a delta": (plain, lambda n: merge_delta(plain, delta, SCALES[n % len(SCALES)]).undo()),
        "merge_delta + undo, a LoRA": (packed, lambda n: merge_delta(packed, lora, SCALES[n % len(SCALES)]).undo()),
        "diffusers fuse_lora + unfuse_lora": (fused, fuse),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000)
    cycles = parser.parse_args().cycles
    logging.set_verbosity_error()
    looks = sorted({10**power for power in range(7) if 10**power < cycles} | {cycles})
    count = sum(weight.numel() for weight in small_unet().parameters())
    print(f"{count:,} weights, fp16; changed weights in % after so many cycles\n")
    print(f"| | {' | '.join(map(str, looks))} | ms a cycle |")
    print(f"|---|{'---|' * (len(looks) + 1)}")
    for name, (unet, act) in ways().items():
        before, shares, start = copy_of(unet), [], time.process_time()
        for cycle in range(1, cycles + 1):
            act(cycle)
            if cycle in looks:
                shares.append(f"{100 * share_changed(unet, before):.3g}")
        seconds = time.process_time() - start
        print(f"| {name} | {' | '.join(shares)} | {1000 * seconds / cycles:.0f} |", flush=True)


if __name__ == "__main__":
    main()
