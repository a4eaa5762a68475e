"""The command `perflow`, run as a user runs it."""

import os

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from perflow_diffusers.cli import app
from perflow_diffusers.demo import HEADER, LABEL, draw_rows
from perflow_diffusers.miniature import load_miniature


def demo(*words):
    return CliRunner().invoke(app, ["demo", *map(str, words)])


def test_demo_draws_the_prompts_asked_for(tmp_path):
    out = tmp_path / "picture.png"
    result = demo("a person with red hair and glasses", "--out", out)
    assert result.exit_code == 0, result.output
    rows = 6 + 3  # base: 100, three stock, PeRFlow at 4 and 8; fine-tuned: 100, one stock, PeRFlow at 4
    with Image.open(out) as picture:
        assert picture.size == (LABEL + 132, rows * 132 + HEADER)  # one header: all rows draw the same prompt
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


def test_every_row_draws_what_was_typed():
    """The fine-tuned rows, too, beside a call of plain diffusers."""
    prompt = "a person with a beard"
    rows = draw_rows([prompt], 8, seed=3)
    assert {row.prompts for row in rows} == {(prompt,)}
    pipe = load_miniature("disco")
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = pipe([prompt], num_inference_steps=100, guidance_scale=7.5, latents=latents, output_type="pt").images
    torch.set_num_threads(threads)
    got = next(row for row in rows if row.label == "fine-tuned: 100 steps")
    assert torch.equal(got.pictures, expected)
    last = next(row for row in rows if row.label == "fine-tuned: PeRFlow, 4 steps")
    assert last.distance == pytest.approx(float(((last.pictures - expected) * 2).square().mean()), rel=1e-5)


def test_words_that_no_picture_had_are_named(tmp_path):
    result = demo("a person with red hair and a dragon", "--out", tmp_path / "x.png")
    assert result.exit_code == 0
    assert result.output.count('"dragon" is unknown') == 1
    assert "unknown" not in demo("a person with red hair", "--out", tmp_path / "x.png").output


def test_the_table_fits_a_terminal_and_says_what_it_measures(tmp_path):
    lines = demo("a person", "a happy person", "--out", tmp_path / "x.png").output.splitlines()
    assert max(len(line) for line in lines if "x.png" not in line) <= 80
    assert "ms a picture: of one core, in a batch of 2, text encoder and VAE included." in lines


def test_help_teaches():
    text = " ".join(CliRunner().invoke(app, ["demo", "--help"]).output.split())
    assert "perflow demo" in text and "--seed" in text
