"""A network with its noise path: called with path indices 1..N, whatever the network itself was told in training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from perflow_diffusers.flow import NoisePath
from perflow_diffusers.flow.path import like
from perflow_diffusers.schedulers.scheduling_perflow import PeRFlowScheduler
from perflow_diffusers.words.shown import shown

from .conditions import Conditions
from .config import ConfigError
from .data.encoders import to_latents

Sizes = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@shown
@dataclass(frozen=True)
class Backbone:
    """`network(z, timestep, **conditions)` predicts `prediction` on `path`.

    A DDPM-trained network was told `i - 1` at path index `i` (`index_offset=-1`); PeRFlow students are told `i`.
    `dtype` is what the network computes in; states keep theirs.
    """

    network: torch.nn.Module
    path: NoisePath
    prediction: str
    index_offset: int = 0
    dtype: torch.dtype | None = None

    def __call__(self, z: Tensor, timestep: Tensor, cond: Conditions) -> Tensor:
        """`z` (B, C, H, W), `timestep` (B,) path indices 1..N, `cond` of B rows -> (B, C, H, W) like z."""
        told = (timestep + self.index_offset).to(z.device)
        if self.dtype is not None:
            cond = cond.to(dtype=self.dtype)
        out = self.network(z.to(self.dtype or z.dtype), told, **cond.kwargs(), return_dict=False)[0]
        return out.to(z.dtype)

    def guided(
        self, uncond: Conditions, cond: Conditions, guidance_scale: float | Tensor | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """`predict(z, timestep)` for a solver, with classifier-free guidance unless `guidance_scale` is None.

        `guidance_scale`: a number, or (B,), one a sample.
        """
        if guidance_scale is None:
            return lambda z, timestep: self(z, timestep, cond)
        both = Conditions.cat([cond.without_prompt(uncond), cond])

        def predict(z: Tensor, timestep: Tensor) -> Tensor:
            out = self(torch.cat([z, z]), torch.cat([timestep, timestep]), both)
            without, with_prompt = out.chunk(2)
            return without + like(torch.as_tensor(guidance_scale), z) * (with_prompt - without)

        return predict

    def student(self, network: torch.nn.Module, dtype: torch.dtype | None = None) -> "Backbone":
        """A student of this teacher: told the path index itself, as the published students are."""
        return replace(self, network=network, index_offset=0, dtype=dtype)


def path_of(scheduler, rescale_betas_zero_snr: bool = False) -> tuple[NoisePath, str, int]:
    """(path, what the network predicts, index offset) of a pipeline's own scheduler.

    It is the path on which the student will be sampled. Raises ConfigError for a scheduler that PeRFlow's refuses.
    """
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    rescaled = {"rescale_betas_zero_snr": True} if rescale_betas_zero_snr else {}
    try:
        sampler = PeRFlowScheduler.from_config(config, perflow_type="velocity", **rescaled)
    except ValueError as error:
        raise ConfigError(f"The teacher's scheduler cannot be trained on. {error}") from error
    own = getattr(scheduler, "alphas_cumprod", sampler.alphas_cumprod).to("cpu")
    # Some schedulers keep 2**-24 for a last 0, for their own divisions.
    if not rescaled and (own.double() - sampler.alphas_cumprod).abs().max() > 2**-20:
        raise ConfigError(
            f"{type(scheduler).__name__} has other noise levels than its config says, so that no sampler could follow "
            "the student. Save the pipeline with the scheduler that it was trained with, e.g. DDIMScheduler."
        )
    return sampler.path, sampler.config.prediction_type or "epsilon", -1


def teacher_of(pipe: DiffusionPipeline, rescale_betas_zero_snr: bool = False) -> Backbone:
    """The pipeline's own network and noise schedule, as the teacher. Raises ConfigError for what cannot be one."""
    network = getattr(pipe, "unet", None)
    if network is None:
        raise ConfigError(
            f"{type(pipe).__name__} has no `unet`. Pipelines of the Stable Diffusion 1, 2 and XL kind can be trained."
        )
    if pipe.vae is not None and network.config.in_channels != pipe.vae.config.latent_channels:
        raise ConfigError(
            f"The UNet takes {network.config.in_channels} channels and the latents have "
            f"{pipe.vae.config.latent_channels}: an inpainting or edit model. Train on its text-to-image base, and "
            "merge the delta into this one."
        )
    path, prediction, offset = path_of(pipe.scheduler, rescale_betas_zero_snr)
    if path.zero_terminal_snr and prediction == "epsilon":
        raise ConfigError(
            "An epsilon-predicting teacher says nothing at zero terminal SNR. Leave `rescale_betas_zero_snr` false, "
            "or take a v-predicting teacher."
        )
    return Backbone(network, path, prediction, offset)


