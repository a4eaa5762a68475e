"""Merging and sampling on a GPU at the real size of SD 1.5 (random weights, fp16), and the miniature's pictures there.

    python benchmarks/gpu/merge_and_sample.py --out benchmarks/gpu/results
    python benchmarks/gpu/merge_and_sample.py --tiny --device cpu        # the same code in seconds

Three tables. Merging: `merge_delta` beside a bare loop of read and in-place add, with the GPU memory that each takes
above the network's own; the merged weights are compared bit for bit with a merge on the CPU, and after `undo` with the
weights before. Sampling: milliseconds a picture of the whole pipeline (from embeddings to pixels), and a check that
`PeRFlowScheduler` never waits for the device. Pictures: how far the miniature's pictures on the GPU are from those
that the CPU draws in float32.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from safetensors import safe_open

from perflow_diffusers import PeRFlowScheduler, load_perflow, set_delta_scale
from perflow_diffusers.io.writer import write_safetensors
from perflow_diffusers.miniature import load_miniature
from perflow_diffusers.weights import merge_delta

SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SMALL = {"sample_size": 8, "cross_attention_dim": 64, "block_out_channels": (32, 64, 64, 64)}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
PROMPTS = ["a happy person with red hair and glasses", "a sad person with a purple hat", "a person with a beard"]


class Clock:
    """Seconds and peak memory of a call, with the device waited for on both sides."""

    def __init__(self, device: torch.device):
        self.device = device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def once(self, work: Callable[[], object]) -> tuple[float, int]:
        """Seconds, and bytes of the device above what was held at the start."""
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        held, began = self.memory(), time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began, self.memory() - held

    def best(self, work: Callable[[], object], repeats: int) -> tuple[float, int]:
        seconds, extra = zip(*(self.once(work) for _ in range(repeats)), strict=True)
        return min(seconds), max(extra)


def random_unet(config: dict, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet = unet.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for weight in unet.parameters():
        weight.normal_(std=0.02)
    return unet


def write_delta(unet: UNet2DConditionModel, file: Path) -> Path:
    specs = {name: (tuple(weight.shape), torch.float16) for name, weight in unet.state_dict().items()}
    tensors = ((name, torch.empty(shape, dtype=dtype).normal_(std=1e-3)) for name, (shape, dtype) in specs.items())
    return write_safetensors(file, specs, tensors, {"format": "pt"}, overwrite=True)


@torch.no_grad()
def bare_loop(unet: UNet2DConditionModel, file: Path, device: torch.device) -> None:
    with safe_open(file, "pt", device=str(device)) as delta:
        for name, weight in unet.named_parameters():
            weight.add_(delta.get_tensor(name))


def weights_of(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().to("cpu", copy=True) for name, weight in unet.named_parameters()}


def same(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> str:
    differ = sum(not torch.equal(ours[name], others[name]) for name in others)
    return "bit for bit" if not differ else f"{differ} of {len(others)} tensors differ"


def merging(unet: UNet2DConditionModel, folder: Path, device: torch.device, repeats: int) -> list[str]:
    clock = Clock(device)
    file = write_delta(unet, folder / "delta.safetensors")
    before = weights_of(unet)
    on_cpu = UNet2DConditionModel.from_config(unet.config).to(torch.float16)
    on_cpu.load_state_dict(before)
    merge_delta(on_cpu, file, 0.7)
    rows = {"bare loop, read to the device and add": clock.best(lambda: bare_loop(unet, file, device), repeats)}
    unet.load_state_dict(before)

    def merged(**options: str) -> tuple[float, int]:
        results = []
        for _ in range(repeats):
            results.append(clock.once(lambda: merge_delta(unet, file, **options)))
            unet.load_state_dict(before)
            unet.__dict__.pop("_perflow_merges", None)
        return min(r[0] for r in results), max(r[1] for r in results)

    rows["merge_delta, backup='none'"] = merged(backup="none")
    rows["merge_delta"] = merged()
    handle = merge_delta(unet, file, 0.7)
    agrees = same(weights_of(unet), weights_of(on_cpu))
    rows["set_delta_scale"] = clock.once(lambda: set_delta_scale(unet, 1.2))
    rows["undo"] = clock.once(handle.undo)
    undone = same(weights_of(unet), before)
    bare = rows["bare loop, read to the device and add"][0]
    lines = ["| | seconds | / bare | extra MiB on the device |", "|---|---|---|---|"]
    lines += [f"| {what} | {s:.3f} | {s / bare:.2f} | {extra / 2**20:.0f} |" for what, (s, extra) in rows.items()]
    return [*lines, "", f"Merged at 0.7 beside a merge on the CPU: {agrees}. After `undo`: {undone}."]


def sampling(unet: UNet2DConditionModel, device: torch.device, repeats: int, tiny: bool) -> list[str]:
    clock, dtype = Clock(device), torch.float16 if device.type == "cuda" else torch.float32
    widths = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4} if tiny else {}
    vae = AutoencoderKL(**{**VAE, **widths}).to(device, dtype)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet.to(dtype), scheduler=DDIMScheduler(**BETAS),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 77, unet.config.cross_attention_dim, device=device, dtype=dtype)
    stock = {
        "DDIM, 50 steps": (DDIMScheduler(**BETAS), 50, 7.5),
        "DPM-Solver++, 20 steps": (DPMSolverMultistepScheduler(**BETAS), 20, 7.5),
        "PeRFlow, 4 steps": (PeRFlowScheduler(prediction_type="ddim_eps", **BETAS), 4, 1.0),
    }
    times, evaluations = {}, {}
    for name, (scheduler, steps, guidance) in stock.items():
        pipe.scheduler = scheduler
        call = lambda s=steps, g=guidance: pipe(  # noqa: E731
            prompt_embeds=embeds, negative_prompt_embeds=torch.zeros_like(embeds), num_inference_steps=s,
            guidance_scale=g, output_type="pt", generator=torch.Generator("cpu").manual_seed(0),
        )  # fmt: skip
        call()
        times[name] = clock.best(call, repeats)[0]
        evaluations[name] = steps * (2 if guidance > 1 else 1)
    ours = times["PeRFlow, 4 steps"]
    lines = ["| | evaluations | ms a picture | / PeRFlow |", "|---|---|---|---|"]
    lines += [f"| {name} | {evaluations[name]} | {1000 * s:.1f} | {s / ours:.1f} |" for name, s in times.items()]
    return [*lines, "", f"Steps of `PeRFlowScheduler` that waited for the device: {waits(device)} of 8."]


def waits(device: torch.device) -> int:
    """How many of eight steps make the host wait, as torch's own guard sees it."""
    scheduler = PeRFlowScheduler(prediction_type="ddim_eps", **BETAS)
    scheduler.set_timesteps(8, device=device)
    sample = torch.randn(1, 4, 64, 64, device=device)
    output = torch.randn_like(sample)
    caught = 0
    for timestep in scheduler.timesteps:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            sample = scheduler.step(output, timestep, scheduler.scale_model_input(sample, timestep)).prev_sample
        except RuntimeError:
            caught += 1
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return caught


