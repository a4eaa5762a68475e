"""The routes that the page draws through, asked directly: order, places, limits, and who may ask."""

import base64
import io
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason='the page needs Gradio: pip install -e ".[app]"')
from starlette.applications import Starlette
from starlette.testclient import TestClient

from perflow_diffusers import load_miniature, load_perflow
from perflow_diffusers.app import desk
from perflow_diffusers.app.live import NAMES, Live
from perflow_diffusers.app.pictures import MAX_BYTES, to_png
from perflow_diffusers.app.room import Room
from perflow_diffusers.app.settings import Settings

ONE, TWO = "1" * 32, "2" * 32


@pytest.fixture(scope="module")
def room():
    room = Room()
    list(room.open("miniature", None))
    yield room
    room.close()


@pytest.fixture
def client(room):
    with TestClient(Starlette(routes=Live(room).routes()), base_url="http://127.0.0.1:7860") as client:
        yield client


def values(**changed):
    wanted = {**Settings("a person", steps=4, guidance_scale=1.0, stock_steps=2).to_dict(), "strength": 0.7, **changed}
    return [wanted[name] for name in NAMES]


def wish(client, window=ONE, number=1, mode="text", **changed):
    said = {"window": window, "number": number, "mode": mode, "values": values(**changed)}
    answer = client.post("/perflow/draw", json=said)
    assert answer.status_code == 200
    return [json.loads(line) for line in answer.text.splitlines()]


def png(size=(40, 30), colour="red"):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def test_a_wish_is_answered_by_picture_comparison_and_states(client):
    kinds = [event["kind"] for event in wish(client)]
    assert kinds == ["picture", "comparison", "states"]
    assert wish(client, number=2)[0]["note"] == ""
    assert '"dragon" is unknown' in wish(client, number=3, prompt="a dragon")[0]["note"]
    assert "Guidance 7.5 is far from 1" in wish(client, number=4, guidance_scale=7.5)[0]["note"]


def test_a_wish_that_was_overtaken_is_not_drawn(client):
    assert wish(client, number=5)[0]["kind"] == "picture"
    assert wish(client, number=5) == wish(client, number=4) == [{"kind": "superseded"}]
    assert wish(client, window=TWO, number=1)[0]["kind"] == "picture"  # each window counts for itself


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ({"window": "x", "number": 1, "values": values()}, "none of this page's"),
        ({"window": ONE, "number": "1", "values": values()}, "none of this page's"),
        ({"window": ONE, "number": 90, "values": []}, "another version"),
        ({"window": ONE, "number": 91, "values": values(steps=0)}, "steps"),
        ({"window": ONE, "number": 92, "values": values(stock="Nothing")}, "Nothing"),
        ({"window": TWO * 1, "number": 93, "mode": "image", "values": values()}, "to begin from"),
    ],
)
def test_what_cannot_be_drawn_is_a_sentence(client, said, answer):
    events = [json.loads(line) for line in client.post("/perflow/draw", json=said).text.splitlines()]
    assert [event["kind"] for event in events] == ["failed"] and answer in events[0]["text"]


def test_other_sites_and_other_forms_are_refused(client):
    said = json.dumps({"window": ONE, "number": 1, "values": values()})
    json_type = {"content-type": "application/json"}
    for origin in ("http://evil.example", "http://127.0.0.1:7861", "null"):
        for path in ("draw", "open", "image", "settings", "leave"):
            answer = client.post(
                f"/perflow/{path}?window={ONE}", content=said, headers={**json_type, "origin": origin}
            )
            assert answer.status_code == 403, (origin, path)
    own = {**json_type, "origin": "http://127.0.0.1:7860"}
    assert client.post("/perflow/draw", content=said, headers=own).status_code == 200
    # what a form of another site can send without asking
    assert client.post("/perflow/draw", content=said, headers={"content-type": "text/plain"}).status_code == 415
    for broken in (b"", b"[1]", b"{", b"\xff", b"[" * 100_000, b'"' + b"x" * 200_000 + b'"'):
        assert client.post("/perflow/draw", content=broken, headers=json_type).status_code == 400


