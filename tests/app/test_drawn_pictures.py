"""Settings in PNGs, of this page and of others; uploads; settings that nothing can be drawn with."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from perflow_diffusers.app.pictures import PictureError, check_upload, enlarge, from_png, to_png
from perflow_diffusers.app.settings import Settings, SettingsError
from perflow_diffusers.app.studio import Studio

PROMPT = "a happy person with red hair and glasses"


@pytest.fixture(scope="module")
def studio():
    return Studio.miniature()


def same(one, other):
    return (np.asarray(one) == np.asarray(other)).all()


def test_settings_travel_in_a_png(studio):
    settings = Settings(
        "a person, with: a “hat”\nand more", negative_prompt="sad", seed=2**32 - 1, steps=7, strength=0.5
    )
    picture = studio.draw(Settings(PROMPT)).picture
    png = to_png(enlarge(picture), settings, studio.about)
    opened = Image.open(io.BytesIO(png))
    assert from_png(png) == settings and opened.size == (256, 256)
    assert same(np.asarray(opened)[::8, ::8], picture)
    lines = opened.info["parameters"].split("\n")
    assert lines[0] == "a person, with: a “hat” and more" and lines[1] == "Negative prompt: sad"
    assert lines[2].startswith(
        "Steps: 7, Sampler: PeRFlow, CFG scale: 1, Seed: 4294967295, Size: 256x256, Model: avatars"
    )


def _png(**texts):
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def test_settings_of_another_tool():
    text = "a cat\non a mat\nNegative prompt: dog\nSteps: 30, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x512"
    settings = from_png(_png(parameters=text))
    assert (settings.prompt, settings.negative_prompt, settings.seed) == ("a cat\non a mat", "dog", 42)
    assert (settings.steps, settings.guidance_scale) == (4, 1.0)  # of Euler, not of ours


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "no picture"),
        (b"\x89PNG\r\n\x1a\nnonsense", "no picture"),
        (_png(), "carries no settings"),
        (_png(perflow="{"), "damaged"),
        (_png(perflow="[]"), "damaged"),
        (_png(perflow='{"settings": {"prompt": "x", "steps": "4"}}'), "whole number"),
        (_png(perflow='{"settings": {"prompt": "x", "evil": 1}}'), "unknown"),
        (_png(perflow='{"settings": {"steps": 4}}'), "no prompt"),
        (_png(perflow="[" * 90_000), "damaged"),
        (_png(perflow="{}")[:-30], "no picture|damaged"),
        (b"x" * (20 * 2**20 + 1), "MB"),
    ],
)
def test_pngs_that_carry_no_settings(data, said):
    with pytest.raises((PictureError, SettingsError), match=said):
        from_png(data)


def test_uploads_are_checked_and_put_upright():
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.new("L", (40, 20), 128).save(out, "JPEG", exif=exif)
    picture = check_upload(out.getvalue())
    assert picture.size == (20, 40) and picture.mode == "RGB"
    noise = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(noise, "JPEG")
    with pytest.raises(PictureError, match="damaged"):
        check_upload(noise.getvalue()[: len(noise.getvalue()) // 2])
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    with pytest.raises(PictureError, match="40 million pixels"):
        check_upload(bomb.getvalue())
    gif = io.BytesIO()
    Image.new("P", (8, 8)).save(gif, "GIF")
    with pytest.raises(PictureError, match="no picture that can be read"):
        check_upload(gif.getvalue())


@pytest.mark.parametrize(
    "values, said",
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 17}, "1 to 16"),
        ({"steps": True}, "steps=True"),
        ({"seed": -1}, "seed"),
        ({"accelerator_scale": 1.6}, "0 to 1.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"stock": "Magic"}, "DPM-Solver"),
        ({"strength": 0.1}, "skipped"),
        ({"width": 100}, "multiple of 8"),
        ({"prompt": "x" * 2001}, "2000"),
    ],
)
def test_settings_that_nothing_can_be_drawn_with(values, said):
    with pytest.raises(SettingsError, match=said):
        Settings(**{"prompt": "a person", **values})
