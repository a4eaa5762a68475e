"""What a visitor of the page does, in a real browser."""

import base64
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from app_server import Server
from PIL import Image, PngImagePlugin

TABS = ("Text to image", "Image to image", "Gallery", "Model")
SHOTS = os.environ.get("PERFLOW_SCREENSHOTS")  # a folder: the documents' pictures are those that the tests take


CONTRAST = (Path(__file__).parent / "contrast.js").read_text()


def shot(page, name):
    """Take a picture for the documents, which says the test that took it (`test_documents` looks for that)."""
    if SHOTS:
        taken, by = Image.open(io.BytesIO(page.screenshot(full_page=True))), PngImagePlugin.PngInfo()
        by.add_text("taken by", os.environ["PYTEST_CURRENT_TEST"].partition(" ")[0])
        taken.save(Path(SHOTS) / f"{name}.png", pnginfo=by, optimize=True)


def source(page, where="picture"):
    return page.locator(f"#{where} img").get_attribute("src")


def pixels(uri, side=32):
    """The picture's own pixels: the page enlarges by whole factors."""
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    factor = picture.width // side
    small = np.asarray(picture)[::factor, ::factor]
    assert (np.asarray(picture) == small.repeat(factor, 0).repeat(factor, 1)).all()
    return small


def settled(page, change):
    """Do something, and wait until all has been drawn anew: the strip of states comes last."""
    states = "Array.from(document.querySelectorAll('#states img')).map(i => i.src).join()"
    before = page.evaluate(states)
    change()
    page.wait_for_function(f"before => {states} !== before", arg=before, timeout=30_000)


def set_slider(page, name, value):
    field = page.locator(f"#{name} input[type=number]")
    field.fill(str(value))
    field.press("Enter")


def test_typing_changes_the_pictures_and_nothing_leaves_the_machine(server, window):
    page = window(server.address)
    before, stock = source(page), source(page, "stock-picture")
    box = page.locator("#prompt textarea")
    settled(page, lambda: box.fill("a sad person with a purple hat"))
    assert source(page) != before and source(page, "stock-picture") != stock
    facts = page.locator("#picture .facts").inner_text()
    assert re.fullmatch(r"4 network evaluations, \d+ ms", facts)
    assert page.locator("#stock-picture .facts").inner_text().startswith("8 network evaluations, ")
    assert page.locator("#states figure").count() == 4
    outside = [url for url in page.requests if not url.startswith((server.address, "data:", "blob:"))]
    assert outside == [] and page.faults == []
    shot(page, "page")


def test_the_words_that_no_picture_was_described_with_are_named(server, window):
    page = window(server.address)
    settled(page, lambda: page.locator("#prompt textarea").fill("a dragon with red hair"))
    assert page.locator("#note .message").inner_text().startswith('"dragon" is unknown to the avatars')
    shot(page, "unknown-word")


def test_strength_0_is_the_picture_without_the_accelerator_bit_for_bit(server, window):
    page = window(server.address)
    set_slider(page, "stock-guidance", 1)
    page.locator("#stock input").click()
    page.get_by_role("option", name="PeRFlow").click()
    settled(page, lambda: set_slider(page, "strength", 0))
    page.wait_for_timeout(500)
    assert (pixels(source(page)) == pixels(source(page, "stock-picture"))).all()
    shown = page.locator("#picture b").inner_text()
    assert shown == "PeRFlow, 4 steps, strength 0"
    settled(page, lambda: set_slider(page, "strength", 1))
    assert (pixels(source(page)) != pixels(source(page, "stock-picture"))).any()


def test_dragging_the_steps(server, window):
    page = window(server.address)
    settled(page, lambda: set_slider(page, "steps", 8))
    assert page.locator("#picture .facts").inner_text().startswith("8 network evaluations")
    handle = page.locator("#steps input[type=range]")
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.45, box["y"] + box["height"] / 2)
    page.mouse.down()
    for at in (0.3, 0.2, 0.1, 0.0):
        page.mouse.move(box["x"] + 2 + box["width"] * at, box["y"] + box["height"] / 2)
    page.mouse.up()
    page.wait_for_function("() => document.querySelector('#states').querySelectorAll('figure').length === 1")
    assert page.locator("#picture .facts").inner_text().startswith("1 network evaluation,")


def test_the_keyboard_alone(server, window):
    page = window(server.address)
    page.locator("#prompt textarea").focus()
    page.keyboard.press("Control+A")
    settled(page, lambda: page.keyboard.type("a person with glasses"))
    steps = page.locator("#steps input[type=range]")
    steps.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('#states').querySelectorAll('figure').length === 5")
    for tab in TABS:
        page.get_by_role("tab", name=tab).focus()
        page.keyboard.press("Enter")
        page.wait_for_function(
            "t => document.querySelector('[role=tab][aria-selected=true]').innerText === t", arg=tab
        )
        page.wait_for_timeout(300)  # the tab's sheet comes after it
        for control in page.locator("input:visible, textarea:visible, button:visible, canvas:visible").all():
            name = control.evaluate(
                "e => e.getAttribute('aria-label') || e.getAttribute('title') || (e.labels && e.labels.length && "
                "e.labels[0].innerText) || e.innerText || e.closest('label')?.innerText"
            )
            assert name, control.evaluate("e => e.outerHTML")


