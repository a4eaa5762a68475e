"""Training samples a second against a plain re-implementation of the published loop, and where a step's time goes.

    OMP_NUM_THREADS=1 python benchmarks/training_speed.py --seconds 60

Both train the miniature on one process: same network, batch, optimiser and EMA. The published loop draws pictures,
noise and windows anew for each step and solves each with DDIM in 8 steps (arXiv 2405.07510; the authors' script). Ours
is the trainer of training/perflow_training as configured by default, from the same pictures or from trajectories.
Overhead: the share of the time spent neither in a network (teacher, student, VAE and text encoder, forwards and
backwards) nor in the optimiser. Seconds are those of the processor, so that other work on the machine does not count;
with one thread they are those of the wall on an idle one.
"""

import argparse
import copy
import logging
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from perflow_diffusers.flow import NoisePath
from perflow_diffusers.miniature import miniature_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from perflow_training.config import TrainingConfig
from perflow_training.loader import EncodingLoader
from perflow_training.log import StepLog
from perflow_training.rng import Draws
from perflow_training.teacher.backbone import Backbone, teacher_of
from perflow_training.teacher.load import load_pipeline
from perflow_training.trainer import Trainer

DATA = Path(__file__).resolve().parents[1] / "training" / "miniature" / "data" / "avatars-test.parquet"


def config(**options) -> TrainingConfig:
    return TrainingConfig(
        pretrained_model_name_or_path=str(miniature_folder() / "avatars"),
        train_captions=str(DATA),
        max_train_steps=10**9,
        lr_scheduler="constant",
        **options,
    )


class Stopwatch:
    """Seconds in the calls that it wraps, those of calls inside them counted once."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def wrap(self, call):
        def timed(*args, **kwargs):
            self.depth += 1
            began = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.seconds += time.process_time() - began

        return timed


def ours(options: TrainingConfig, seconds: float) -> dict[str, float]:
    """Samples a second, and the shares of solving and overhead, of our trainer."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator, draws = Accelerator(), Draws(0)
    pipe = load_pipeline(options)
    trainer = Trainer(
        options, teacher_of(pipe), EncodingLoader(pipe, options, draws, accelerator.device), accelerator, draws
    )
    trainer.prepare()
    log, watch = StepLog(accelerator, trainer.weights), Stopwatch()
    for _ in range(3):
        trainer._step(log)
    # A fresh start with a full buffer's credit spent, so that the measured steps pay for their own solves.
    trainer.buffer.credit, solving = 0, Stopwatch()
    trainer.buffer.solve = solving.wrap(trainer.solve)
    for network in (trainer.plain_teacher.network, accelerator.unwrap_model(trainer.network), pipe.text_encoder):
        network.forward = watch.wrap(network.forward)
    pipe.vae.encode = watch.wrap(pipe.vae.encode)
    accelerator.backward, trainer.optimizer.step = watch.wrap(accelerator.backward), watch.wrap(trainer.optimizer.step)
    steps, began = 0, time.process_time()
    cycle = options.solve_batch_size * options.reuse * (1 if options.data_starts else 4) // options.train_batch_size
    while steps % max(cycle, 1) or time.process_time() - began < seconds:
        trainer._step(log)
        steps += 1
    elapsed = time.process_time() - began
    trainer.loader.close()
    return {
        "samples": steps * options.train_batch_size / elapsed,
        "solve": solving.seconds / elapsed,
        "overhead": 1 - watch.seconds / elapsed,
    }


def published(options: TrainingConfig, seconds: float) -> dict[str, float]:
    """The same of the published loop, written plainly."""
    pipe = load_pipeline(options)
    loader = EncodingLoader(pipe, options, Draws(0), torch.device("cpu"))
    teacher, student = teacher_of(pipe), copy.deepcopy(pipe.unet).train()
    path: NoisePath = teacher.path
    ema = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate)
    watch, solving = Stopwatch(), 0.0

    def step() -> float:
        count = options.train_batch_size
        material = loader.draw(count, 0, True)
        cond, z0 = material.cond, material.latents
        t = 1000 - (torch.rand(count) * 1000).long()
        start = (t + 249) // 250 * 250
        end = start - 250
        began = time.process_time()
        z_start = z = path.add_noise(z0, torch.randn_like(z0), start)
        with torch.no_grad():
            for i in range(8):  # DDIM
                now, then = start - 250 * i // 8, start - 250 * (i + 1) // 8
                z = path.add_noise(*path.to_x0_eps(teacher(z, now, cond), z, now), then)
        seconds_solving = time.process_time() - began
        u = ((start - t) / 250.0).reshape(-1, 1, 1, 1)
        (a_s, b_s), (a_e, b_e) = path.at(start), path.at(end)
        lam = a_e / a_s
        eta = b_e - lam * b_s
        lam, eta = (x.float().reshape(-1, 1, 1, 1) for x in (lam, eta))
        wanted = (z - lam * z_start) / eta
        out = Backbone(student, path, "epsilon")(z_start + u * (z - z_start), t, cond)
        watch.wrap((out - wanted).pow(2).mean().backward)()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        watch.wrap(optimizer.step)()
        optimizer.zero_grad()
        with torch.no_grad():
            for mine, new in zip(ema.parameters(), student.parameters(), strict=True):
                mine.lerp_(new, 0.001)
        return seconds_solving

    for _ in range(2):
        step()
    for network in (teacher.network, student, pipe.text_encoder):
        network.forward = watch.wrap(network.forward)
    pipe.vae.encode = watch.wrap(pipe.vae.encode)
    watch.seconds, steps, began = 0.0, 0, time.process_time()
    while time.process_time() - began < seconds:
        solving += step()
        steps += 1
    elapsed = time.process_time() - began
    loader.close()
    return {
        "samples": steps * options.train_batch_size / elapsed,
        "solve": solving / elapsed,
        "overhead": 1 - watch.seconds / elapsed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for each of the lines")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    batch = {"train_batch_size": args.batch}
    runs = {
        "published loop: DDIM 8, no reuse": (published, config(data_starts=1.0, **batch)),
        "ours, no reuse, from pictures": (
            ours,
            config(data_starts=1.0, reuse=1, solve_batch_size=args.batch, **batch),
        ),
        "ours, reuse 4, from pictures": (ours, config(data_starts=1.0, **batch)),
        "ours, reuse 4, trajectories (default)": (ours, config(**batch)),
    }
    lines = ["| loop | samples a CPU second | / published | solving | overhead |", "|---|---|---|---|---|"]
    base = None
    for name, (loop, options) in runs.items():
        got = loop(options, args.seconds)
        base = base or got["samples"]
        cells = [
            f"{got['samples']:.1f}",
            f"{got['samples'] / base:.2f}",
            f"{got['solve']:.0%}",
            f"{got['overhead']:.1%}",
        ]
        lines.append(" | ".join([f"| {name}", *cells]) + " |")
        print(lines[-1], flush=True)
    text = f"Batch {args.batch}, {torch.get_num_threads()} threads, float32.\n\n" + "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
