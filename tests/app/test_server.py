"""The server: to whom it listens, and that it tells nobody anything."""

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from app_server import Server

pytest.importorskip("gradio", reason='the page needs Gradio: pip install -e ".[app]"')

from perflow_diffusers.app import page, room, server
from perflow_diffusers.app.desk import Desk
from perflow_diffusers.app.hosts import LOOPBACK
from perflow_diffusers.app.live import NAMES, Live
from perflow_diffusers.app.pictures import MAX_BYTES
from perflow_diffusers.app.settings import Settings

# Every name that is looked up and every address that is connected to, a line each; in a process of its own.
RECORDER = """
import sys
def note(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
        where = args[0] if event.startswith("socket.get") else args[1]
        where = where[0] if isinstance(where, tuple) else where
        with open({path!r}, "a") as out:
            out.write(str(where.decode() if isinstance(where, bytes) else where) + "\\n")
sys.addaudithook(note)
"""


@pytest.fixture
def asked_for(tmp_path, monkeypatch):
    """What the processes of this test ask a network for."""
    path = tmp_path / "asked.txt"
    (tmp_path / "sitecustomize.py").write_text(RECORDER.format(path=str(path)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(":"))
    return lambda: path.read_text().split() if path.exists() else []


def test_a_process_that_asks_for_something_is_seen(asked_for):
    code = "import socket; s = socket.socket(); s.settimeout(0.01); s.connect_ex(('192.0.2.1', 9))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert asked_for() == ["192.0.2.1"]


def test_the_server_asks_no_other_machine_for_anything(asked_for, monkeypatch):
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    running = Server()
    try:
        urllib.request.urlopen(running.address, timeout=30).read()
        values = Settings("a person").to_dict() | {"strength": 0.7}
        wish = {"window": "1" * 32, "number": 1, "values": [values[name] for name in NAMES]}
        for number in range(100):
            request = urllib.request.Request(
                running.address + "perflow/draw",
                json.dumps({**wish, "number": number}).encode(),
                {"content-type": "application/json"},
            )
            said = urllib.request.urlopen(request, timeout=60).read()
            if b"picture" in said:
                break
            time.sleep(0.1)  # the model is not there yet
        assert b"picture" in said
        time.sleep(1)  # what is reported in threads is reported by now
    finally:
        running.stop()
    asked = asked_for()
    assert asked and set(asked) <= {*LOOPBACK, "0.0.0.0", "None"}


@pytest.mark.parametrize(
    ("options", "address", "may_open"),
    [
        ({}, ("127.0.0.1", False), True),
        ({"host": "localhost"}, ("localhost", False), True),
        ({"host": "0.0.0.0"}, ("0.0.0.0", False), False),
        ({"share": True}, ("127.0.0.1", True), False),
    ],
)
def test_what_gradio_is_asked_for(options, address, may_open, monkeypatch):
    """Models are opened by people at this machine alone, and nobody is let in from elsewhere unasked."""

    class NoRoom:
        studio = None

        def __init__(self, **options):
            pass

        def open(self, *words):
            pass

        def close(self):
            pass

    class NoPage:
        def __init__(self, may_open):
            self.may_open = may_open

        def launch(self, **given):
            asked.update(given, page=self)

        def block_thread(self):
            pass

        def close(self, verbose):
            pass

    asked, told = {}, []
    monkeypatch.setattr(room, "Room", NoRoom)
    monkeypatch.setattr(page, "build", NoPage)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    server.serve(tell=told.append, browser=False, **options)
    assert (asked["server_name"], asked["share"]) == address and asked["inbrowser"] is False
    assert asked["max_file_size"] == MAX_BYTES and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    routes = {route.endpoint.__self__.may_open for route in asked["app_kwargs"]["routes"]}
    assert routes == {asked["page"].may_open} == {may_open}
    assert len(told) == 1 and str(asked["server_port"]) in told[0]


def test_a_reader_that_hangs_up_frees_its_place():
    """The answer is closed before its end, as a server does when the window is gone."""

    class Place:
        studio, desk = None, Desk()

    def endless(cancelled):
        yield ("failed", "begun")
        while not cancelled(1, 2):
            time.sleep(0.001)
        yield ("failed", "never")

    async def read():
        live = Live(Place())
        live._newest["window"] = 1
        ticket = Place.desk.submit("window", endless)
        answer = live._answer("window", 1, ticket, False)
        assert json.loads(await anext(answer))["text"] == "begun"
        await answer.aclose()
        return ticket

    with ThreadPoolExecutor(1) as other:  # the browser's tests have a loop in this one
        ticket = other.submit(asyncio.run, read()).result(60)
    assert list(ticket)[-1] == ("superseded", None) or ticket.gone
    for _ in range(1000):
        if not Place.desk.behind("window"):
            break
        time.sleep(0.005)
    assert Place.desk.behind("window") == 0
    Place.desk.close()
