"""The flow-matching miniature: where its guidance is best, and how far stock samplers and PeRFlow get in few steps.

    python benchmarks/flow_quality.py --out benchmarks/results/flow_miniature.md
    python benchmarks/flow_quality.py --guidance-sweep
    python benchmarks/flow_quality.py --accelerated --transformer runs/miniature/flow-disco --style disco

Reference: its own 100-step picture (Euler, shift 2) from the same noise at MINIATURE_FLOW_GUIDANCE, held-out prompts
of the avatars. Pixel error: mean squared error, pixels in -1..1. Attributes: share of the attributes stated in the
captions that the classifier finds. Evaluations: network calls a picture; guidance takes two. Each stock sampler has,
of the shifts 1, 2, 3 and 5, the one with the least error at its number of evaluations. The 256 equal zeros in
the third text encoder's place are drawn as one token of 256-fold weight (`EqualTokens`, exact): a third of the time.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.nn.functional import pad
from tqdm import tqdm

from perflow_diffusers import load_perflow
from perflow_diffusers.miniature import MINIATURE_FLOW_GUIDANCE, load_miniature

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training" / "miniature"))
from attributes import load_classifier
from bases import SHIFT, Flow
from pictures import load_pictures

BATCH = 64
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
#: name -> (class, its other options, network calls a step without guidance, the option that shifts)
STOCK: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "Euler": ("FlowMatchEulerDiscreteScheduler", {}, 1, "shift"),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {}, 2, "shift"),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", FLOW, 1, "flow_shift"),
    "UniPC": ("UniPCMultistepScheduler", FLOW, 1, "flow_shift"),
}


class Bench:
    """Draws held-out prompts and judges the pictures."""

    def __init__(self, pictures: int, seed: int, style: str = "avatars", transformer: Path | None = None) -> None:
        self.pipe = load_miniature("flow")
        if transformer is not None:
            kind = type(self.pipe.transformer)
            self.pipe.transformer = kind.from_pretrained(
                transformer, subfolder="transformer", torch_dtype=torch.float32
            )
        self.pipe.set_progress_bar_config(disable=True)
        test = load_pictures(style, "test")
        self.attributes, self.stated = test.attributes[:pictures], test.stated[:pictures]
        base = Flow(self.pipe)
        self.cond, self.empty = self.encode(base, test.captions[:pictures]), self.encode(base, [""])
        self.noise = torch.randn(pictures, 4, 8, 8, generator=torch.Generator().manual_seed(1000 + seed))
        self.classifier = load_classifier()

    @torch.no_grad()
    def encode(self, base: Flow, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self.pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        tokens, pooled = base.encoded(ids)
        return pad(tokens, (0, 0, 0, 1)), pooled

    @torch.no_grad()
    def draw(self, scheduler: Any, steps: int, guidance: float) -> torch.Tensor:
        """Pictures (N, 3, 32, 32) in -1..1."""
        self.pipe.scheduler, parts = scheduler, []
        for rows in torch.arange(len(self.noise)).split(BATCH):
            drawn = self.pipe(
                prompt_embeds=self.cond[0][rows],
                pooled_prompt_embeds=self.cond[1][rows],
                negative_prompt_embeds=self.empty[0].expand(len(rows), -1, -1),
                negative_pooled_prompt_embeds=self.empty[1].expand(len(rows), -1),
                latents=self.noise[rows],
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="pt",
            ).images
            parts.append(drawn.float() * 2 - 1)
        return torch.cat(parts)

    def obeyed(self, pictures: torch.Tensor) -> float:
        """Share of the stated attributes in per cent."""
        return 100 * float(self.classifier.obeyed(pictures, self.attributes, self.stated).float().mean())


HEADER = ("| sampler | evaluations | shift | pixel error | attributes % |", "|---|---|---|---|---|")


def reference_scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def guidance_sweep(bench: Bench, steps: int) -> list[str]:
    rows = ["| guidance | attributes % |", "|---|---|"]
    for guidance in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.5, 9.0):
        rows.append(f"| {guidance:g} | {bench.obeyed(bench.draw(reference_scheduler(), steps, guidance)):.1f} |")
        print(rows[-1], flush=True)
    return rows


def few_steps(bench: Bench) -> list[str]:
    guidance = MINIATURE_FLOW_GUIDANCE
    reference = bench.draw(reference_scheduler(), 100, guidance)
    rows = [f"| Euler, 100 steps: the reference | 200 | {SHIFT:g} | | {bench.obeyed(reference):.1f} |"]
    for evaluations in tqdm((4, 8, 16)):
        for name, (kind, options, calls, shifting) in STOCK.items():
            steps = evaluations // (2 * calls)
            taken = 2 * (calls * steps - calls + 1)  # Heun's last step is Euler's
            found = []
            for shift in (1.0, 2.0, 3.0, 5.0):
                drawn = bench.draw(getattr(diffusers, kind)(**options, **{shifting: shift}), steps, guidance)
                found.append((float((drawn - reference).pow(2).mean()), shift, bench.obeyed(drawn)))
            error, shift, obeyed = min(found)
            rows.append(f"| {name}, {steps} steps | {taken} | {shift:g} | {error:.4f} | {obeyed:.1f} |")
    return rows


def accelerated(bench: Bench) -> list[str]:
    """The embedded accelerator: one network call a step, no guidance."""
    reference = bench.draw(reference_scheduler(), 100, MINIATURE_FLOW_GUIDANCE)
    rows = [f"| Euler, 100 steps: its own | 200 | {SHIFT:g} | | {bench.obeyed(reference):.1f} |"]
    artifact = load_perflow(bench.pipe, "miniature-flow")
    scheduler = bench.pipe.scheduler
    for steps in (2, 4, 8, 16):
        drawn = bench.draw(scheduler, steps, 1.0)
        error = float((drawn - reference).pow(2).mean())
        windows = f"{artifact.settings.num_time_windows} windows"
        rows.append(f"| PeRFlow, {steps} steps | {steps} | {windows} | {error:.4f} | {bench.obeyed(drawn):.1f} |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance-sweep", action="store_true")
    parser.add_argument("--sweep-steps", type=int, default=30)
    parser.add_argument("--accelerated", action="store_true", help="the accelerator's rows alone")
    parser.add_argument("--transformer", type=Path, help="folder of a fine-tuned pipeline, whose transformer is taken")
    parser.add_argument("--style", default="avatars", choices=("avatars", "disco"), help="of the held-out prompts")
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    args = parser.parse_args()
    bench = Bench(args.pictures, args.seed, args.style, args.transformer)
    if args.guidance_sweep:
        rows = guidance_sweep(bench, args.sweep_steps)
    else:
        rows = [*HEADER, *([] if args.accelerated else few_steps(bench)), *accelerated(bench)]
    title = f"# The flow-matching miniature: {args.pictures} held-out prompts of {args.style}, noise seed {args.seed}"
    text = "\n".join([title, "", *rows, ""])
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