def is_sdxl(pipe: DiffusionPipeline) -> bool:
    """Whether the network wants pooled embeddings and picture sizes beside the prompt."""
    return pipe.unet.config.get("addition_embed_type") == "text_time"


def image_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """(height, width) of the pictures that the pipeline draws by default."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


@torch.no_grad()
def encode_prompts(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    sizes: Sequence[Sizes] | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Conditions:
    """Conditions of N prompts through the pipeline's own `encode_prompt`.

    `sizes`: (original size, top left of the crop, target size) a prompt, each (height, width) or (top, left), which
    SDXL is told; by default those of an uncropped picture of the pipeline's own size.
    """
    device = device or pipe.device
    parts = []
    for first in range(0, len(prompts), batch_size):
        words = list(prompts[first : first + batch_size])
        encoded = pipe.encode_prompt(
            prompt=words, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        parts.append(_conditions(pipe, encoded[0], encoded[2] if len(encoded) == 4 else None))
    cond = Conditions.cat(parts)
    return _with_sizes(pipe, cond, sizes)


@torch.no_grad()
def encode_empty(pipe: DiffusionPipeline, device: torch.device | str | None = None) -> Conditions:
    """One row: what the pipeline itself uses where no negative prompt is given (zeros for SDXL base)."""
    encoded = pipe.encode_prompt(
        prompt="", device=device or pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    cond = _conditions(pipe, encoded[1], encoded[3] if len(encoded) == 4 else None)
    return _with_sizes(pipe, cond, None)


def _conditions(pipe: DiffusionPipeline, embeds: Tensor, pooled: Tensor | None) -> Conditions:
    if is_sdxl(pipe) and pooled is None:
        raise ConfigError(f"{type(pipe).__name__} gives no pooled embeddings, but its UNet wants them.")
    return Conditions(embeds, pooled)


def _with_sizes(pipe: DiffusionPipeline, cond: Conditions, sizes: Sequence[Sizes] | None) -> Conditions:
    """SDXL's `time_ids` by the pipeline's own `_get_add_time_ids`."""
    if cond.pooled is None:
        return cond
    full = image_size(pipe)
    sizes = sizes or [(full, (0, 0), full)] * len(cond)
    encoder = pipe.text_encoder_2
    dim = cond.pooled.shape[-1] if encoder is None else encoder.config.projection_dim
    known = {
        size: pipe._get_add_time_ids(*size, dtype=torch.float32, text_encoder_projection_dim=dim)
        for size in set(sizes)
    }
    time_ids = torch.cat([known[size] for size in sizes]).to(cond.embeds.device)
    return replace(cond, time_ids=time_ids)


@torch.no_grad()
def decode_latents(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in -1..1 of scaled latents (N, C, h, w), in the VAE's dtype."""
    vae, shape = pipe.vae, (1, -1, 1, 1)
    z = latents.to(vae.device, torch.float32) / vae.config.scaling_factor
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is not None and std is not None:
        z = z * torch.tensor(std, device=z.device).view(shape) + torch.tensor(mean, device=z.device).view(shape)
    else:
        z = z + (vae.config.get("shift_factor") or 0.0)
    return vae.decode(z.to(vae.dtype), return_dict=False)[0]


@torch.no_grad()
def encode_images(pipe: DiffusionPipeline, images: Tensor, noise: Tensor, batch_size: int = 16) -> Tensor:
    """Scaled latents (N, C, h, w) of images (N, 3, H, W) in -1..1; `noise` (N, C, h, w) draws from the posterior."""
    vae = pipe.vae
    latents = []
    for part, eps in zip(images.split(batch_size), noise.split(batch_size), strict=True):
        posterior = vae.encode(part.to(device=vae.device, dtype=vae.dtype)).latent_dist
        latents.append((posterior.mean + posterior.std * eps.to(vae.device, vae.dtype)).float())
    return to_latents(torch.cat(latents), vae.config)
