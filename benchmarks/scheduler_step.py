"""How long a call of `step` takes: PeRFlow's schedulers beside diffusers' few-step ones and the bare arithmetic.

Usage: python benchmarks/scheduler_step.py [--device cpu] [--dtype float32] [--rounds 200] [--steps 8]

Every round runs each scheduler once over its whole grid, one after the other, so that all of them meet the same noise
of the machine, after an untimed run that warms the caches; the figure is the median over the rounds of the mean time
of a step. Stochastic schedulers draw noise.
"""

import argparse
import platform
import time
import warnings

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from perflow_diffusers import FlowMatchPeRFlowScheduler, PeRFlowScheduler

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def build_schedulers():
    """Name -> scheduler, in the order of the table."""
    return {
        "PeRFlow": PeRFlowScheduler(**SCHEDULE, prediction_type="ddim_eps"),
        "PeRFlow, flow matching": FlowMatchPeRFlowScheduler(),
        "FlowMatchEuler": FlowMatchEulerDiscreteScheduler(),
        "DDIM": DDIMScheduler(**SCHEDULE, clip_sample=False),
        "Euler": EulerDiscreteScheduler(**SCHEDULE),
        "DPM-Solver++ 2M": DPMSolverMultistepScheduler(**SCHEDULE),
        "LCM": LCMScheduler(**SCHEDULE, clip_sample=False),
        "TCD": TCDScheduler(**SCHEDULE, clip_sample=False),
    }


def time_scheduler(scheduler, steps, sample, output, synchronize):
    """Seconds per step of one run with `steps` steps; setting the timesteps is not counted."""
    scheduler.set_timesteps(steps, device=sample.device)
    # As pipelines do: a fresh timestep tensor a step, and the tuple form.
    timesteps = list(scheduler.timesteps)
    synchronize()
    begin = time.perf_counter()
    for t in timesteps:
        scheduler.step(output, t, sample, return_dict=False)
    synchronize()
    return (time.perf_counter() - begin) / len(timesteps)


def time_bare(steps, sample, output, synchronize):
    """Seconds of the arithmetic alone, `torch.add(a * x, eps, alpha=b)`."""
    a, b = 1.01, -0.2
    synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        torch.add(a * sample, output, alpha=b)
    synchronize()
    return (time.perf_counter() - begin) / steps


@torch.no_grad()
def measure(size, arguments):
    """Name -> median microseconds a step for a 1 x 4 x size x size latent."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sample = torch.randn(1, 4, size, size, device=device, dtype=dtype)
    output = torch.randn_like(sample)
    schedulers = build_schedulers()
    times = {name: [] for name in ("bare", *schedulers)}
    for _ in range(arguments.rounds):
        for name in times:
            for _ in ("warm", "timed"):
                if name == "bare":
                    seconds = time_bare(arguments.steps, sample, output, synchronize)
                else:
                    seconds = time_scheduler(schedulers[name], arguments.steps, sample, output, synchronize)
            times[name].append(seconds)
    return {name: 1e6 * torch.tensor(t).median().item() for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16")
    parser.add_argument("--rounds", type=int, default=200, help="runs of each scheduler")
    parser.add_argument("--steps", type=int, default=8, help="steps a run")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    sizes = (64, 128)
    columns = [measure(size, arguments) for size in sizes]
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, {arguments.dtype}")
    print("| microseconds a step | " + " | ".join(f"1x4x{s}x{s} | / bare" for s in sizes) + " |")
    print("|---" * (1 + 2 * len(sizes)) + "|")
    for row in columns[0]:
        cells = [f"{c[row]:.1f} | {c[row] / c['bare']:.2f}" for c in columns]
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
