"""Colours, sizes and crops against Pillow used by hand, and against arithmetic."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pictures import picture

from perflow_training.data import bucket_sizes, nearest_bucket
from perflow_training.data.images import covering_size, fit, load_rgb, read_size


def saved(image, kind="png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ((20, 24), (16, 16), (16, 19)),  # 24 * 16 / 20 = 19.2
        ((24, 20), (16, 16), (19, 16)),
        ((20, 50), (16, 16), (16, 40)),
        ((10, 10), (16, 16), (16, 16)),  # smaller pictures grow
        ((100, 37), (64, 128), (346, 128)),  # 100 * 128 / 37 = 345.9
        ((3, 1000), (16, 16), (16, 5333)),
        ((17, 17), (64, 64), (64, 64)),
    ],
)
def test_the_resized_picture_just_covers_the_target(size, target, expected):
    assert covering_size(size, target) == expected


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("place", [None, (0.0, 0.0), (0.5, 0.99)])
def test_pixels_equal_pillows_own_resize_mirror_and_crop(place, flip):
    image = picture(1, 20, 30)
    tensor, corner = fit(image, (16, 16), place=place, flip=flip)
    by_hand = image.resize((24, 16), Image.Resampling.LANCZOS)
    if flip:
        by_hand = by_hand.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left = {None: 4, (0.0, 0.0): 0, (0.5, 0.99): 8}[place]  # 8 columns are free, so 9 places: floor(0.99 * 9) = 8
    assert corner == (0, left)
    expected = np.asarray(by_hand.crop((left, 0, left + 16, 16)), dtype=np.float32) / np.float32(127.5) - 1
    assert torch.equal(tensor, torch.from_numpy(expected).permute(2, 0, 1))
    assert tensor.is_contiguous()


def test_a_picture_of_the_target_size_is_left_as_it_is():
    tensor, corner = fit(picture(2, 16, 16), (16, 16), place=(0.7, 0.7), flip=False)
    pixels = ((tensor + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert corner == (0, 0)
    assert np.array_equal(pixels, np.asarray(picture(2, 16, 16)))


def test_a_large_picture_is_averaged_and_not_picked_from():
    """A chequerboard of single black and white pixels becomes grey: the resize is antialiased."""
    board = np.indices((256, 256)).sum(0) % 2 * 255
    tensor, _ = fit(Image.fromarray(board.astype(np.uint8)).convert("RGB"), (16, 16), place=None, flip=False)
    assert float(tensor[:, 2:-2, 2:-2].abs().max()) < 0.02


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_are_undone(orientation):
    """The eight orientations as numpy operations that bring the stored pixels upright."""
    upright = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
        8: lambda p: np.rot90(p, 1),
    }[orientation]
    image = picture(3, 8, 12)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image, exif=exif)
    expected = upright(np.asarray(image))
    assert np.array_equal(np.asarray(load_rgb(data)), expected)
    assert read_size(data) == expected.shape[:2]


def test_transparency_becomes_white():
    pixels = np.zeros((2, 3, 4), dtype=np.uint8)
    pixels[..., 0] = 200
    pixels[0, :, 3] = 255
    pixels[1, 1, 3] = 51  # a fifth opaque: 200 / 5 + 255 * 4 / 5 = 244, 0 + 204 = 204
    rgb = np.asarray(load_rgb(saved(Image.fromarray(pixels))))
    assert rgb[0].tolist() == [[200, 0, 0]] * 3
    assert rgb[1].tolist() == [[255, 255, 255], [244, 204, 204], [255, 255, 255]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert np.asarray(load_rgb(saved(palette, transparency=0))).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_other_colour_modes_become_rgb():
    grey = Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8))
    assert np.asarray(load_rgb(saved(grey))).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]
    deep = Image.fromarray(np.array([[0, 128 * 257, 65535]], dtype=np.uint16))
    assert np.asarray(load_rgb(saved(deep))).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]
    cmyk = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert np.asarray(load_rgb(saved(cmyk, "tiff")))[0, 0].tolist() == [255, 0, 0]


WIDE = np.random.default_rng(5).random((6, 7))


@pytest.mark.parametrize(
    ("values", "kind", "white"),
    [
        (WIDE.astype(np.float32), "tiff", 1.0),  # used to be black
        ((WIDE * 255).astype(np.float32), "tiff", 255.0),
        ((WIDE * 65535).astype(np.float32), "tiff", 65535.0),
        ((WIDE * 65535).astype(np.uint16), "tiff", 65535.0),
        ((WIDE * 65535).astype(np.uint16), "png", 65535.0),
        ((WIDE * 65535).astype(np.int32), "tiff", 65535.0),
        ((WIDE * 255).astype(np.int32), "tiff", 255.0),  # used to be black
        ((WIDE * 65535).astype(np.int32), "ppm", 65535.0),
        ((WIDE * 200).astype(np.int32), "ppm", 65535.0),  # a format that says what white is: dark it is
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_grey_of_more_than_eight_bits_is_a_share_of_white(values, kind, white):
    """The nearest of 256 levels to value / white, by arithmetic."""
    rgb = np.asarray(load_rgb(saved(Image.fromarray(values), kind))).astype(float)
    assert np.ptp(rgb, axis=2).max() == 0
    assert np.abs(rgb[..., 0] - values.astype(np.float64) / white * 255).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("values", [[-0.5, 1.0], [0.0, 1e6], [0.0, float("nan")]])
def test_floating_point_grey_without_a_known_range_is_refused(values):
    with pytest.raises(ValueError, match="neither in the unit range nor in that of one or two bytes"):
        load_rgb(saved(Image.fromarray(np.array([values], dtype=np.float32)), "tiff"))


def test_a_transparent_level_of_sixteen_bit_grey_becomes_white():
    levels = np.array([[0, 4000, 65535 - 257]], dtype=np.uint16)
    rgb = np.asarray(load_rgb(saved(Image.fromarray(levels), transparency=4000)))
    assert rgb[0, :, 0].tolist() == [0, 255, 254]


def test_sixteen_bit_colour_is_eight_bit_colour_to_a_level():
    """A PNG written by hand, for Pillow writes none; the expected levels are value / 257."""
    values = np.random.default_rng(1).integers(0, 65536, (5, 6, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 6, 5, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    assert np.abs(np.asarray(load_rgb(data)).astype(float) - values / 257).max() <= 1


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_of_several_frames_the_first_is_taken(kind):
    """Lossless, so that all pixels can be compared; GIF has a palette of 256 colours, which these need not exceed."""
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].putpixel((1, 2), (0, 255, 0))
    options = {"lossless": True} if kind == "webp" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(np.asarray(load_rgb(data)), np.asarray(frames[0]))


def test_colours_of_print_and_television_are_those_of_their_formulas():
    """CMYK without a profile: (1 - c)(1 - k); YCbCr: JPEG's matrix (JFIF 1.02), in a JPEG of one colour."""
    c, m, y, k = (np.array([20, 100, 200, 51]) / 255).tolist()
    cmyk = Image.new("CMYK", (8, 8), (20, 100, 200, 51))
    expected = np.array([(1 - share) * (1 - k) * 255 for share in (c, m, y)])
    for kind, tolerance in (("tiff", 1), ("jpeg", 3)):
        assert np.abs(np.asarray(load_rgb(saved(cmyk, kind)))[0, 0] - expected).max() <= tolerance
    luma, blue, red = 120, 90, 160
    television = Image.new("YCbCr", (8, 8), (luma, blue, red))
    rgb = [luma + 1.402 * (red - 128), luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128),
           luma + 1.772 * (blue - 128)]  # fmt: skip
    assert np.abs(np.asarray(load_rgb(saved(television, "jpeg")))[0, 0] - np.array(rgb)).max() <= 3


