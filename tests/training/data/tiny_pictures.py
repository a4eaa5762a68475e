"""Tiny noise pictures, one a number, in the layouts that people have."""

import io
import json

import numpy as np
from PIL import Image


def picture(number: int, height: int = 20, width: int = 24) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(number: int, height: int = 20, width: int = 24) -> bytes:
    file = io.BytesIO()
    picture(number, height, width).save(file, "png")
    return file.getvalue()


def make_folder(folder, count, sizes=((20, 24),), missing=(), corrupt=(), broken=()):
    """`count` pictures with captions "caption 0", ... in metadata.jsonl; some without a caption or with bad bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        data = png(number, *sizes[number % len(sizes)])
        if number in corrupt:
            data = b"<html>not found</html>"
        if number in broken:
            data = data[: len(data) // 2]
        (folder / f"{number:03d}.png").write_bytes(data)
        if number not in missing:
            rows.append({"file_name": f"{number:03d}.png", "caption": f"caption {number}"})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def numbers(examples) -> list[int]:
    """The N of each "caption N"."""
    return [int(example.caption.split()[1]) for example in examples]
