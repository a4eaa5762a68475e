"""What a solve starts from: conditions and data latents, from examples that are encoded here or from a cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Protocol

import torch
from torch import Tensor

from perflow_diffusers.families import network_in
from perflow_diffusers.words.shown import shown
from perflow_training.config import ConfigError, TrainingConfig
from perflow_training.data import DataOptions, ExampleStream, open_examples
from perflow_training.data.cached import CachedStream
from perflow_training.data.example import Example
from perflow_training.data.identity import model_identity
from perflow_training.rng import Draws
from perflow_training.teacher.conditions import Conditions
from perflow_training.teacher.encode import (
    Pipeline,
    encode_empty,
    encode_images,
    encode_prompts,
    encoded_rows,
    picture_size,
)

Shape = tuple[int, ...]
CAPTION = 100  # characters of a caption that name an example


@shown
@dataclass(frozen=True, eq=False)
class Material:
    """`cond` of B rows, the latents' `shape` (C, h, w), and the data's `latents` (B, C, h, w) where they are used.

    `names` (B) say which examples these are, for people.
    """

    cond: Conditions
    shape: Shape
    latents: Tensor | None = None
    names: tuple[str, ...] = ()


class Loader(Protocol):
    """Material for one solve after another; `uncond` is one row, the empty prompt."""

    uncond: Conditions

    def draw(self, count: int, number: int, with_latents: bool) -> Material: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    def describe(self) -> dict[str, float]: ...

    def close(self) -> None: ...


class Streaming:
    """What reads on and on from a `stream`, and stands where that stands."""

    stream: ExampleStream | CachedStream

    def state_dict(self) -> dict:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.stream.load_state_dict(state)

    def close(self) -> None:
        self.stream.close()


class EncodingLoader(Streaming):
    """Captions and pictures, encoded by the pipeline when they are needed."""

    stream: ExampleStream

    def __init__(self, pipe: Pipeline, config: TrainingConfig, draws: Draws, device: torch.device):
        height, width = picture_size(pipe)
        if height != width and not config.resolution:
            raise ConfigError(f"The network draws {height} x {width} pictures: set `resolution` to the shorter side.")
        self.pipe, self.config, self.draws, self.device = pipe, config, draws, device
        self.channels = network_in(pipe).config.in_channels
        self.stream = open_examples(
            DataOptions.of(config).sized(height),
            seed=config.seed,
            with_images=config.data_starts > 0,
            process_index=draws.process_index,
            num_processes=draws.num_processes,
        )
        self.uncond = encode_empty(pipe, device)

    def draw(self, count: int, number: int, with_latents: bool) -> Material:
        """The next `count` examples as solve `number` needs them."""
        examples = self.stream.batch(count)
        cond = encode_prompts(
            self.pipe, [e.caption for e in examples], [e.sizes for e in examples], device=self.device
        )
        height, width = examples[0].target_size
        factor = self.pipe.vae_scale_factor
        shape = (self.channels, height // factor, width // factor)
        names = named(examples)
        if not with_latents:
            return Material(cond, shape, None, names)
        images = torch.stack([example.pixels for example in examples])
        noise = self.draws.normal("posterior", number, (count, *shape))
        return Material(cond, shape, encode_images(self.pipe, images, noise), names)

    def describe(self) -> dict[str, float]:
        report = self.stream.report
        return {
            "missing_captions": report.missing_captions,
            "unreadable_captions": report.unreadable_captions,
            "corrupt_images": report.corrupt,
            "small_images": report.too_small,
        }


def named(examples: Sequence[Example]) -> tuple[str, ...]:
    """What people read of examples: the caption, and the record that it is from."""
    return tuple(f"{shorten(e.caption, CAPTION, placeholder=' ...')!r} ({e.name})" for e in examples)


class CachedLoader(Streaming):
    """Conditions and latents that training/precompute.py has encoded; neither VAE nor text encoder is needed."""

    stream: CachedStream

    def __init__(self, shape: Shape, config: TrainingConfig, draws: Draws, device: torch.device):
        self.shape, self.device = shape, device
        self.stream = CachedStream(
            DataOptions.of(config),
            seed=config.seed,
            with_images=config.data_starts > 0,
            process_index=draws.process_index,
            num_processes=draws.num_processes,
            model=model_identity(config.pretrained_model_name_or_path, config.revision),
        )
        empty = self.stream.empty_prompt
        self.uncond = encoded_rows(empty["prompt_embeds"], empty.get("pooled")).to(device)

    def draw(self, count: int, number: int, with_latents: bool) -> Material:
        """The next `count` rows of the cache."""
        batch = self.stream.batch(count)
        cond = encoded_rows(batch.prompt_embeds, batch.pooled, batch.add_time_ids).to(self.device)
        if batch.latents is None:
            return Material(cond, self.shape, None, batch.names)
        channels, height, width = batch.latents.shape[1:]
        return Material(cond, (channels, height, width), batch.latents if with_latents else None, batch.names)

    def describe(self) -> dict[str, float]:
        return {}
