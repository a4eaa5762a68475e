"""Watching, solving and training on flow-matching bases at real sizes, with random weights.

    python benchmarks/gpu/flow_step.py --out benchmarks/gpu/results
    python benchmarks/gpu/flow_step.py --model flux wan
    python benchmarks/gpu/flow_step.py --tiny --device cpu           # the same code in seconds on a CPU

Pipelines without encoders, prompts as embeddings of the real widths. `watch` learns how each calls its network and
proves it by a replay in the precision of training; then come one trajectory by the pipeline itself (four windows of
`--solver-steps` steps, with guidance) and one step of a LoRA (forward, backward, AdamW) with gradient checkpointing.
"""

import argparse
import gc
import json
import sys
import time
import warnings
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import FlowMatchEulerDiscreteScheduler

from perflow_diffusers.flow import SigmaWindows

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "training"))
from perflow_training.config import TrainingConfig
from perflow_training.objective import Loss, student_loss, windows_between
from perflow_training.recipe import block_layers
from perflow_training.student import make_learner
from perflow_training.teacher.observed import watch

SD35_MEDIUM = {
    "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "qk_norm": "rms_norm",
    "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "in_channels": 16,
    "out_channels": 16, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
}  # fmt: skip
#: pipeline, transformer and its config (what differs from the class's own), rows of embeddings, call, shift
MODELS = {
    "sd3.5-medium": (
        "StableDiffusion3Pipeline", "SD3Transformer2DModel", SD35_MEDIUM,
        {"prompt_embeds": (154, 4096), "pooled_prompt_embeds": (2048,)},
        {"height": 1024, "width": 1024, "guidance_scale": 5.0}, {"shift": 3.0},
    ),
    "flux-dev": (
        "FluxPipeline", "FluxTransformer2DModel", {"guidance_embeds": True},
        {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
        {"height": 512, "width": 512, "guidance_scale": 3.5}, {"use_dynamic_shifting": True},
    ),
    "z-image": (
        "ZImagePipeline", "ZImageTransformer2DModel", {}, {"prompt_embeds": [(128, 2560)]},
        {"height": 1024, "width": 1024, "guidance_scale": 4.0}, {"shift": 3.0},
    ),
    "qwen-image": (
        "QwenImagePipeline", "QwenImageTransformer2DModel", {},
        {"prompt_embeds": (128, 3584), "prompt_embeds_mask": ()},
        {"height": 512, "width": 512, "true_cfg_scale": 4.0}, {"use_dynamic_shifting": True},
    ),
    "wan-1.3b": (
        "WanPipeline", "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        {"prompt_embeds": (512, 4096)},
        {"height": 480, "width": 832, "num_frames": 33, "guidance_scale": 5.0}, {"shift": 3.0},
    ),
}  # fmt: skip
TINY = {
    "sd3.5-medium": {
        "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16,
        "dual_attention_layers": (0,),
    },
    "flux-dev": {
        "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
    "z-image": {
        "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [4, 6, 6],
    },
    "qwen-image": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)},
    "wan-1.3b": {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1},
}  # fmt: skip
GUIDANCE = ("guidance_scale", "true_cfg_scale")


def embeddings(shapes: dict, count: int, device: torch.device, dtype: torch.dtype, seed: int) -> dict:
    """Arguments of `count` prompts: a tensor each, a list where the shape stands in one, a mask where it is empty."""
    random = torch.Generator(device).manual_seed(seed)

    def draw(shape: tuple) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=torch.float32).to(dtype)

    given = {}
    for name, shape in shapes.items():
        if isinstance(shape, list):
            given[name] = [draw(shape[0]) for _ in range(count)]
        elif shape:
            given[name] = draw((count, *shape))
        else:
            given[name] = torch.ones(count, shapes["prompt_embeds"][0], dtype=torch.int64, device=device)
    return given


