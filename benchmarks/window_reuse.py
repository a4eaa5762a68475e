"""Whether training on each solved window several times pays, at equal wall time, on the miniature.

    OMP_NUM_THREADS=1 python benchmarks/window_reuse.py --seconds 240 --reuse 1 8

Each run starts anew and ends when its time is over. Error: mean squared difference of the EMA student's final latents,
at 4 steps, to those of 100 DDIM steps of the base from the same noise, over held-out prompts, with the guidance of
training.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from perflow_diffusers import MINIATURE_GUIDANCE, miniature_prompts
from perflow_diffusers.flow import Windows, euler, solve
from perflow_diffusers.miniature import miniature_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from perflow_training.config import TrainingConfig
from perflow_training.loader import EncodingLoader
from perflow_training.log import StepLog
from perflow_training.objective import window_weights
from perflow_training.rng import Draws
from perflow_training.teacher.backbone import Backbone, teacher_of
from perflow_training.teacher.encode import encode_empty, encode_prompts
from perflow_training.teacher.load import load_pipeline
from perflow_training.trainer import Trainer

DATA = Path(__file__).resolve().parents[1] / "training" / "miniature" / "data" / "avatars-train.parquet"


@torch.no_grad()
def sample(student: Backbone, windows: Windows, noise: torch.Tensor, cond) -> torch.Tensor:
    """Final latents of one step a window."""
    z = noise
    for start, end in zip(windows.boundaries[:-1], windows.boundaries[1:], strict=True):
        a, b = (float(c) for c in euler(student.path, "ddim_eps", start, end, start, end))
        z = a * z + b * student(z, torch.full((len(z),), start), cond)
    return z


def run(reuse: int, seconds: float, prompts: int, seed: int) -> tuple[float, float, int, int]:
    """(error before, error after, steps, solved windows) of `seconds` of training."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    options = TrainingConfig(
        pretrained_model_name_or_path=str(miniature_folder() / "avatars"), train_captions=str(DATA), seed=seed,
        solve_guidance=MINIATURE_GUIDANCE, reuse=reuse, buffer_size=4096, timestep_starts=0.5, timestep_grid=0.35,
        caption_dropout=0.05, window_weights=[5.0, 2.0, 1.0, 1.0], lr_warmup_steps=30,
        lr_scheduler="constant_with_warmup", ema_decay=0.98, max_train_steps=10**9,
    )  # fmt: skip
    accelerator, draws = Accelerator(), Draws(seed)
    pipe = load_pipeline(options)
    teacher = teacher_of(pipe)
    cond, uncond = encode_prompts(pipe, miniature_prompts(prompts, seed=5)), encode_empty(pipe)
    noise = torch.randn(prompts, 4, 8, 8, generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        wanted = solve(teacher.guided(uncond, cond, MINIATURE_GUIDANCE), teacher.path, noise, 1000, 0, 100)
    trainer = Trainer(options, teacher, EncodingLoader(pipe, options, draws, accelerator.device), accelerator, draws)
    trainer.weights = window_weights(options.window_weights, trainer.windows.num_windows, trainer._costs)

    def error() -> float:
        return float((sample(trainer.plain_student, trainer.windows, noise, cond) - wanted).pow(2).mean())

    before, log, began = error(), StepLog(accelerator, trainer.weights), time.perf_counter()
    while time.perf_counter() - began < seconds:
        trainer._step(log)
    trainer.ema.copy_to(trainer.parameters.values())
    trainer.network.eval()
    trainer.loader.close()
    return before, error(), trainer.step, trainer.buffer.solved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--reuse", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    lines = ["| reuse | steps | windows solved | error before | error after |", "|---|---|---|---|---|"]
    for reuse in args.reuse:
        before, after, steps, solved = run(reuse, args.seconds, args.prompts, args.seed)
        lines.append(f"| {reuse} | {steps} | {solved} | {before:.4f} | {after:.4f} |")
        print(lines[-1], flush=True)
    text = (
        f"{args.seconds:g} s each, {torch.get_num_threads()} threads, {args.prompts} prompts.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
