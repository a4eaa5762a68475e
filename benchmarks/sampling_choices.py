"""Two choices of the scheduler, measured on the miniature: which windows to merge, and how to noise an image.

    python benchmarks/sampling_choices.py --out benchmarks/results/sampling_choices.md

Fewer steps than windows: every way to leave out inner boundaries, judged against the checkpoint's own 100-step
picture from the same noise. Image to image: an encoded held-out picture is noised at a timestep of the 8-step run, on
the chord of its window and on the diffusion marginal of the timestep; both runs are judged against the base's own
image to image from the same picture, noise and timestep (DDIM over every 10th timestep). Pixel error: mean squared
error, pixels in -1..1.
"""

import argparse
import statistics
from itertools import combinations
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from tqdm import tqdm

from miniature_quality import BATCH, Bench, spread
from perflow_diffusers import MINIATURE_GUIDANCE, merge_delta
from perflow_diffusers.hub import perflow_scheduler


def merged_windows(bench: Bench, checkpoint: str) -> str:
    """Table of every choice of inner boundaries."""
    base = bench.config
    bench.measure("reference", 100, MINIATURE_GUIDANCE, reference=True)
    rows = []
    with merge_delta(bench.pipe, "miniature") as merged:
        scheduler = perflow_scheduler(base, merged.metadata)
        boundaries = scheduler.windows.boundaries
        plain = scheduler.set_timesteps
        bench.pipe.scheduler = scheduler
        for n in range(1, scheduler.windows.num_windows + 1):
            defaults = scheduler.windows.grid(n)[:-1]
            for inner in combinations(boundaries[1:-1], n - 1):
                timesteps = [boundaries[0], *inner]
                scheduler.set_timesteps = lambda *_, device=None, chosen=timesteps, **__: plain(
                    timesteps=chosen, device=device
                )
                line = bench.measure("", n, 1.0)
                mark = " (default)" if timesteps == defaults else ""
                cells = [spread(line.pixel, 4), spread(line.feature, 3), spread(line.attributes, 1)]
                rows.append(f"| {n} | {', '.join(map(str, timesteps))}{mark} | {' | '.join(cells)} |")
    head = "| steps | timesteps | pixel error | feature error | attributes % |\n|---|---|---|---|---|"
    return f"### {checkpoint}: fewer steps than windows\n\n{head}\n" + "\n".join(rows) + "\n"


@torch.no_grad()
def image_to_image(bench: Bench, checkpoint: str) -> str:
    """Table of both ways to noise an image, by the timestep at which the run starts."""
    pipe, errors = bench.pipe, {}
    latents = torch.cat(
        [pipe.vae.encode(part).latent_dist.mode() for part in (bench.test.images.float() / 127.5 - 1).split(BATCH)]
    )
    latents = latents * pipe.vae.config.scaling_factor
    with merge_delta(pipe, "miniature") as merged:
        perflow = perflow_scheduler(bench.config, merged.metadata)
    perflow.set_timesteps(8)
    starts = perflow.timesteps.tolist()
    for seed in bench.seeds:
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2000 + seed))
        for place, start in enumerate(tqdm(starts, desc=f"{checkpoint}, image to image, seed {seed}")):
            ddim = DDIMScheduler.from_config(bench.config)
            ddim.set_timesteps(100)
            index = torch.full((len(latents),), start)
            marginal = perflow.path.add_noise(latents, noise, index)
            below = ddim.timesteps[ddim.timesteps < start]
            reference = _run(bench, ddim, marginal, below, MINIATURE_GUIDANCE)
            with merge_delta(pipe, "miniature"):
                for name, state in (("chord", perflow.add_noise(latents, noise, index)), ("marginal", marginal)):
                    perflow.set_timesteps(8)
                    drawn = _run(bench, perflow, state, perflow.timesteps[place:], 1.0)
                    errors.setdefault((start, name), []).append(float((drawn - reference).pow(2).mean()))
    rows = []
    for start in starts:
        chord, marginal = errors[start, "chord"], errors[start, "marginal"]
        ratio = statistics.mean(chord) / statistics.mean(marginal)
        rows.append(f"| {start} | {spread(chord, 4)} | {spread(marginal, 4)} | {ratio:.3f} |")
    head = "| start | noised on the chord | on the marginal | ratio |\n|---|---|---|---|"
    return f"### {checkpoint}: image to image, 8 steps\n\n{head}\n" + "\n".join(rows) + "\n"


def _run(bench: Bench, scheduler, state, timesteps, guidance: float) -> torch.Tensor:
    """Pictures in -1..1 from a state (N, 4, 8, 8), the network called as the pipeline calls it."""
    parts = []
    for z, cond in zip(state.split(BATCH), bench.embeddings.split(BATCH), strict=True):
        scheduler.set_timesteps(scheduler.num_inference_steps)
        for t in timesteps:
            out = bench.pipe.unet(z, t, encoder_hidden_states=cond).sample
            if guidance > 1:
                without = bench.pipe.unet(z, t, encoder_hidden_states=bench.empty.expand_as(cond)).sample
                out = without + guidance * (out - without)
            z = scheduler.step(out, t, z, return_dict=False)[0]
        parts.append(bench.pipe.vae.decode(z / bench.pipe.vae.config.scaling_factor).sample.clamp(-1, 1))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--checkpoints", nargs="+", default=["avatars", "disco"])
    parser.add_argument("--out", type=Path, help="write the tables to this file, too")
    args = parser.parse_args()
    tables = []
    for checkpoint in args.checkpoints:
        bench = Bench(checkpoint, args.pictures, args.seeds)
        tables += [merged_windows(bench, checkpoint), image_to_image(bench, checkpoint)]
        print("\n".join(tables[-2:]), flush=True)
    if args.out:
        what = (
            f"{args.pictures} held-out prompts, {args.seeds} noise seeds; `python benchmarks/sampling_choices.py`\n\n"
        )
        args.out.write_text(what + "\n".join(tables))


if __name__ == "__main__":
    main()
