"""A network with its noise path: called with path indices 1..N, whatever the network itself was told in training."""

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline

from perflow_diffusers.flow import NoisePath


@dataclass(frozen=True)
class Backbone:
    """`network(z, timestep, cond)` predicts `prediction` on `path`.

    A DDPM-trained network was told `i - 1` at path index `i` (`index_offset=-1`); PeRFlow students are told `i`.
    """

    network: torch.nn.Module
    path: NoisePath
    prediction: str
    index_offset: int = 0

    def __call__(self, z: torch.Tensor, timestep: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """`z` (B, C, H, W), `timestep` (B,) path indices 1..N, `cond` (B, L, D) -> (B, C, H, W)."""
        return self.network(z, timestep + self.index_offset, encoder_hidden_states=cond, return_dict=False)[0]

    def guided(self, uncond: torch.Tensor, cond: torch.Tensor, guidance_scale: float | None):
        """`predict(z, timestep)` for a solver, with classifier-free guidance unless `guidance_scale` is None."""
        if guidance_scale is None:
            return lambda z, timestep: self(z, timestep, cond)
        both = torch.cat([uncond.expand_as(cond), cond])

        def predict(z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            out = self(torch.cat([z, z]), torch.cat([timestep, timestep]), both)
            without, with_prompt = out.chunk(2)
            return without + guidance_scale * (with_prompt - without)

        return predict


def teacher_of(pipe: StableDiffusionPipeline) -> Backbone:
    """The pipeline's own network and noise schedule, as the teacher."""
    path = NoisePath.from_alphas_cumprod(
        pipe.scheduler.alphas_cumprod, set_alpha_to_one=bool(pipe.scheduler.config.get("set_alpha_to_one", False))
    )
    return Backbone(pipe.unet, path, pipe.scheduler.config.prediction_type, index_offset=-1)


def student_of(teacher: Backbone, network: torch.nn.Module) -> Backbone:
    """The student: told the path index itself, as the published students are."""
    return Backbone(network, teacher.path, teacher.prediction, index_offset=0)


@torch.no_grad()
def encode_prompts(pipe: StableDiffusionPipeline, prompts: list[str], batch_size: int = 256) -> torch.Tensor:
    """(N, L, D) embeddings through the pipeline's own `encode_prompt`."""
    parts = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    return torch.cat([pipe.encode_prompt(part, pipe.device, 1, False)[0] for part in parts])


@torch.no_grad()
def encode_images(pipe: StableDiffusionPipeline, images: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
    """Scaled latents (N, C, H, W) of images (N, 3, H, W) in -1..1, drawn from the encoder's posterior."""
    scale = pipe.vae.config.scaling_factor
    return torch.cat([pipe.vae.encode(part).latent_dist.sample() * scale for part in images.split(batch_size)])
