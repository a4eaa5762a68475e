"""Cutting the object out, and showing the views."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from perflow_diffusers.pipelines.wonder3d import centre_object, contact_sheet, remove_background, turntable


def plain(*colours):
    return [Image.new("RGB", (4, 2), colour) for colour in colours]


def test_the_sheet_has_a_row_of_normals_and_one_of_colours_for_each_object():
    normals = plain(*[(i, 0, 0) for i in range(4)])
    images = plain(*[(0, i, 0) for i in range(4)])
    sheet = contact_sheet(normals, images, columns=2)
    assert sheet.size == (8, 8)
    shown = [[sheet.getpixel((4 * column, 2 * row)) for column in range(2)] for row in range(4)]
    assert shown == [
        [(0, 0, 0), (1, 0, 0)],
        [(0, 0, 0), (0, 1, 0)],
        [(2, 0, 0), (3, 0, 0)],
        [(0, 2, 0), (0, 3, 0)],
    ]


@pytest.mark.parametrize(("normals", "images"), [(6, 5), (0, 0), (5, 5)])
def test_a_sheet_of_unequal_or_incomplete_rows_is_refused(normals, images):
    with pytest.raises(ValueError, match=f"{normals} normals and {images} images"):
        contact_sheet(plain(*["red"] * normals), plain(*["red"] * images))


def test_a_turntable_frame_is_one_view_with_its_normal_on_the_right():
    frames = turntable(plain("red", "green"), plain("blue", "white"))
    assert [frame.size for frame in frames] == [(8, 2)] * 2
    assert [frames[0].getpixel((x, 1)) for x in (0, 3, 4, 7)] == [(0, 0, 255)] * 2 + [(255, 0, 0)] * 2
    with pytest.raises(ValueError):
        turntable(plain("red"), [])


def test_the_object_is_centred_and_fills_three_quarters():
    picture = Image.new("RGBA", (100, 60), (0, 0, 0, 0))
    picture.paste((10, 20, 30, 255), (5, 7, 45, 27))  # 40 x 20, in a corner
    made = centre_object(picture, size=64)
    opaque = np.argwhere(np.asarray(made)[..., 3] > 127)
    (top, left), (bottom, right) = opaque.min(0), opaque.max(0) + 1
    assert (right - left, bottom - top) == (48, 24)
    assert (left, top) == ((64 - 48) // 2, (64 - 24) // 2)


def test_nothing_to_centre_and_a_share_outside_its_range_are_refused():
    with pytest.raises(ValueError, match="wholly transparent"):
        centre_object(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
    with pytest.raises(ValueError, match="`fill=0`"):
        centre_object(Image.new("RGBA", (8, 8)), fill=0)


def test_without_rembg_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs rembg and onnxruntime: pip install "rembg\[cpu\]"'):
        remove_background(Image.new("RGB", (4, 4)))


def test_rembg_gets_an_rgb_picture_and_its_session(monkeypatch):
    calls = []

    def remove(picture, session=None):
        calls.append((picture.mode, session))
        return Image.new("LA", picture.size)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(remove=remove))
    assert remove_background(Image.new("P", (4, 4)), session="isnet").mode == "RGBA"
    assert calls == [("RGB", "isnet")]
