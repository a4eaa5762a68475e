"""Pictures from files or bytes to tensors: upright, RGB, resized to cover a size, cropped, mirrored."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


def read_size(image: Path | bytes) -> tuple[int, int]:
    """(height, width) of the upright picture, from the file's header alone. Raises what Pillow raises."""
    with _open(image) as opened:
        width, height = opened.size
        if opened.format == "PNG" and "exif" not in opened.info:
            return height, width  # Pillow would decode all pixels to look for EXIF data behind them
        return (width, height) if opened.getexif().get(_ORIENTATION) in _SIDEWAYS else (height, width)


def load_rgb(image: Path | bytes) -> Image.Image:
    """The decoded picture: upright by its EXIF orientation, transparent parts white. Raises what Pillow raises."""
    with _open(image) as opened:
        opened.load()
        return _rgb(ImageOps.exif_transpose(opened), opened.format)


def _open(image: Path | bytes) -> Image.Image:
    return Image.open(BytesIO(image) if isinstance(image, bytes) else image)


def _rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _eight_bits(image, file_format).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image, file_format: str | None) -> Image.Image:
    """Grey of more than 8 bits a pixel, which Pillow would cut off at 255; transparent pixels become white.

    Where the file does not say what white is (floating point, 32 bits), the values do: 1, 255 or 65535, the least that
    holds them all. Raises ValueError for values that are none of these.
    """
    values = np.asarray(image).astype(np.float64)
    white = 65535.0
    if image.mode == "F" or (image.mode == "I" and file_format == "TIFF"):
        low, high = float(values.min()), float(values.max())
        whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        white = next((most for most in whites if low >= 0 and high <= most), 0.0)
        if not white:
            raise ValueError("grey values that lie neither in the unit range nor in that of one or two bytes")
    grey = np.floor(values * (255 / white) + 0.5).astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def covering_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of `size`'s shape that just covers `target`; the free side is rounded half up."""
    (height, width), (target_height, target_width) = size, target
    if target_height * width >= target_width * height:
        return target_height, max(target_width, (2 * width * target_height + height) // (2 * height))
    return max(target_height, (2 * height * target_width + width) // (2 * width)), target_width


def fit(
    image: Image.Image, target: tuple[int, int], *, place: tuple[float, float] | None, flip: bool
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Resize (Lanczos, antialiased) to cover `target`, mirror if `flip`, and crop.

    `place` is the crop's place among all possible, (top, left) in 0..1 (1 excluded); None is the centre. Returns
    (3, H, W) in -1..1 and the (top, left) of the crop in the resized and mirrored picture.
    """
    height, width = covering_size((image.height, image.width), target)
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if flip:
        image = ImageOps.mirror(image)
    free = (height - target[0], width - target[1])
    top, left = (
        (free[0] // 2, free[1] // 2) if place is None else (int(u * (n + 1)) for u, n in zip(place, free, strict=True))
    )
    image = image.crop((left, top, left + target[1], top + target[0]))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.contiguous().float() / 127.5 - 1, (top, left)
