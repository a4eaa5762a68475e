"""The command `perflow app` before there is a page."""

import socket
import sys

import pytest
from typer.testing import CliRunner

from perflow_diffusers.app import server
from perflow_diffusers.cli import app


def run(*words):
    result = CliRunner().invoke(app, ["app", "--no-browser", *words])
    assert "Traceback" not in result.output
    return result, " ".join(result.output.split())


def test_without_gradio_the_way_out_is_said(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("perflow_diffusers.app.") and "server" not in name]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(f"perflow_diffusers.app.{name.rpartition('.')[2]}")  # both come back: there are not two
    monkeypatch.setitem(sys.modules, "gradio", None)  # what Python does where it is not installed
    result, said = run()
    assert result.exit_code == 2
    assert said == 'perflow app: The page needs Gradio. Install it with: pip install "perflow-diffusers[app]"'


def test_a_busy_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result, said = run("--port", str(port))
    assert result.exit_code == 2 and f"The port {port} of 127.0.0.1 cannot be had" in said and "--port" in said


def test_the_next_free_port_is_taken(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(server, "FIRST_PORT", port)
        monkeypatch.setattr(server, "LAST_PORT", port + 50)
        assert port < server.free_port("127.0.0.1", None) <= port + 50


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False), ("localhost", False)])
def test_an_open_address_is_warned_of(host, warned, monkeypatch):
    seen = {}
    monkeypatch.setattr(server, "serve", lambda *words, **options: seen.update(options))
    result, said = run("--host", host)
    assert result.exit_code == 0 and (seen["host"], seen["share"], seen["browser"]) == (host, False, False)
    assert ("can use this page" in said) == warned


def test_unasked_it_serves_this_machine_alone_and_opens_a_browser(monkeypatch):
    seen = {}
    monkeypatch.setattr(server, "serve", lambda *words, **options: seen.update(options, words=words))
    assert CliRunner().invoke(app, ["app"]).exit_code == 0
    assert (seen["host"], seen["port"], seen["share"], seen["browser"]) == ("127.0.0.1", None, False, True)
    assert seen["words"] == ("miniature", None)
    assert CliRunner().invoke(app, ["app", "--share", "--no-browser", "--port", "8000"]).exit_code == 0
    assert (seen["port"], seen["share"], seen["browser"]) == (8000, True, False)


def test_an_address_of_another_machine_is_refused():
    result, said = run("--host", "192.0.2.1")
    assert result.exit_code == 2 and "of 192.0.2.1 cannot be had" in said
