"""The command `perflow`, run as a user runs it."""

import os

import pytest
from PIL import Image
from typer.testing import CliRunner

from perflow_diffusers.cli import app
from perflow_diffusers.demo import HEADER, LABEL


def demo(*words):
    return CliRunner().invoke(app, ["demo", *map(str, words)])


def test_demo_draws_the_prompts_asked_for(tmp_path):
    out = tmp_path / "picture.png"
    result = demo("a person with red hair and glasses", "--out", out)
    assert result.exit_code == 0, result.output
    rows = 6 + 3  # base: 100, three stock, PeRFlow at 4 and 8; fine-tuned: 100, one stock, PeRFlow at 4
    with Image.open(out) as picture:
        assert picture.size == (LABEL + 132, rows * 132 + 2 * HEADER)
    assert os.listdir(tmp_path) == ["picture.png"]
    line = next(line for line in result.output.splitlines() if line.startswith("base: PeRFlow, 4 steps "))
    assert line.split()[4] == "4"  # one network evaluation a step


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([""], "A prompt is empty"),
        (["   "], "A prompt is empty"),
        (["a" * 10_000], "A prompt of 10000 characters"),
        (["a person", "--out", "/no/such/folder/x.png"], "does not exist"),
        (["a person", "--out", "picture.txt"], "is not a .png file"),
        (["a person", "--out", "/proc/x.png"], "cannot be written"),
        (["--columns", "0"], "columns"),
    ],
)
def test_what_cannot_work_is_said_and_nothing_is_written(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = demo(*words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert os.listdir(tmp_path) == []


def test_an_old_picture_stays_when_the_prompt_is_refused(tmp_path):
    out = tmp_path / "old.png"
    out.write_bytes(b"old")
    assert demo("", "--out", out).exit_code == 2
    assert out.read_bytes() == b"old"


def test_help_teaches():
    text = " ".join(CliRunner().invoke(app, ["demo", "--help"]).output.split())
    assert "perflow demo" in text and "--seed" in text
