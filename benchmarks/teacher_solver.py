"""How exactly the teacher crosses its windows, against network evaluations, on the miniature.

    python benchmarks/teacher_solver.py --out benchmarks/results/solver.md

Reference: DDIM with 250 steps a window (1,000 in all). Each window is crossed alone, from the reference's own state at
its start: mean squared error at its end. Behind it the whole trajectory, where each end is the next start: mean and
median over the pictures of the squared error of the final latents. With guidance a few trajectories tip over into
another picture at the least error; they are most of the mean, and hardly of the median.
By that mean the default, made for solves without guidance, does not reach 8 steps of DDIM with guidance; `deis` in 4
steps does, and is what to take there.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

from perflow_diffusers import MINIATURE_GUIDANCE, load_miniature, miniature_prompts
from perflow_diffusers.flow import Windows, solve

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from perflow_training.config import TrainingConfig
from perflow_training.teacher.backbone import teacher_of
from perflow_training.teacher.encode import encode_empty, encode_prompts

WINDOWS = Windows.uniform(4, 1000)
#: (method, spacing, steps a window, evaluations a step)
LINES = [
    *(("ddim", "time", steps, 1) for steps in (4, 8, 12)),
    *(("dpmpp_2m", "time", steps, 1) for steps in (4, 6)),
    *(("dpmpp_2m", "log_snr", steps, 1) for steps in (3, 4, 6)),
    *(("deis", "log_snr", steps, 1) for steps in (3, 4, 6)),
    *(("heun", "time", steps, 2) for steps in (2, 4)),
]


@torch.no_grad()
def table(count: int, guidance: float) -> str:
    pipe = load_miniature()
    teacher = teacher_of(pipe)
    cond, uncond = encode_prompts(pipe, miniature_prompts(count, seed=3)), encode_empty(pipe)
    noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    predict = teacher.guided(uncond, cond, None if guidance == 1 else guidance)

    def cross(z: torch.Tensor, start: int, end: int, steps: int, method: str, spacing: str) -> torch.Tensor:
        return solve(predict, teacher.path, z, start, end, steps, method, teacher.prediction, spacing)

    states = [noise]
    for start, end in tqdm(list(pairwise(WINDOWS.boundaries)), desc=f"reference, guidance {guidance:g}"):
        states.append(cross(states[-1], start, end, 250, "ddim", "time"))
    spans = list(enumerate(pairwise(WINDOWS.boundaries)))
    default = TrainingConfig()
    chosen = (default.solver, default.solver_spacing, default.solver_steps)
    lines = [
        f"### guidance {guidance:g}: {count} prompts, 4 windows, against 1,000 steps of DDIM",
        "",
        "| solver | steps a window | evaluations | window 1 | 2 | 3 | 4 | trajectory: mean | median |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, spacing, steps, calls in tqdm(LINES, desc="solvers"):
        alone = [cross(states[k], *span, steps, method, spacing) - states[k + 1] for k, span in spans]
        z = noise
        for _, span in spans:
            z = cross(z, *span, steps, method, spacing)
        final = (z - states[-1]).pow(2).mean((1, 2, 3))
        cells = [f"{float(error.pow(2).mean()):.5f}" for error in alone]
        cells += [f"{float(final.mean()):.5f}", f"{float(final.median()):.5f}"]
        name = f"{method}, {spacing}" + (" (default)" if (method, spacing, steps) == chosen else "")
        lines.append(" | ".join([f"| {name}", str(steps), str(steps * calls), *cells]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, MINIATURE_GUIDANCE])
    parser.add_argument("--out", type=Path, help="write the tables to this file, too")
    args = parser.parse_args()
    text = "\n".join(table(args.prompts, guidance) for guidance in args.guidance)
    text = f"Reference:{__doc__.split('Reference:')[1].rstrip()}\n\n{text}"
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)


if __name__ == "__main__":
    main()
