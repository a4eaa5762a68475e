"""What a training step is given: a caption, a picture, and what SDXL wants to know about its crop."""

from dataclasses import dataclass

import torch

from perflow_diffusers.words.shown import shown
from perflow_training.teacher.conditions import Sizes


@shown
@dataclass(frozen=True)
class Example:
    """One caption and its picture; sizes are (height, width) and the crop is (top, left), as SDXL wants them.

    `image` is (3, H, W) in -1..1, or None where only captions are used. `original_size` is the picture's size before
    it was resized, `crop_top_left` the corner of the crop in the resized (and mirrored) picture, `target_size` (H, W).
    """

    caption: str
    image: torch.Tensor | None
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]
    name: str = ""  # of the record, for people

    @property
    def pixels(self) -> torch.Tensor:
        """The picture, where there must be one. Raises ValueError for captions alone."""
        if self.image is None:
            raise ValueError(
                f"The record {self.name or self.caption!r} has a caption but no picture, which is needed."
            )
        return self.image

    @property
    def sizes(self) -> Sizes:
        """What SDXL is told of the picture."""
        return self.original_size, self.crop_top_left, self.target_size