def pictures(device: torch.device) -> list[str]:
    """From the same latents: torch need not draw the same noise in half precision as in float32."""
    noise = torch.cat(
        [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(len(PROMPTS))]
    )

    def drawn(where: torch.device, dtype: torch.dtype) -> torch.Tensor:
        pipe = load_miniature()
        pipe.set_progress_bar_config(disable=True)
        load_perflow(pipe, "miniature")
        pipe.to(where, dtype)
        latents = noise.to(where, dtype)
        images = pipe(PROMPTS, num_inference_steps=4, guidance_scale=1.0, output_type="pt", latents=latents).images
        return images.float().cpu()

    reference = drawn(torch.device("cpu"), torch.float32)
    lines = ["| the miniature on the device | mean difference | largest (pixels in 0..1) |", "|---|---|---|"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        difference = (drawn(device, dtype) - reference).abs()
        name = str(dtype).removeprefix("torch.")
        lines.append(f"| {name} | {difference.mean():.2g} | {difference.max():.2g} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the script")
    parser.add_argument("--out", type=Path, help="folder for merge_and_sample.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.manual_seed(0)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    unet = random_unet(SMALL if args.tiny else SD15, device, torch.float16)
    parts = [f"{name}, torch {torch.__version__}."]
    with tempfile.TemporaryDirectory() as folder:
        parts.append("\n".join(merging(unet, Path(folder), device, args.repeats)))
    parts.append("\n".join(sampling(unet, device, args.repeats, args.tiny)))
    parts.append("\n".join(pictures(device)))
    text = "\n\n".join(parts) + "\n"
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "merge_and_sample.md").write_text(text)


if __name__ == "__main__":
    main()
