"""The miniature's data set in memory: pictures as uint8 tensors, attributes, captions drawn anew for every epoch."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset

from captions import caption, choose_stated

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Pictures:
    """`images`: (N, 3, 32, 32) uint8; `attributes`, `captions` and `stated`: N entries each."""

    images: torch.Tensor
    attributes: list[dict[str, str]]
    captions: list[str]
    stated: list[list[str]]

    def __len__(self) -> int:
        return len(self.captions)

    def redraw_captions(self, seed: int) -> list[str]:
        """New captions of the same pictures: each attribute is stated with probability one half."""
        rng = random.Random(seed)
        return [caption(attributes, choose_stated(attributes, rng)) for attributes in self.attributes]


def load_pictures(style: str, split: str) -> Pictures:
    """Pictures of `style` ("avatars", "disco" or "thumbs"), `split` "train" or "test" (never trained on)."""
    records = load_dataset("parquet", data_files=str(DATA / f"{style}-{split}.parquet"), split="train")
    images = np.stack([np.asarray(image.convert("RGB")) for image in records["image"]])
    return Pictures(
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        attributes=[json.loads(text) for text in records["attributes"]],
        captions=list(records["caption"]),
        stated=list(records["stated"]),
    )


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to float -1..1."""
    return images.float() / 127.5 - 1
