"""How near few steps come to many on the miniature: held-out prompts, several noise seeds, mean and spread.

    python benchmarks/miniature_quality.py --out benchmarks/results/miniature.md
    python benchmarks/miniature_quality.py --pictures 64 --seeds 1          # a quick look
    python benchmarks/miniature_quality.py --guidance-sweep                 # where the base looks best

Reference: the same checkpoint's own 100-step picture from the same noise at MINIATURE_GUIDANCE. Pixel error: mean
squared error, pixels in -1..1. Feature error: mean squared distance of the attribute classifier's 128 features over
their variance. Frechet: distance of these features' Gaussians to the reference set's. Attributes: share of the
attributes stated in the captions that the classifier finds in the picture. Evaluations: network calls a picture.
"""

import argparse
import copy
import itertools
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from perflow_diffusers import MINIATURE_GUIDANCE, load_miniature, merge_delta
from perflow_diffusers.hub import perflow_scheduler
from perflow_diffusers.schedulers.stock import STOCK, stock_scheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training" / "miniature"))
from attributes import AttributeClassifier, load_classifier
from pictures import Pictures, load_pictures, to_unit

BATCH = 128


@dataclass
class Line:
    """One sampler's figures, one number a seed."""

    name: str
    evaluations: int
    pixel: list[float] = field(default_factory=list)
    feature: list[float] = field(default_factory=list)
    frechet: list[float] = field(default_factory=list)
    attributes: list[float] = field(default_factory=list)

    def row(self, judged: bool) -> str:
        cells = [spread(self.pixel, 4), spread(self.feature, 3), spread(self.frechet, 2)]
        cells += [spread(self.attributes, 1)] if judged else []
        return " | ".join([f"| {self.name}", str(self.evaluations), *cells]) + " |"


def spread(values: list[float], digits: int) -> str:
    if not values or values[0] != values[0]:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


class Features(torch.nn.Module):
    """The classifier's features as torchmetrics' FID takes a custom network."""

    num_features = 128

    def __init__(self, classifier: AttributeClassifier) -> None:
        super().__init__()
        self.classifier = copy.deepcopy(classifier)  # the metric makes it double

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.classifier.features(pictures)


def frechet(classifier: AttributeClassifier, real: torch.Tensor, drawn: torch.Tensor) -> float:
    distance = FrechetInceptionDistance(feature=Features(classifier), normalize=False, input_img_size=(3, 32, 32))
    distance.set_dtype(torch.float64)
    distance.inception = distance.inception.double()
    for part in real.double().split(BATCH):
        distance.update(part, real=True)
    for part in drawn.double().split(BATCH):
        distance.update(part, real=False)
    return float(distance.compute())


def load(checkpoint: str) -> tuple[StableDiffusionPipeline, str]:
    """An embedded checkpoint, or a pipeline folder named after the style of its pictures; with the style's name."""
    if not Path(checkpoint).is_dir():
        return load_miniature(checkpoint), checkpoint
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipe.scheduler = load_miniature().scheduler
    return pipe, Path(checkpoint).name


class Bench:
    """Draws the held-out prompts with one checkpoint and measures against its reference pictures."""

    def __init__(self, checkpoint: str, pictures: int, seeds: int):
        self.pipe, checkpoint = load(checkpoint)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.unet.to(memory_format=torch.channels_last)
        self.config = self.pipe.scheduler.config
        test = load_pictures(checkpoint, "test")
        self.judged = "hat" in test.attributes[0]
        # captions that state nothing say nothing about obedience, but they are prompts like any other
        self.test = Pictures(*(part[:pictures] for part in (test.images, test.attributes, test.captions, test.stated)))
        self.seeds = range(seeds)
        self.classifier = load_classifier()
        self.variance = self.classifier.features(to_unit(load_pictures("avatars", "test").images)).var(0).detach()
        self.embeddings = self.encode(self.test.captions)
        self.empty = self.encode([""])
        self.references: list[torch.Tensor] = []

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> torch.Tensor:
        return self.pipe.encode_prompt(prompts, "cpu", 1, False)[0]

    @torch.no_grad()
    def draw(self, seed: int, steps: int, guidance: float) -> torch.Tensor:
        """Pictures (N, 3, 32, 32) in -1..1."""
        count = len(self.embeddings)
        noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1000 + seed))
        parts = []
        for cond, latents in zip(self.embeddings.split(BATCH), noise.split(BATCH), strict=True):
            pictures = self.pipe(
                prompt_embeds=cond,
                negative_prompt_embeds=self.empty.expand_as(cond),
                latents=latents,
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="pt",
            ).images
            parts.append(pictures * 2 - 1)
        return torch.cat(parts)

    @torch.no_grad()
    def measure(self, name: str, steps: int, guidance: float, reference: bool = False) -> Line:
        line = Line(name, steps * (2 if guidance > 1 else 1))
        for seed in self.seeds:
            drawn = self.draw(seed, steps, guidance)
            if reference:
                self.references.append(drawn)
                other = to_unit(self.test.images)  # against the real pictures there is only the set to compare
                line.pixel.append(float("nan"))
                line.feature.append(float("nan"))
            else:
                other = self.references[seed]
                line.pixel.append(float((drawn - other).pow(2).mean()))
                gap = self.classifier.features(drawn) - self.classifier.features(other)
                line.feature.append(float((gap.pow(2) / (self.variance + 1e-6)).mean()))
            line.frechet.append(frechet(self.classifier, other, drawn))
            if self.judged:
                obeyed = self.classifier.obeyed(drawn, self.test.attributes, self.test.stated)
                line.attributes.append(100 * float(obeyed.float().mean()))
        return line

    def stock(self, steps: int, guidance: float) -> list[Line]:
        lines = []
        for name in STOCK:
            self.pipe.scheduler = stock_scheduler(name, self.config)
            lines.append(self.measure(f"{name}, {steps} steps", steps, guidance))
        return lines

    def perflow(self, delta: str | Path, label: str, steps: list[int], guidance: float) -> list[Line]:
        with merge_delta(self.pipe, delta) as merged:
            self.pipe.scheduler = perflow_scheduler(self.config, merged.metadata)
            return [self.measure(f"{label}, {n} steps", n, guidance) for n in steps]