def test_buckets_by_hand():
    """1024 squared over 1088, 1152, ...: 963, 910, 862, 819, 780, 744, down to multiples of 64; 1408 / 704 is 2."""
    landscape = [(960, 1088), (896, 1152), (832, 1216), (768, 1280), (768, 1344), (704, 1408)]
    expected = [(1024, 1024)] + [size for pair in landscape for size in (pair, pair[::-1])]
    assert bucket_sizes(1024) == expected
    assert bucket_sizes(32, 8) == [(32, 32), (24, 40), (40, 24)]
    assert bucket_sizes(32, 8, 3.0) == [(32, 32), (24, 40), (40, 24), (16, 48), (48, 16)]
    assert max(height * width for height, width in bucket_sizes(1024, max_ratio=4.0)) == 1024**2


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1000, 1000), (1024, 1024)),
        ((600, 800), (896, 1152)),  # 1.333: 1152 / 896 = 1.286 is nearer than 1216 / 832 = 1.462 in the logarithm
        ((2000, 3000), (832, 1216)),  # 1.5
        ((1080, 1920), (768, 1344)),  # 1.778: 1.75
        ((1920, 1080), (1344, 768)),
        ((100, 5000), (704, 1408)),
    ],
)
def test_a_picture_gets_the_bucket_of_the_nearest_shape(size, bucket):
    assert nearest_bucket(size, bucket_sizes(1024)) == bucket


def test_buckets_need_a_resolution_on_their_grid():
    with pytest.raises(ValueError, match=r"multiple of `bucket_step=64`, e\.g\. 512"):
        bucket_sizes(500)