def test_a_broken_upload_is_said_in_words_and_breaks_nothing(server, window, tmp_path):
    page = window(server.address)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + b"nonsense" * 20)
    page.get_by_role("tab", name="Gallery").click()
    page.locator("#load-png input[type=file]").set_input_files(str(broken))
    page.wait_for_selector("#note .message.error")
    assert "no picture" in page.locator("#note").inner_text()
    shot(page, "broken-upload")
    settled(page, lambda: page.locator("#prompt textarea").fill("a person with a beard"))


def test_settings_travel_in_the_png(server, window, tmp_path):
    page = window(server.address)
    settled(page, lambda: set_slider(page, "steps", 6))
    settled(page, lambda: page.locator("#prompt textarea").fill("a person with a blue hat"))
    uri = source(page)
    saved = tmp_path / "saved.png"
    saved.write_bytes(base64.b64decode(uri.partition(",")[2]))
    with Image.open(saved) as picture:
        said = json.loads(picture.info["perflow"])["settings"]
    assert (said["prompt"], said["steps"], said["seed"]) == ("a person with a blue hat", 6, 0)
    other = window(server.address)
    other.get_by_role("tab", name="Gallery").click()
    settled(other, lambda: other.locator("#load-png input[type=file]").set_input_files(str(saved)))
    assert other.locator("#prompt textarea").input_value() == "a person with a blue hat"
    assert (pixels(source(other)) == pixels(uri)).all()
    assert other.locator("#shots img").count() >= 1
    shot(other, "gallery")


def test_image_to_image_from_an_upload(server, window, tmp_path):
    page = window(server.address)
    Image.new("RGB", (300, 200), (200, 40, 40)).save(tmp_path / "red.png")
    page.get_by_role("tab", name="Image to image").click()
    page.wait_for_selector("#note .message.error")  # nothing to begin from yet
    page.locator("#upload input[type=file]").set_input_files(str(tmp_path / "red.png"))
    page.wait_for_function("() => document.querySelector('#picture .facts').innerText.startsWith('2 network')")
    page.wait_for_timeout(2000)
    before = len(page.requests)
    page.wait_for_timeout(2000)
    assert len(page.requests) - before <= 3  # a picture that stands still is not sent again and again
    shot(page, "image-to-image")


def test_two_windows_draw_each_its_own(server, window):
    one, two = window(server.address), window(server.address)
    one.locator("#prompt textarea").fill("a person with green hair")
    two.locator("#prompt textarea").fill("a sad person with sunglasses")
    for page, prompt in ((one, "a person with green hair"), (two, "a sad person with sunglasses")):
        page.wait_for_function(
            "p => document.querySelector('#stock-picture img').alt.endsWith(p) && "
            "document.querySelector('#picture img').alt.endsWith(p)",
            arg=prompt,
            timeout=60_000,
        )


def test_fifty_key_strokes_leave_the_last_picture_soon(server, window):
    page = window(server.address)
    box = page.locator("#prompt textarea")
    text = "a happy person with short red hair and sunglasses "
    box.fill("")
    box.press_sequentially(text, delay=max(0, 100 - 10))
    page.wait_for_function("p => document.querySelector('#picture img').alt.endsWith(p)", arg=text, timeout=20_000)
    page.wait_for_function("p => document.querySelector('#stock-picture img').alt.endsWith(p)", arg=text)
    shown = source(page)
    page.wait_for_timeout(1500)
    assert source(page) == shown  # nothing older comes after


def test_a_server_that_goes_and_comes_back(window):
    first = Server()
    page = window(first.address)
    page.locator("#prompt textarea").fill("a person with pink hair")
    first.stop(kill=True)
    page.wait_for_selector("#lost:visible", timeout=20_000)
    shot(page, "server-gone")
    second = Server(port=first.port)
    try:
        page.wait_for_selector("#lost", state="hidden", timeout=60_000)
        page.wait_for_function(
            "() => document.querySelector('#picture img')?.alt.endsWith('a person with pink hair')", timeout=60_000
        )
    finally:
        second.stop()


def test_a_model_that_cannot_be_loaded(window):
    server = Server("--model", "no/such-folder-or-model", "--accelerator", "nothing")
    try:
        page = window(server.address, ready=False)
        page.wait_for_selector("#status .message.error", timeout=90_000)
        assert "no file or folder here" in page.locator("#status").inner_text()
        shot(page, "model-missing")
        page.get_by_role("tab", name="Model").click()
        page.locator("#model textarea, #model input").fill("miniature")
        page.get_by_role("button", name="Load", exact=True).click()
        page.wait_for_selector("#states .strip", timeout=60_000)
    finally:
        server.stop()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(server, window, scheme):
    page = window(server.address, viewport={"width": 375, "height": 760}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    width = page.locator("#picture img").bounding_box()["width"]
    assert width >= 256 and width % 32 == 0
    shot(page, f"phone-{scheme}")
    if scheme == "dark":
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, re.findall(r"\d+", back)[:3])) < 150


