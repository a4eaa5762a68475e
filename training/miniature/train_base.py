"""Trains a base of the miniature from scratch, or fine-tunes its network on another style.

python train_base.py --vae runs/miniature/vae --out runs/miniature/base                     # from nothing
python train_base.py --process flow --vae runs/miniature/vae --out runs/miniature/flow      # flow matching
python train_base.py --init runs/miniature/base --style disco --out runs/miniature/disco  # a second checkpoint
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from bases import BASES
from pictures import load_pictures, to_unit

CAPTION_DRAWS = 8  # captions of one picture, with other attributes left out


@dataclass(frozen=True)
class Samples:
    """Latent means and spreads (N, 4, 8, 8) and token ids of several captions a picture (CAPTION_DRAWS, N, 32)."""

    mean: torch.Tensor
    std: torch.Tensor
    token_ids: torch.Tensor
    empty_ids: torch.Tensor

    def draw(self, batch: int, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.randint(len(self.mean), (batch,))
        latents = self.mean[index] + self.std[index] * torch.randn(batch, *self.mean.shape[1:])
        ids = self.token_ids[torch.randint(len(self.token_ids), (batch,)), index]
        return latents, torch.where(torch.rand(batch, 1) < dropout, self.empty_ids, ids)


@torch.no_grad()
def encode_samples(pipe: Any, style: str) -> Samples:
    pictures = load_pictures(style, "train")
    mean, std = [], []
    for part in tqdm(to_unit(pictures.images).split(128), desc=f"encoding {style}", mininterval=5):
        posterior = pipe.vae.encode(part).latent_dist
        mean.append(posterior.mean * pipe.vae.config.scaling_factor)
        std.append(posterior.std * pipe.vae.config.scaling_factor)

    def tokens(texts: list[str]) -> torch.Tensor:
        return pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    ids = torch.stack([tokens(pictures.redraw_captions(seed)) for seed in range(CAPTION_DRAWS)])
    return Samples(torch.cat(mean), torch.cat(std), ids, tokens([""]))


def train(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    kind = BASES[args.process]
    without = dict.fromkeys(kind.left_out)
    pipe: Any = kind.pipeline.from_pretrained(args.init, **without) if args.init else kind.new(args.vae)
    base, network = kind(pipe), getattr(pipe, kind.network)
    samples = encode_samples(pipe, args.style)
    modules = torch.nn.ModuleDict({kind.network: network})
    for name in kind.texts:
        if args.init:
            getattr(pipe, name).requires_grad_(False)
        else:
            modules[name] = getattr(pipe, name)
    modules.train()
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, (k + 1) / args.warmup) * (0.5 + 0.5 * math.cos(math.pi * k / args.steps))
    )
    modules, optimizer, schedule = accelerator.prepare(modules, optimizer, schedule)
    ema = EMAModel(modules.parameters(), decay=args.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    accelerator.register_for_checkpointing(ema, schedule)
    called = torch.compile(network) if args.compile else network

    first, state = 0, args.out / "state"
    if args.resume and (state / "step.txt").is_file():
        accelerator.load_state(str(state))
        first = int((state / "step.txt").read_text())
    progress = tqdm(
        range(first, args.steps), desc=f"{args.style} {kind.network}", initial=first, total=args.steps, mininterval=5
    )
    running = None
    for step in progress:
        latents, ids = samples.draw(args.batch, args.caption_dropout)
        with accelerator.autocast():
            loss = base.loss(called, latents, ids)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(modules.parameters())
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % args.checkpointing_steps == 0 and step + 1 < args.steps:
            accelerator.save_state(str(state))
            (state / "step.txt").write_text(str(step + 1))
            ema.store(modules.parameters())
            ema.copy_to(modules.parameters())
            pipe.save_pretrained(args.out / "partial")
            ema.restore(modules.parameters())
    ema.copy_to(modules.parameters())
    base.finish()
    for module in (*modules.values(), pipe.vae):
        module.eval().requires_grad_(True)
    pipe.save_pretrained(args.out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline (EMA weights)")
    parser.add_argument("--vae", type=Path, default=Path("runs/miniature/vae"), help="a trained autoencoder")
    parser.add_argument("--init", type=Path, help="fine-tune this pipeline's network instead of starting from nothing")
    parser.add_argument("--process", choices=tuple(BASES), default="diffusion", help="how data turns into noise")
    parser.add_argument("--style", choices=("avatars", "disco", "thumbs"), default="avatars")
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--ema-decay", type=float, default=0.9995)
    parser.add_argument("--caption-dropout", type=float, default=0.1)
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--checkpointing-steps", type=int, default=2000)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT/state")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
