"""A network with its noise path: called with path indices 1..N, whatever the network itself was told in training."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from perflow_diffusers.families import COMPONENTS, network_in
from perflow_diffusers.flow import Base, NoisePath, SigmaWindows, Windows
from perflow_diffusers.flow.path import like
from perflow_diffusers.schedulers.scheduling_perflow import PeRFlowScheduler
from perflow_diffusers.words.shown import shown
from perflow_training.errors import ConfigError
from perflow_training.teacher.call import POSITIONAL, Call
from perflow_training.teacher.conditions import Conditions
from perflow_training.teacher.encode import Pipeline

#: Windows of timesteps, or of a flow's noise levels.
Boundaries = Windows | SigmaWindows


@shown
@dataclass(frozen=True)
class Backbone:
    """`network(z, timestep, **conditions)` predicts `prediction` on `path`; `call` says how it is called.

    A DDPM-trained network was told `i - 1` at path index `i` (`index_offset=-1`); PeRFlow students are told `i`.
    `dtype` is what the network computes in; states keep theirs.
    """

    network: torch.nn.Module
    path: NoisePath
    prediction: str
    index_offset: int = 0
    dtype: torch.dtype | None = None
    call: Call = POSITIONAL

    def __call__(self, z: Tensor, timestep: Tensor, cond: Conditions) -> Tensor:
        """`z` (B, ...), `timestep` (B,) path indices 1..N (noise levels of a flow), `cond` of B rows -> like z."""
        told = (timestep + self.index_offset).to(z.device)
        if self.dtype is not None:
            cond = cond.to(dtype=self.dtype)
        return self.call(self.network, z.to(self.dtype or z.dtype), told, cond).to(z.dtype)

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


def base_of_scheduler(scheduler: Any, rescale_betas_zero_snr: bool = False) -> Base:
    """What a pipeline's own scheduler says of its network; its path is the one on which the student will be sampled.

    Raises ConfigError for a scheduler that PeRFlow's refuses.
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
    return sampler.base


def teacher_of(pipe: Pipeline, rescale_betas_zero_snr: bool = False) -> Backbone:
    """The pipeline's own network and noise schedule, as the teacher. Raises ConfigError for what cannot be one."""
    network = network_in(pipe)
    if network is None:
        raise ConfigError(
            f"{type(pipe).__name__} has no `{'` or `'.join(COMPONENTS)}`. Pipelines of the Stable Diffusion 1, 2 and "
            "XL kind can be trained."
        )
    if pipe.vae is not None and network.config.in_channels != pipe.vae.config.latent_channels:
        raise ConfigError(
            f"The UNet takes {network.config.in_channels} channels and the latents have "
            f"{pipe.vae.config.latent_channels}: an inpainting or edit model. Train on its text-to-image base, and "
            "merge the delta into this one."
        )
    _check_sizes(pipe, network)
    base = base_of_scheduler(pipe.scheduler, rescale_betas_zero_snr)
    prediction = base.prediction or "epsilon"  # what diffusers' schedulers take for granted
    if base.path.zero_terminal_snr and prediction == "epsilon":
        raise ConfigError(
            "An epsilon-predicting teacher says nothing at zero terminal SNR. Leave `rescale_betas_zero_snr` false, "
            "or take a v-predicting teacher."
        )
    return Backbone(network, base.path, prediction, base.index_offset)


def _check_sizes(pipe: Pipeline, network: Any) -> None:
    """Raises ConfigError for a network that is told something else of the picture than SDXL's six numbers."""
    config, encoder = network.config, getattr(pipe, "text_encoder_2", None)
    if config.get("addition_embed_type") != "text_time" or encoder is None:
        return
    told = config.projection_class_embeddings_input_dim - encoder.config.projection_dim
    if told != 6 * config.addition_time_embed_dim:
        raise ConfigError(
            f"The UNet is told {told / config.addition_time_embed_dim:g} numbers of a picture, SDXL's base is told 6 "
            "(a refiner is told a score instead of a size). Train on the base."
        )
