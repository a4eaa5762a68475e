"""Turns drawn pictures into the committed data set: parquet files of image, caption, stated and all attributes.

Run after draw_pictures.mjs:  python build_dataset.py RAW_FOLDER [OUT_FOLDER]
"""

import argparse
import io
import json
import random
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Pictures

from captions import caption, choose_stated, person_attributes, thumb_attributes

SIZE = 32
#: DiceBear style -> name of the parts, its attributes, held-out pictures
STYLES = {
    "pixel-art": ("avatars", person_attributes, 1024),
    "disco": ("disco", person_attributes, 512),
    "thumbs": ("thumbs", thumb_attributes, 512),
}


def png(picture: np.ndarray) -> bytes:
    """A picture of SIZE x SIZE x 3 bytes as a PNG, in palette form where it has few colours."""
    image = Pictures.fromarray(picture)
    if len(image.getcolors(SIZE * SIZE) or ()) <= 256:
        palette = image.convert("P", palette=Pictures.Palette.ADAPTIVE)
        image = palette if np.array_equal(np.asarray(palette.convert("RGB")), picture) else image
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def rows(raw: Path, style: str, attributes_of) -> list[dict]:
    pictures = np.fromfile(raw / f"{style}.rgb", dtype=np.uint8).reshape(-1, SIZE, SIZE, 3)
    extras = [json.loads(line) for line in (raw / f"{style}.jsonl").read_text().splitlines()]
    out = []
    for index, (picture, extra) in enumerate(zip(pictures, extras, strict=True)):
        attributes = attributes_of(extra)
        stated = choose_stated(attributes, random.Random(f"{style}-{index}"))
        record = {"image": {"bytes": png(picture), "path": None}, "caption": caption(attributes, stated)}
        out.append(record | {"stated": stated, "attributes": json.dumps(attributes)})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw", type=Path, help="folder that draw_pictures.mjs wrote")
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).parent / "data")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    features = Features(
        {
            "image": Image(),
            "caption": Value("string"),
            "stated": Sequence(Value("string")),
            "attributes": Value("string"),
        }
    )
    for style, (name, attributes_of, held_out) in STYLES.items():
        records = rows(args.raw, style, attributes_of)
        # the same picture may be drawn twice: a held-out picture must not stand in the training part
        test = records[:held_out]
        seen = {record["image"]["bytes"] for record in test}
        train = [record for record in records[held_out:] if record["image"]["bytes"] not in seen]
        for split, part in (("test", test), ("train", train)):
            path = args.out / f"{name}-{split}.parquet"
            Dataset.from_list(part, features=features).to_parquet(path)
            print(f"{path}: {len(part)} pictures, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
