"""How exactly the teacher crosses its windows, against network evaluations, on the miniature.

    python benchmarks/teacher_solver.py --out benchmarks/results/solver.md

Trajectories from noise through all windows, with guidance; error: mean squared difference of the final latents to the
base's own 100-step DDIM run from the same noise, which is what the student is measured against (its own distance to
250 steps is printed, too).
"""

import argparse
import sys
from pathlib import Path

import torch

from perflow_diffusers import MINIATURE_GUIDANCE, load_miniature, miniature_prompts
from perflow_diffusers.flow import Windows, solve

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from perflow_training.backbone import encode_prompts, teacher_of
from perflow_training.config import TrainingConfig
from perflow_training.objective import solve_trajectories


@torch.no_grad()
def table(count: int, guidance: float) -> str:
    pipe = load_miniature()
    teacher = teacher_of(pipe)
    cond, uncond = encode_prompts(pipe, miniature_prompts(count, seed=3)), encode_prompts(pipe, [""])
    noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    predict = teacher.guided(uncond, cond, guidance)
    reference, fine = (solve(predict, teacher.path, noise, 1000, 0, steps) for steps in (100, 250))
    lines = [
        f"{count} prompts, guidance {guidance:g}, 4 windows. DDIM with 100 steps to DDIM with 250: "
        f"{float((reference - fine).pow(2).mean()):.5f}.",
        "",
        "| solver | steps a window | evaluations a window (x 2 with guidance) | squared error of the final latent |",
        "|---|---|---|---|",
    ]
    for solver, calls in (("ddim", 1), ("dpmpp_2m", 1), ("heun", 2)):
        for steps in (2, 4, 6, 8, 12) if calls == 1 else (2, 4, 6):
            config = TrainingConfig(guidance_scale=guidance, solver=solver, solver_steps=steps)
            solved = solve_trajectories(teacher, Windows.uniform(4, 1000), config, noise, cond, uncond)
            error = float((solved.z_end[-count:] - reference).pow(2).mean())
            lines.append(f"| {solver} | {steps} | {steps * calls} | {error:.5f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=MINIATURE_GUIDANCE)
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    args = parser.parse_args()
    text = table(args.prompts, args.guidance)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)


if __name__ == "__main__":
    main()