def header(judged: bool) -> str:
    names = ["sampler", "evaluations", "pixel error", "feature error", "Frechet"] + ["attributes %"] * judged
    return "| " + " | ".join(names) + " |\n|" + "---|" * len(names)


def best(lines: list[Line], evaluations: int) -> float:
    return min(statistics.mean(line.pixel) for line in lines if line.evaluations == evaluations)


def run(checkpoint: str, args: argparse.Namespace) -> str:
    bench = Bench(checkpoint, args.pictures, args.seeds)
    guidance = MINIATURE_GUIDANCE
    jobs = tqdm(total=4 + bool(args.cfg_sync), desc=checkpoint)
    lines = [bench.measure("base, 100 steps (DDIM; Frechet to real pictures)", 100, guidance, reference=True)]
    jobs.update()
    stock = []
    for steps in (2, 4, 8):
        stock += bench.stock(steps, guidance)
        jobs.update()
    ours = bench.perflow(args.delta, "PeRFlow, guided solve", [4, 5, 8], 1.0)
    lines += stock + ours
    if args.cfg_sync:
        lines += bench.perflow(args.cfg_sync, f"PeRFlow, CFG-sync at guidance {guidance:g}", [4, 8], guidance)
        lines += bench.perflow(args.cfg_sync, "PeRFlow, CFG-sync at guidance 3", [4, 8], 3.0)
        jobs.update()
    jobs.close()
    text = [
        f"### {checkpoint}: {len(bench.test)} held-out prompts, {args.seeds} noise seeds, guidance {guidance:g}",
        "",
    ]
    text += [header(bench.judged), *(line.row(bench.judged) for line in lines), ""]
    for n, line in zip((4, 8), (ours[0], ours[2]), strict=True):
        mine = statistics.mean(line.pixel)
        ratios = [f"{mine / best(stock, e):.3f} x the best stock sampler's at {e} evaluations" for e in (4, 8, 16)]
        text.append(f"PeRFlow at {n} steps: pixel error {', '.join(ratios)}.")
    return "\n".join(text) + "\n"


def guidance_sweep(args: argparse.Namespace) -> None:
    bench = Bench("avatars", args.pictures, args.seeds)
    print("| guidance | attributes % | Frechet to real pictures |\n|---|---|---|")
    for guidance in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.5, 9.0):
        line = bench.measure("", args.sweep_steps, guidance, reference=True)
        print(f"| {guidance:g} | {spread(line.attributes, 1)} | {spread(line.frechet, 2)} |", flush=True)


def stock_sweep(args: argparse.Namespace) -> None:
    """Every timestep spacing and last sigma of every stock sampler, at 2, 4 and 8 steps."""
    bench = Bench("avatars", args.pictures, args.seeds)
    bench.measure("reference", 100, MINIATURE_GUIDANCE, reference=True)
    import diffusers

    for name, (kind, chosen) in STOCK.items():
        sigmas = ("zero", "sigma_min") if "final_sigmas_type" in chosen else (None,)
        for spacing, sigma in itertools.product(("leading", "trailing", "linspace"), sigmas):
            options = {"timestep_spacing": spacing} | ({"final_sigmas_type": sigma} if sigma else {})
            cells = []
            for steps in (2, 4, 8):
                bench.pipe.scheduler = getattr(diffusers, kind).from_config(bench.config, **options)
                cells.append(spread(bench.measure("", steps, MINIATURE_GUIDANCE).pixel, 4))
            print(
                f"| {name} | {spacing} | {sigma} | {' | '.join(cells)} |{' chosen' * (options == chosen)}", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--delta", default="miniature", help="the accelerator (a name or a file)")
    parser.add_argument("--cfg-sync", type=Path, help="a second accelerator, trained without guidance")
    parser.add_argument(
        "--checkpoints", nargs="+", default=["avatars", "disco"], help="embedded ones, or pipeline folders"
    )
    parser.add_argument("--guidance-sweep", action="store_true")
    parser.add_argument("--stock-sweep", action="store_true")
    parser.add_argument("--sweep-steps", type=int, default=50)
    parser.add_argument("--out", type=Path, help="write the tables to this file, too")
    args = parser.parse_args()
    if args.guidance_sweep or args.stock_sweep:
        guidance_sweep(args) if args.guidance_sweep else stock_sweep(args)
        return
    tables = "\n".join(run(checkpoint, args) for checkpoint in args.checkpoints)
    print(tables)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(tables)


if __name__ == "__main__":
    main()
