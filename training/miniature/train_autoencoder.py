"""Trains the miniature's AutoencoderKL (3 x 32 x 32 pictures, 4 x 8 x 8 latents) on both styles."""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from pictures import load_pictures, to_unit

CONFIG = {
    "sample_size": 32,
    "latent_channels": 4,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
KL_WEIGHT = 3e-4  # per latent element: leaves a little noise in the latents, which the decoder learns to absorb


def train(
    out: Path, steps: int, batch: int, learning_rate: float, seed: int, compile_model: bool, init: Path | None
) -> None:
    torch.manual_seed(seed)
    images = torch.cat([load_pictures(style, "train").images for style in ("avatars", "thumbs")])
    vae: Any = AutoencoderKL.from_pretrained(init) if init else AutoencoderKL(**CONFIG)
    vae.train().to(memory_format=torch.channels_last)
    ema = EMAModel(vae.parameters(), decay=0.998, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, (k + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * k / steps))
    )

    def loss_of(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = vae.encode(pixels).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        error = (rebuilt - pixels).abs().mean() + (rebuilt - pixels).pow(2).mean()
        return error, posterior.kl().mean() / posterior.mean[0].numel()

    compiled = torch.compile(loss_of) if compile_model else loss_of
    progress = tqdm(range(steps), desc="autoencoder", mininterval=5)
    start = time.time()
    for _ in progress:
        pixels = to_unit(images[torch.randint(len(images), (batch,))]).contiguous(memory_format=torch.channels_last)
        error, kl = compiled(pixels)
        (error + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(vae.parameters())
        progress.set_postfix(error=f"{error.item():.4f}", kl=f"{kl.item():.2f}")
    ema.copy_to(vae.parameters())
    vae.eval()
    report(vae, time.time() - start)
    vae.to(memory_format=torch.contiguous_format).save_pretrained(out)


@torch.no_grad()
def report(vae: Any, seconds: float) -> None:
    """Sets the scaling factor (latents of unit variance) and prints the held-out reconstruction error."""
    pixels = to_unit(load_pictures("avatars", "test").images)
    mean = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(128)])
    vae.register_to_config(scaling_factor=round(float(1 / mean.std()), 5))
    for style in ("avatars", "thumbs"):
        pixels = to_unit(load_pictures(style, "test").images)
        rebuilt = torch.cat(
            [vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in pixels.split(128)]
        )
        mse = float((rebuilt - pixels).pow(2).mean())
        psnr, off = 10 * math.log10(4 / mse), 127.5 * float((rebuilt - pixels).abs().mean())
        print(f"{style}: PSNR {psnr:.1f} dB, mean absolute error {off:.2f}/255")
    print(f"latent spread {mean.std():.3f}, per channel {mean.std((0, 2, 3)).tolist()}, {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/miniature/vae"))
    parser.add_argument("--init", type=Path, help="go on from this autoencoder, with a fresh schedule")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", dest="compile_model", action="store_true")
    args = parser.parse_args()
    train(args.out, args.steps, args.batch, args.learning_rate, args.seed, args.compile_model, args.init)


if __name__ == "__main__":
    main()