def prompts(shapes: dict, negative: bool, device: torch.device, dtype: torch.dtype):
    def given(captions):
        count = len(captions)
        own = embeddings(shapes, count, device, dtype, len(captions[0]))
        if not negative:
            return own
        return own | {f"negative_{name}": value for name, value in embeddings(shapes, count, device, dtype, 0).items()}

    return given


def measure(name: str, args: argparse.Namespace) -> dict:
    pipeline, kind, config, shapes, call, scheduler = MODELS[name]
    device, dtype = torch.device(args.device), torch.float32 if args.device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        network = getattr(diffusers, kind)(**{**config, **(TINY[name] if args.tiny else {})}).eval()
    torch.set_default_dtype(torch.float32)
    network.requires_grad_(False)
    parts = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    cls = getattr(diffusers, pipeline)
    wanted = {part: None for part in parts if part in cls.__init__.__annotations__}
    pipe = cls(scheduler=FlowMatchEulerDiscreteScheduler(**scheduler), transformer=network, **wanted)
    own = {key: value for key, value in call.items() if key not in GUIDANCE}
    scale = next(value for key, value in call.items() if key in GUIDANCE)
    if args.tiny:
        own |= {"height": 64, "width": 64} | ({"num_frames": 5} if "num_frames" in own else {})

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak() -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0

    began = wait()
    given = prompts(shapes, name != "flux-dev", device, dtype)
    observed = watch(pipe, own, given, scale)
    watched = wait() - began
    windows = SigmaWindows.uniform(4, observed.shift)
    noise = torch.randn(1, *observed.shape, device=device)
    solves = []
    for _ in range(2):
        began = wait()
        states = observed.follow(["a"], noise, windows, args.solver_steps, scale)
        solves.append(wait() - began)
    cond = observed.conditions(["a"], scale)
    solved, inference = windows_between(states, windows, cond), peak()
    options = TrainingConfig(
        lora_rank=64, lora_target_modules=block_layers(network), gradient_checkpointing=True,
        prediction_type="velocity", mixed_precision="no" if dtype == torch.float32 else "bf16",
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=options.mixed_precision, cpu=device.type == "cpu")
    learner, optimizer, _ = make_learner(network, options, accelerator)
    teacher = observed.backbone()
    student, steps = teacher.student(learner), []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for row in range(3):
        batch = solved[torch.tensor([row])]
        began = wait()
        loss = student_loss(student, teacher.path, batch, batch.start, Loss("velocity"), torch.ones(1)).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(wait() - began)
    return {
        "model": name, "parameters": sum(p.numel() for p in network.parameters()), "call": repr(observed.call),
        "latents": list(observed.shape), "residual": observed.residual, "watch_s": watched, "solve_s": min(solves),
        "inference_gib": inference, "step_s": min(steps), "training_gib": peak(), "loss": float(loss),
        "trained": sum(p.numel() for p in learner.parameters() if p.requires_grad),
    }  # fmt: skip


def row(got: dict) -> str:
    size = f"{got['parameters'] / 1e9:.2f} G"
    cells = [
        got["model"], size, " x ".join(map(str, got["latents"])), f"{got['residual']:.1g}", f"{got['watch_s']:.1f}",
        f"{got['solve_s']:.2f}", f"{got['inference_gib']:.1f}", f"{got['step_s']:.2f}", f"{got['training_gib']:.1f}",
        f"{got['trained'] / 1e6:.0f} M",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| model | parameters | latents | replay off by | watch s | trajectory s | GiB | LoRA step s | GiB | trained |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def main(words: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--solver-steps", type=int, default=8, help="Euler steps a window")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="networks of a few thousand weights")
    parser.add_argument("--out", type=Path, help="folder for flow_step.md and .json")
    args = parser.parse_args(words)
    warnings.simplefilter("ignore")
    results, lines = [], [HEADER]
    for name in args.model:
        try:
            results.append(measure(name, args))
        except (RuntimeError, ValueError) as error:  # what does not fit this device leaves the others their turn
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        lines.append(row(results[-1]))
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "flow_step.md").write_text(text)
        (args.out / "flow_step.json").write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
