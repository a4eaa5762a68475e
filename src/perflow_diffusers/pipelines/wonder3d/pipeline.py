"""Wonder3DPipeline: six normal maps and six colour views of the object in one picture.

Symbols: B objects, V views, G = 2 with guidance and 1 without; rows of a batch are (domain, guidance, object, view).
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from .conditioning import camera_embeddings, square_pictures
from .loading import HUB_OPTIONS, available_variant, check_weights, local_folder
from .unet import UNetMV2DConditionModel

Pictures = list[Image.Image] | np.ndarray | Tensor
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class Wonder3DPipelineOutput(BaseOutput):
    """`normals` and `images`, B * V each in the order (object, view): lists of PIL images, arrays (B * V, H, W, 3),
    tensors (B * V, 3, H, W), or latents, as `output_type` says. The views: front, front right, right, back, left,
    front left."""

    normals: Pictures
    images: Pictures


class Wonder3DPipeline(DiffusionPipeline):
    """One picture of an object -> normal maps and colour views from six sides (Wonder3D, arXiv 2310.15008).

    Args:
        vae: SD's autoencoder.
        image_encoder: CLIP ViT-L/14 with its projection, (B, 3, 224, 224) -> (B, 768).
        unet: the network; None until one is registered.
        scheduler: any that suits SD.
        feature_extractor: CLIP's image preparation.
    """

    model_cpu_offload_seq: Any = "image_encoder->unet->vae"
    _callback_tensor_inputs = ["latents", "image_embeds", "image_latents", "camera_embeds"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        image_encoder: CLIPVisionModelWithProjection,
        unet: UNetMV2DConditionModel | None,
        scheduler: SchedulerMixin,
        feature_extractor: CLIPImageProcessor,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae, image_encoder=image_encoder, unet=unet, scheduler=scheduler, feature_extractor=feature_extractor
        )
        blocks: Any = vae.config["block_out_channels"]
        self.vae_scale_factor = 2 ** (len(blocks) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "Wonder3DPipeline":
        """A pipeline from a folder or Hub id: as released by the authors, or as `save_pretrained` writes it.

        Options as in `DiffusionPipeline.from_pretrained`. Reads safetensors files only. Raises ValueError where a
        model has none, where the UNet's weights are not all there, and for options that need diffusers to load the
        UNet itself (device_map="balanced", quantization_config).
        """
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        folder = local_folder(pretrained_model_name_or_path, kwargs.get("variant"), hub)
        check_weights(folder, [name for name, part in kwargs.items() if part is not None])
        unet = kwargs.pop("unet", None)
        kwargs["use_safetensors"] = True
        if unet is None:
            unet = _load_unet(folder, kwargs)
        # Left out here and registered afterwards: the folder may name its class in a library that is not installed.
        pipe = super().from_pretrained(folder, unet=None, **kwargs)
        pipe.register_modules(unet=unet)
        return pipe

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Without the safety checker, which the released index mentions and leaves empty."""
        stale = ("safety_checker", "requires_safety_checker")
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k not in stale}, **kwargs)

    @property
    def guidance_scale(self) -> float:
        """The guidance of the present call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the present call evaluates the network without the picture as well."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """How many times the present call evaluates the network."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked to stop: `pipe._interrupt = True`, as in diffusers."""
        return self._interrupt

    def encode_image(self, pictures: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """CLIP's embedding (G, B, 1, 768) and the VAE's latent mode (G, B, 4, H, W); zeros where there is no picture.

        `pictures`: B RGB images of the model's size.
        """
        device = self._execution_device
        clip = self.feature_extractor(images=pictures, return_tensors="pt").pixel_values
        embeds = self.image_encoder(clip.to(device, self.image_encoder.dtype)).image_embeds.to(self.unet.dtype)
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        pixels = pixels.to(device, self.vae.dtype) / 127.5 - 1
        latents = self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor
        embeds, latents = embeds[None, :, None], latents[None].to(self.unet.dtype)
        if self.do_classifier_free_guidance:
            embeds, latents = (torch.cat([torch.zeros_like(part), part]) for part in (embeds, latents))
        return embeds, latents

    def prepare_latents(
        self, objects: int, generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None
    ) -> Tensor:
        """Starting noise (2 * B * V, 4, H, W) in the order (domain, object, view), scaled for the scheduler.

        Drawn object by object, so that an object's noise does not depend on what follows it. Raises ValueError for
        `latents` of another shape and for a list of generators of another length than B.
        """
        config = self.unet.config
        views, size = config.num_views, config.sample_size
        shape = (2 * views, config.out_channels, size, size)
        expected = (objects * shape[0], *shape[1:])
        if latents is not None:
            if tuple(latents.shape) != expected:
                raise ValueError(
                    f"`latents` has the shape {tuple(latents.shape)}; expected {expected}: (domain, object, view) "
                    f"with 2 domains, {objects} objects and {views} views."
                )
            latents = latents.to(self._execution_device, self.unet.dtype)
        else:
            generators = generator if isinstance(generator, list) else [generator] * objects
            if len(generators) != objects:
                raise ValueError(f"{len(generators)} generators for {objects} pictures; expected one a picture.")
            noise = [
                randn_tensor(shape, generator=g, device=self._execution_device, dtype=self.unet.dtype)
                for g in generators
            ]
            latents = torch.stack([part.unflatten(0, (2, views)) for part in noise], dim=1).flatten(0, 2)
        return latents * self.scheduler.init_noise_sigma

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        eta: float = 0.0,
        camera_embeds: Tensor | None = None,
    ) -> Wonder3DPipelineOutput | tuple[Pictures, Pictures]:
        """Draw the views.

        Args:
            image: picture of an object, or several (see `square_pictures`); on white or transparent ground, the
                object in the middle and filling three quarters of it works best.
            num_inference_steps: sampling steps, as the scheduler counts them.
            guidance_scale: above 1, the network is evaluated without the picture as well.
            generator: of the noise; a list has one for each picture.
            latents: the noise itself, (2 * B * V, 4, H, W), rows (domain, object, view).
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns `(normals, images)`.
            callback_on_step_end: called after each step as `f(pipe, step, timestep, tensors)`, may return changed
                tensors; `callback_on_step_end_tensor_inputs` names them (latents, image_embeds, image_latents,
                camera_embeds).
            eta: for DDIM, 0 (deterministic) to 1.
            camera_embeds: (2, V, 10), default `camera_embeddings()`.

        Raises:
            ValueError: for arguments outside these.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        wanted = ["latents"] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        self._check(output_type, wanted, num_inference_steps, guidance_scale)
        self._guidance_scale, self._interrupt = guidance_scale, False
        pictures = square_pictures(image, self.unet.config.sample_size * self.vae_scale_factor)
        tensors = self._conditions(pictures, camera_embeds)
        # First the timesteps: some schedulers' starting noise depends on them.
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        tensors["latents"] = self.prepare_latents(len(pictures), generator, latents)
        extra = self._step_options(generator, len(pictures), eta)
        latents = self._denoise(tensors, num_inference_steps, extra, callback_on_step_end, wanted)
        drawn: Any = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        half = len(drawn) // 2
        output = Wonder3DPipelineOutput(normals=drawn[:half], images=drawn[half:])
        return output if return_dict else (output.normals, output.images)

    def _conditions(self, pictures: list[Image.Image], camera_embeds: Tensor | None) -> dict[str, Tensor]:
        """What every row is told, beside the timestep: 2 * G * B * V rows each."""
        cameras = self._cameras(camera_embeds)
        image_embeds, image_latents = self.encode_image(pictures)
        groups = image_embeds.shape[:2]
        return {
            "image_embeds": self._rows(image_embeds),
            "image_latents": self._rows(image_latents),
            "camera_embeds": cameras[:, None, None].expand(-1, *groups, -1, -1).flatten(0, 3),
        }

    def _decode(self, latents: Tensor, output_type: str) -> Pictures:
        """Latents as pictures of the wanted type."""
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.image_processor.postprocess(
            self.vae.decode(latents, return_dict=False)[0], output_type=output_type
        )

    def _denoise(
        self,
        tensors: dict[str, Tensor],
        steps: int,
        extra: dict[str, Any],
        callback: Callable[..., dict] | None,
        wanted: list[str],
    ) -> Tensor:
        """The sampling loop; `tensors` holds what a callback may replace."""
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        warmup = len(timesteps) - steps * self.scheduler.order
        with self.progress_bar(total=steps) as progress:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    continue
                noise = self._predict(tensors, t)
                tensors["latents"] = self.scheduler.step(noise, t, tensors["latents"], **extra, return_dict=False)[0]
                if callback is not None:
                    changed = callback(self, i, t, {name: tensors[name] for name in wanted}) or {}
                    tensors.update({name: changed[name] for name in wanted if name in changed})
                if i == len(timesteps) - 1 or (i + 1 > warmup and (i + 1) % self.scheduler.order == 0):
                    progress.update()
        return tensors["latents"]

    def _predict(self, tensors: dict[str, Tensor], t: Tensor) -> Tensor:
        """The network's output for all rows, guided: (2 * B * V, 4, H, W)."""
        copies = 2 if self.do_classifier_free_guidance else 1
        noisy = self.scheduler.scale_model_input(tensors["latents"], t)
        noisy = noisy.unflatten(0, (2, 1, -1)).expand(-1, copies, -1, -1, -1, -1).flatten(0, 2)
        out = self.unet(
            torch.cat([noisy, tensors["image_latents"]], dim=1),
            t,
            encoder_hidden_states=tensors["image_embeds"],
            class_labels=tensors["camera_embeds"],
            return_dict=False,
        )[0].unflatten(0, (2, copies, -1))
        if copies == 1:
            return out.flatten(0, 2)
        without, given = out.unbind(1)
        return (without + self._guidance_scale * (given - without)).flatten(0, 1)

    def _rows(self, part: Tensor) -> Tensor:
        """(G, B, ...) -> (2 * G * B * V, ...): the same for both domains and all views."""
        views = self.unet.config.num_views
        return part[None, :, :, None].expand(2, -1, -1, views, *[-1] * (part.ndim - 2)).flatten(0, 3)

    def _cameras(self, given: Tensor | None) -> Tensor:
        """(2, V, 10) for the network."""
        cameras = camera_embeddings() if given is None else given
        expected = (2, self.unet.config.num_views, self.unet.config.projection_class_embeddings_input_dim)
        if tuple(cameras.shape) != expected:
            raise ValueError(
                f"Camera embeddings of the shape {tuple(cameras.shape)} for a network that takes {expected}. Pass "
                "`camera_embeds=camera_embeddings(elevations, azimuths)` with one angle of each a view."
            )
        return cameras.to(self._execution_device, self.unet.dtype)

    def _step_options(
        self, generator: torch.Generator | list[torch.Generator] | None, objects: int, eta: float
    ) -> dict[str, Any]:
        """What this scheduler's `step` takes beside the sample; a list of generators becomes one for each row."""
        accepted = inspect.signature(self.scheduler.step).parameters
        if isinstance(generator, list):
            views = self.unet.config.num_views
            generator = [generator[b] for _ in range(2) for b in range(objects) for _ in range(views)]
        options = {"eta": eta, "generator": generator}
        return {name: value for name, value in options.items() if name in accepted}

    def _check(self, output_type: str, wanted: list[str], steps: Any, guidance: Any) -> None:
        if self.unet is None:
            raise ValueError("The pipeline has no UNet. Register one: pipe.register_modules(unet=...).")
        if not isinstance(steps, int | np.integer) or steps < 1:
            raise ValueError(f"`num_inference_steps={steps!r}`; expected a whole number from 1.")
        if not isinstance(guidance, int | float | np.number) or not np.isfinite(guidance):
            raise ValueError(f"`guidance_scale={guidance!r}`; expected a finite number, 1 for none.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type={output_type!r}`; expected one of {', '.join(OUTPUT_TYPES)}.")
        unknown = [name for name in wanted if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` names {', '.join(unknown)}; expected some of "
                f"{', '.join(self._callback_tensor_inputs)}."
            )


def _load_unet(folder: Any, options: dict[str, Any]) -> UNetMV2DConditionModel:
    """The UNet of a folder, with those of a pipeline's options that concern it."""
    for name in ("quantization_config", "device_map"):
        if options.get(name) is not None and (name != "device_map" or options[name] == "balanced"):
            raise ValueError(
                f"`{name}={options[name]!r}` needs the UNet to be loaded beforehand. Pass "
                "unet=UNetMV2DConditionModel.from_pretrained(folder, subfolder='unet', ...)."
            )
    dtype = options.get("dtype", options.get("torch_dtype"))
    if isinstance(dtype, dict):
        dtype = dtype.get("unet", dtype.get("default", torch.float32))
    chosen = {name: options[name] for name in ("low_cpu_mem_usage", "device_map", "disable_mmap") if name in options}
    variant = available_variant(folder / "unet", options.get("variant"))
    return UNetMV2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=dtype, variant=variant, **chosen)
