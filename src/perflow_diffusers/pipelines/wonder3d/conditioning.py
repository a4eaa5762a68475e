"""What Wonder3D is told: the object's picture, square and on white, and the cameras of its views."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

# Front, front right, right, back, left, front left: elevation and azimuth relative to the picture's camera, in
# radians, as in the original's pipeline.
ELEVATIONS = (0.0, -0.2362, -0.1686, 0.5220, 0.6904, 0.3733)
AZIMUTHS = (0.0, 0.8125, 1.6934, 3.1406, 4.8359, 5.5859)


def camera_embeddings(elevations: Sequence[float] = ELEVATIONS, azimuths: Sequence[float] = AZIMUTHS) -> Tensor:
    """(2, V, 10) float32: for normals and colours, sine and cosine of (0, elevation, azimuth, is normal, is colour).

    `elevations`, `azimuths`: V radians each, the front view first. They are rounded to half precision, in which the
    original keeps them. Raises ValueError for different lengths.
    """
    if len(elevations) != len(azimuths):
        raise ValueError(f"{len(elevations)} elevations and {len(azimuths)} azimuths; expected one of each a view.")
    views = torch.tensor([(0.0, *angles) for angles in zip(elevations, azimuths, strict=True)], dtype=torch.float16)
    domains = torch.eye(2, dtype=torch.float16)
    rows = torch.cat([views.expand(2, -1, -1), domains[:, None].expand(-1, len(views), -1)], dim=-1).float()
    return torch.cat([rows.sin(), rows.cos()], dim=-1)


def square_pictures(image: Any, size: int) -> list[Image.Image]:
    """RGB pictures of `size` x `size` pixels from one or several of any size: transparency and margins become white.

    `image`: a PIL image, a list of them, or a tensor in 0..1, (C, H, W) or (B, C, H, W) with C = 3 or 4. Warns where a
    picture is resized. Raises ValueError for anything else.
    """
    pictures = [picture for part in (image if isinstance(image, list | tuple) else [image]) for picture in _pil(part)]
    if not pictures:
        raise ValueError("`image` is an empty list. Pass a picture of an object, or several.")
    return [_square(picture, size) for picture in pictures]


def on_white(picture: Image.Image) -> Image.Image:
    """The picture as RGB, its transparent parts white."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _square(picture: Image.Image, size: int) -> Image.Image:
    picture = on_white(picture)
    if picture.size == (size, size):
        return picture
    warnings.warn(
        f"The picture has {picture.width} x {picture.height} pixels and was made {size} x {size}, which this model "
        "works with" + (" (margins filled with white)." if picture.width != picture.height else "."),
        stacklevel=4,
    )
    side = max(picture.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def _pil(part: Any) -> list[Image.Image]:
    """One element of the input as PIL images."""
    if isinstance(part, Image.Image):
        return [part]
    if isinstance(part, Tensor) and part.ndim in (3, 4) and part.shape[-3] in (3, 4) and part.is_floating_point():
        batch = part if part.ndim == 4 else part[None]
        if batch.numel() and not (batch.min() >= 0 and batch.max() <= 1):  # so that NaN is refused, too
            raise ValueError(
                f"`image` is a tensor with values from {batch.min():.3g} to {batch.max():.3g}; expected 0 to 1."
            )
        pixels = (batch.detach().float().cpu() * 255).round().byte().permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(array) for array in pixels]
    what = (
        f"a tensor of shape {tuple(part.shape)}, {part.dtype}"
        if isinstance(part, Tensor)
        else f"a {type(part).__name__}"
    )
    raise ValueError(
        f"`image` holds {what}; expected a PIL image, a list of them, or a floating-point tensor (B, 3, H, W) in 0..1."
    )
