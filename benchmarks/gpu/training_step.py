"""Samples a second, memory and the time of each phase of training at real sizes, with random weights.

    python benchmarks/gpu/training_step.py --model sd15 sdxl --out benchmarks/gpu/results
    python benchmarks/gpu/training_step.py --model sd15 --compile --lora-rank 64 --batch 32
    python benchmarks/gpu/training_step.py --tiny                  # the same code in seconds on a CPU

Phases: solve (the teacher crosses all windows of a batch of trajectories), student (forward and backward), optimiser,
EMA. "Caching" is the window buffer: with reuse r each solved window serves r training points, so that a training
point costs one r-th of the solve of a window. FLOPs are counted by torch.utils.flop_counter (a multiplication and an
addition are two) for one solve, one forward and one backward; the utilisation is against `--peak-tflops`.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.utils.flop_counter import FlopCounterMode

from perflow_diffusers.flow import NoisePath, Windows

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "training"))
from perflow_training.buffer import SolvedWindows
from perflow_training.config import TrainingConfig
from perflow_training.objective import Loss, Solver, solve_trajectories, student_loss
from perflow_training.student import build_student, make_optimizer
from perflow_training.teacher.backbone import Backbone
from perflow_training.teacher.conditions import Conditions
from perflow_training.teacher.encode import encoded_rows

#: the networks' published configurations, and the latents' side
MODELS = {
    "sd15": (
        64,
        {
            "cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280),
        },
    ),
    "sdxl": (
        128,
        {
            "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
}  # fmt: skip
TINY = {"block_out_channels": (8, 16), "cross_attention_dim": 16, "attention_head_dim": 4, "norm_num_groups": 4,
        "layers_per_block": 1, "transformer_layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Measured:
    """Seconds by phase of one optimiser step without reuse, and what follows from them."""

    model: str
    device: str
    batch: int
    lora_rank: int
    compile: bool
    checkpointing: bool
    dtype: str
    parameters: int
    seconds: dict[str, float]
    tflop: dict[str, float]
    samples_per_second: dict[str, float]  # by reuse
    utilisation: float | None
    peak_memory_gib: float | None


def network_of(model: str, tiny: bool) -> tuple[UNet2DConditionModel, int]:
    """A network of the model's configuration with random weights, and the latents' side."""
    side, options = MODELS[model]
    options = {"sample_size": side, **options}
    if tiny:
        side = 16
        options = {**options, **TINY, "sample_size": side}
    return UNet2DConditionModel(**options), side


def conditions_of(network: UNet2DConditionModel, count: int, device: torch.device, dtype: torch.dtype) -> Conditions:
    embeds = torch.randn(count, 77, network.config.cross_attention_dim, device=device, dtype=dtype)
    if network.config.get("addition_embed_type") != "text_time":
        return encoded_rows(embeds)
    width = network.config.projection_class_embeddings_input_dim - 6 * network.config.addition_time_embed_dim
    pooled = torch.randn(count, width, device=device, dtype=dtype)
    return encoded_rows(embeds, pooled, torch.full((count, 6), 1024.0, device=device))


def timed(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of one call, the median of `repeats` after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[1:])[repeats // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops(work: Callable[[], object]) -> float:
    """10^12 floating-point operations of one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def measure(model: str, args: argparse.Namespace) -> Measured:
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    config = TrainingConfig(
        lora_rank=args.lora_rank, gradient_checkpointing=args.checkpointing, solver_steps=args.solver_steps
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    network, side = network_of(model, args.tiny)
    network = network.to(device).requires_grad_(False)
    path = NoisePath.from_betas()
    if args.lora_rank:
        network.to(dtype)
    student = build_student(network, config)
    teacher = Backbone(network.to(dtype).eval(), path, "epsilon", -1, dtype)
    optimizer = make_optimizer(student, config)
    parameters = [p for p in student.parameters() if p.requires_grad]
    ema = EMAModel(parameters, decay=0.999, foreach=True)
    windows = Windows.uniform(4, 1000)
    cond = conditions_of(network, args.batch, device, dtype)
    noise = torch.randn(args.batch, 4, side, side, device=device)
    called = torch.compile(student) if args.compile else student
    if args.compile:
        teacher = Backbone(torch.compile(teacher.network), path, "epsilon", -1, dtype)
    learner = Backbone(called, path, "epsilon")
    solved: list[SolvedWindows] = []

    def solve_all() -> None:
        solved[:] = [solve_trajectories(teacher, windows, Solver.of(config), noise, cond, cond[:1])]

    def learn() -> None:
        batch = solved[0][torch.arange(args.batch)]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = student_loss(learner, path, batch, batch.start, Loss.of(config), torch.ones(args.batch)).mean()
        loss.backward()

    tflop = {"solve": flops(solve_all) if not args.compile else float("nan")}
    seconds = {"solve": timed(solve_all, args.repeats, device)}
    tflop["student"] = flops(learn) if not args.compile else float("nan")
    seconds["student"] = timed(learn, args.repeats, device)
    seconds["optimiser"] = timed(optimizer.step, args.repeats, device)
    seconds["ema"] = timed(lambda: ema.step(parameters), args.repeats, device)
    rest = seconds["student"] + seconds["optimiser"] + seconds["ema"]
    # a solve gives `num_windows` windows a trajectory, each of which serves `reuse` points
    rates = {str(reuse): args.batch / (seconds["solve"] / (windows.num_windows * reuse) + rest) for reuse in (1, 4, 8)}
    work, spent = sum(tflop.values()), seconds["solve"] + seconds["student"]
    known = args.peak_tflops and work == work
    return Measured(
        model=model, device=_name(device), batch=args.batch, lora_rank=args.lora_rank, compile=args.compile,
        checkpointing=args.checkpointing, dtype=args.dtype, parameters=sum(p.numel() for p in network.parameters()),
        seconds=seconds, tflop=tflop, samples_per_second=rates,
        utilisation=work / spent / args.peak_tflops if known else None,
        peak_memory_gib=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    )  # fmt: skip


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def row(got: Measured) -> str:
    phases = [f"{1000 * got.seconds[name]:.1f}" for name in ("solve", "student", "optimiser", "ema")]
    rates = [f"{got.samples_per_second[reuse]:.2f}" for reuse in ("1", "4", "8")]
    memory = "" if got.peak_memory_gib is None else f"{got.peak_memory_gib:.1f}"
    work = f"{got.tflop['solve']:.3g} + {got.tflop['student']:.3g}"
    used = "" if got.utilisation is None else f"{got.utilisation:.0%}"
    what = f"{got.model}, {'LoRA ' + str(got.lora_rank) if got.lora_rank else 'all weights'}, {got.dtype}"
    cells = [what, str(got.batch), "yes" if got.compile else "no", *phases, *rates, memory, work, used]
    return "| " + " | ".join(cells) + " |"


HEADER = [
    "| model | batch | compiled | solve ms | student ms | optimiser ms | EMA ms | samples/s, reuse 1 | 4 | 8 | GiB "
    "| TFLOP solve + student | of peak |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
]


def main(words: list[str] | None = None) -> list[Measured]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lora-rank", type=int, default=0, help="0: all weights")
    parser.add_argument("--solver-steps", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="torch.compile teacher and student")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, help="of the device in this dtype, e.g. 989 for H100 bfloat16")
    parser.add_argument("--tiny", action="store_true", help="networks of a few thousand weights")
    parser.add_argument("--out", type=Path, help="folder for training_step.md and .json")
    args = parser.parse_args(words)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    lines, results = list(HEADER), []
    for model in args.model:
        results.append(measure(model, args))
        lines.append(row(results[-1]))
        print(lines[-1], flush=True)
    text = f"{results[0].device}, torch {torch.__version__}.\n\n" + "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "training_step.md").write_text(text)
        (args.out / "training_step.json").write_text(json.dumps([asdict(got) for got in results], indent=1))
    return results


if __name__ == "__main__":
    main()