def test_the_dark_page(server, window):
    page = window(server.address, color_scheme="dark")
    shot(page, "page-dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_every_text_can_be_read_and_nothing_is_cut(server, window, scheme, width):
    """A contrast of 4.5 at least, as the Web Content Accessibility Guidelines (1.4.3, AA) ask for."""
    page = window(server.address, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.locator("#code summary").click()
    settled(page, lambda: page.locator("#prompt textarea").fill("a dragon with red hair"))
    for tab in TABS:
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        texts = page.evaluate(CONTRAST)
        assert len(texts) > 20 and [text for text in texts if text[0] < 4.5] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#note .message.error").count() == 1  # there is no picture to begin from; it was read, too


@pytest.mark.parametrize("ratio", [1, 1.5, 2])
def test_pictures_are_enlarged_by_whole_pixels_of_the_screen_and_stay_sharp(server, window, ratio):
    page = window(server.address, device_scale_factor=ratio)
    for place in ("#picture img.frame", "#stock-picture img.frame", ".curtain .over"):
        image = page.locator(place)
        assert image.evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"
        side = image.evaluate("e => e.getBoundingClientRect().width") * ratio
        assert side >= 256 * ratio and side / 32 == pytest.approx(round(side / 32), abs=0.01)


def test_before_and_after(server, window):
    page = window(server.address)
    assert page.locator(".curtain .over").get_attribute("src") == source(page)
    assert page.locator(".curtain .frame:not(.over)").get_attribute("src") == source(page, "stock-picture")
    page.locator(".curtain input").focus()
    for key, hidden in (("Home", "100%"), ("End", "0%"), ("ArrowLeft", "1%")):
        page.keyboard.press(key)
        clip = page.locator(".curtain .over").evaluate("e => getComputedStyle(e).clipPath")
        assert clip in (f"inset(0px {hidden} 0px 0px)", "inset(0px)" if hidden == "0%" else "")


def test_the_python_that_is_shown_draws_what_is_shown(server, window, tmp_path, monkeypatch):
    page = window(server.address)
    settled(page, lambda: set_slider(page, "steps", 5))
    page.locator("#code summary").click()
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the page's server draws the miniature
    try:
        exec(compile(page.locator("#code code").inner_text(), "page", "exec"), {"__name__": "__main__"})
    finally:
        torch.set_num_threads(threads)
    assert (np.asarray(Image.open("picture.png")) == pixels(source(page))).all()


def test_seeds_suggestions_and_what_the_sliders_go_to(server, window):
    page = window(server.address)
    for name, (low, high) in {"steps": ("1", "16"), "strength": ("0", "1.5")}.items():
        slider = page.locator(f"#{name} input[type=range]")
        assert (slider.get_attribute("min"), slider.get_attribute("max")) == (low, high)
    first = source(page)
    settled(page, lambda: page.get_by_role("button", name="New seed").click())
    assert source(page) != first and page.locator("#seed input").input_value() != "0"
    settled(page, lambda: set_slider(page, "seed", 0))
    assert (pixels(source(page)) == pixels(first)).all()
    prompt = page.locator("#prompt textarea").input_value()
    settled(page, lambda: page.get_by_role("button", name="Suggest one").click())
    assert page.locator("#prompt textarea").input_value() != prompt


def test_drawing_a_picture_to_begin_from(server, window):
    page = window(server.address)
    page.get_by_role("tab", name="Image to image").click()
    at = "([x, y]) => [...document.querySelector('#upload canvas').getContext('2d').getImageData(x, y, 1, 1).data]"
    box = page.locator("#upload canvas").bounding_box()
    page.locator("#brush-colour").fill("#2050c0")

    def stroke(y):
        page.mouse.move(box["x"] + 40, box["y"] + y)
        page.mouse.down()
        page.mouse.move(box["x"] + 200, box["y"] + y, steps=8)
        page.mouse.up()

    settled(page, lambda: stroke(60))
    assert page.evaluate(at, [120, 60]) == [0x20, 0x50, 0xC0, 255]
    assert page.evaluate(at, [120, 200]) == [255, 255, 255, 255]
    assert page.locator("#picture .facts").inner_text().startswith("2 network evaluations")  # 0.7 of 4 steps
    settled(page, lambda: stroke(200))
    assert page.evaluate(at, [120, 200]) == [0x20, 0x50, 0xC0, 255]
    settled(page, lambda: page.get_by_role("button", name="Undo").click())
    assert page.evaluate(at, [120, 200]) == [255, 255, 255, 255]


def test_a_window_that_is_closed_says_so(server, window):
    page = window(server.address)
    page.evaluate("navigator.sendBeacon = (address) => localStorage.setItem('said', address)")
    page.goto(server.address + "perflow/status")  # of the same origin, so that it can be read
    said = page.evaluate("localStorage.getItem('said')")
    assert re.fullmatch(re.escape(server.address) + r"perflow/leave\?window=[0-9a-f]{32}", said)
