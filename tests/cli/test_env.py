"""`perflow env`: what a report of a fault needs, and nothing that is private."""

import getpass
from importlib import metadata
from pathlib import Path

from typer.testing import CliRunner

from perflow_diffusers.cli import app


def test_versions_and_devices_are_said_without_anything_private(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0
    said = dict(line.split("  ", 1) for line in result.output.splitlines())
    said = {name.strip(): value.strip() for name, value in said.items()}
    for name in ("torch", "diffusers", "transformers", "safetensors", "peft"):
        assert said[name] == metadata.version(name)
    assert said["HF_HUB_OFFLINE"] == "1" and "cpu (" in said["devices"]
    private = ("hf_secret", str(Path.home()), str(Path.cwd()), *({getpass.getuser()} - {"root"}))
    assert not [text for text in private if text in result.output]
