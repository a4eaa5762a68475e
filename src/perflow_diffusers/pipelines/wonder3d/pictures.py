"""Before and after the pipeline: cut the object out of its ground; show the views as a sheet or a turntable."""

import importlib.util
from typing import Any

from PIL import Image

from .conditioning import on_white


def remove_background(picture: Image.Image, session: Any = None) -> Image.Image:
    """The picture as RGBA with a transparent ground, by rembg (MIT; downloads its network of about 180 MB once).

    `session`: `rembg.new_session(name)` for another of its networks. Raises ImportError if rembg is not installed.
    """
    lacking = [name for name in ("rembg", "onnxruntime") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ImportError(
            f'Removing the background needs {" and ".join(lacking)}: pip install "rembg[cpu]" (or rembg[gpu]). Or '
            "cut the object out elsewhere and pass a picture with a transparent or white ground."
        )
    import rembg

    return rembg.remove(picture.convert("RGB"), session=session).convert("RGBA")


def centre_object(picture: Image.Image, size: int = 256, fill: float = 0.75) -> Image.Image:
    """RGBA, `size` x `size`: the opaque part in the middle, its longer side `fill` of the size (the original: 0.75).

    Raises ValueError for a picture that is wholly transparent, and unless 0 < fill <= 1.
    """
    if not 0 < fill <= 1:
        raise ValueError(f"`fill={fill}`; expected a share of the picture's side, above 0 and at most 1.")
    picture = picture.convert("RGBA")
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 5)).getbbox()
    if box is None:
        raise ValueError("The picture is wholly transparent: no object was found in it.")
    part = picture.crop(box)
    scale = fill * size / max(part.size)
    part = part.resize([max(1, round(side * scale)) for side in part.size], Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), (255, 255, 255, 0))
    canvas.paste(part, ((size - part.width) // 2, (size - part.height) // 2))
    return canvas


def contact_sheet(normals: list[Image.Image], images: list[Image.Image], columns: int = 6) -> Image.Image:
    """One picture of all views, for each object a row of normals and one of colours; `columns` views a row.

    Raises ValueError unless there are as many normals as images, a multiple of `columns`.
    """
    if not normals or len(normals) != len(images) or len(normals) % columns:
        raise ValueError(
            f"{len(normals)} normals and {len(images)} images; expected as many of both, a multiple of {columns}."
        )
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, 2 * len(images) // columns * height), "white")
    for domain, pictures in enumerate((normals, images)):
        for place, picture in enumerate(pictures):
            row = 2 * (place // columns) + domain
            sheet.paste(on_white(picture), (place % columns * width, row * height))
    return sheet


def turntable(normals: list[Image.Image], images: list[Image.Image]) -> list[Image.Image]:
    """Frames of one object's views side by side, colour left and normal right, in the order of their azimuths.

    `frames[0].save("turn.gif", save_all=True, append_images=frames[1:], duration=300, loop=0)` writes them. Raises
    ValueError unless there are as many normals as images.
    """
    if not normals or len(normals) != len(images):
        raise ValueError(f"{len(normals)} normals and {len(images)} images; expected as many of both.")
    frames = []
    for normal, image in zip(normals, images, strict=True):
        frame = Image.new("RGB", (2 * image.width, image.height), "white")
        frame.paste(on_white(image), (0, 0))
        frame.paste(on_white(normal), (image.width, 0))
        frames.append(frame)
    return frames
