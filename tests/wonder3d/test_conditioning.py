"""Camera numbers against the closed form; pictures become square and white as the original wants them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from perflow_diffusers.pipelines.wonder3d import camera_embeddings
from perflow_diffusers.pipelines.wonder3d.conditioning import AZIMUTHS, ELEVATIONS, square_pictures


def test_camera_numbers_are_sine_and_cosine_of_angles_and_domain():
    cameras = camera_embeddings()
    assert cameras.shape == (2, 6, 10)
    for domain, one_hot in enumerate([(1, 0), (0, 1)]):
        for view, angles in enumerate(zip(ELEVATIONS, AZIMUTHS, strict=True)):
            numbers = [0.0, *(float(np.float16(angle)) for angle in angles), *one_hot]
            expected = [math.sin(x) for x in numbers] + [math.cos(x) for x in numbers]
            assert cameras[domain, view].tolist() == pytest.approx(expected, abs=1e-7)


def test_the_first_view_is_the_pictures_own_camera():
    sine, cosine = math.sin(1), math.cos(1)
    assert camera_embeddings()[0, 0].tolist() == pytest.approx([0, 0, 0, sine, 0, 1, 1, 1, cosine, 1])
    assert camera_embeddings([0.0, 0.5], [0.0, 3.0]).shape == (2, 2, 10)
    with pytest.raises(ValueError, match="2 elevations and 1 azimuths"):
        camera_embeddings([0.0, 0.5], [0.0])


def test_transparency_becomes_white_and_half_transparency_is_blended():
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.putpixel((0, 0), (255, 0, 0, 255))
    picture.putpixel((1, 0), (255, 0, 0, 128))
    (made,) = square_pictures(picture, 8)
    assert made.mode == "RGB"
    assert [made.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0), (255, 127, 127), (255, 255, 255)]


def test_a_palette_with_a_transparent_colour_is_composited_too():
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.info["transparency"] = 1
    (made,) = square_pictures(picture, 4)
    assert made.getpixel((2, 2)) == (255, 255, 255)


def test_another_size_is_resized_with_a_warning_and_keeps_its_proportions():
    picture = Image.new("RGB", (64, 32), "black")
    with pytest.warns(UserWarning, match="64 x 32 pixels and was made 32 x 32.*margins filled with white"):
        (made,) = square_pictures(picture, 32)
    pixels = np.asarray(made)
    assert pixels.shape == (32, 32, 3)
    assert (pixels[:6] == 255).all() and (pixels[-6:] == 255).all() and (pixels[10:22] == 0).all()


def test_tensors_and_lists_are_taken_apart():
    batch = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = square_pictures([batch, Image.new("RGB", (8, 8))], 8)
    assert len(made) == 3
    assert np.array_equal(np.asarray(made[1]), (batch[1] * 255).round().byte().permute(1, 2, 0).numpy())
    see_through = torch.cat([batch[0], torch.zeros(1, 8, 8)])
    assert np.asarray(square_pictures(see_through, 8)[0]).min() == 255


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([], "empty list"),
        ("cat.png", "a str; expected a PIL image"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "torch.uint8; expected"),
        (torch.full((3, 8, 8), 255.0), "values from 255 to 255; expected 0 to 1"),
        (torch.zeros(1, 8, 8), r"a tensor of shape \(1, 8, 8\)"),
    ],
)
def test_anything_else_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        square_pictures(image, 8)