def test_a_picture_to_begin_from_is_the_windows_own(client):
    answer = client.post(f"/perflow/image?window={ONE}", content=png())
    kept = Image.open(io.BytesIO(answer.content))
    assert kept.size == (256, 256) and kept.getpixel((128, 128)) == (255, 0, 0)
    assert wish(client, number=20, mode="image")[0]["kind"] == "picture"
    assert wish(client, window=TWO, number=20, mode="image")[0]["kind"] == "failed"
    assert client.post(f"/perflow/leave?window={ONE}").status_code == 204
    assert wish(client, number=21, mode="image")[0]["kind"] == "failed"  # it went with its window
    for data, said in ((b"no picture", "no picture that can be read"), (b"x" * (MAX_BYTES + 1), "larger than")):
        answer = client.post(f"/perflow/image?window={ONE}", content=data)
        assert answer.status_code == 400 and said in answer.json()["text"]


def test_settings_come_back_from_a_png(client):
    settings = Settings("a sad person", seed=9, steps=6, guidance_scale=1.5)
    data = to_png(Image.new("RGB", (8, 8)), settings, {})
    back = dict(zip(NAMES, client.post("/perflow/settings", content=data).json()["values"], strict=True))
    assert (back["prompt"], back["seed"], back["steps"], back["guidance_scale"]) == ("a sad person", 9, 6, 1.5)
    assert client.post("/perflow/settings", content=png()).status_code == 400


def test_loading_says_how_far_it_is_and_an_error_leaves_the_model_that_is_there(room, client, monkeypatch):
    told, go = threading.Event(), threading.Event()

    def slow(model, accelerator, progress, **options):
        progress(f"Loading {model} (float32, cpu)")
        told.set()
        go.wait(30)
        raise ValueError(f"{model} does not exist.")

    monkeypatch.setattr("perflow_diffusers.app.room.open_studio", slow)
    assert client.post("/perflow/open", json={"model": "mine", "accelerator": ""}).status_code == 200
    told.wait(30)
    said = client.get("/perflow/status").json()
    assert (said["state"], said["text"]) == ("opening", "Loading mine (float32, cpu) ...")
    go.set()
    kinds = [event["kind"] for event in wish(client, window="c" * 32, number=1)]
    said = client.get("/perflow/status").json()
    assert (said["state"], said["text"]) == ("failed", "mine does not exist.")
    assert kinds[0] == "picture" and said["about"].startswith("avatars")
    room.back()


def test_visitors_from_elsewhere_open_no_models(room):
    with TestClient(Starlette(routes=Live(room, may_open=False).routes())) as client:
        answer = client.post("/perflow/open", json={"model": "disco", "accelerator": "miniature"})
        assert answer.status_code == 400 and "where the server runs" in answer.json()["text"]
    for address in ("http://rebound.example:7860", "http://127.0.0.1.example:7860"):
        with TestClient(Starlette(routes=Live(room).routes()), base_url=address) as client:
            assert client.post("/perflow/open", json={"model": "disco"}).status_code == 400
    assert room.studio.model == "avatars"


def test_windows_beyond_the_limit_are_told_to_come_back(room, monkeypatch):
    """Places are freed by leaving: the next window is taken again."""
    monkeypatch.setattr(desk, "MAX_WINDOWS", 2)
    hold, held = threading.Event(), threading.Event()

    def slow(cancelled):
        held.set()
        hold.wait(30)
        yield ("done", None)

    with TestClient(Starlette(routes=Live(room).routes())) as client:
        first = room.desk.submit("first", slow)
        held.wait(30)
        waiting = [room.desk.submit(name, slow) for name in ("second", "third")]
        refused = wish(client, window="a" * 32, number=1)
        assert refused[0]["kind"] == "failed" and "2 windows wait" in refused[0]["text"]
        room.desk.leave("second")
        answers = []
        last = threading.Thread(target=lambda: answers.extend(wish(client, window="b" * 32, number=1)))
        last.start()
        hold.set()
        last.join(30)
        assert [event["kind"] for event in answers] == ["picture", "comparison", "states"]
        assert list(first) == [("done", None)] and list(waiting[0]) == [("superseded", None)]


def test_the_page_and_the_library_draw_the_same_pixels(client):
    event = wish(client, number=40, seed=11)[0]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(event["png"]))).convert("RGB"))
    pipe = load_miniature()
    pipe.set_progress_bar_config(disable=True)
    load_perflow(pipe, "miniature")
    generator = torch.Generator().manual_seed(11)
    plain = pipe("a person", num_inference_steps=4, guidance_scale=1.0, generator=generator).images[0]
    assert np.array_equal(shown, np.asarray(plain))
