"""`perflow draw` and what stands around every command."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from perflow_diffusers import __version__, load_miniature, load_perflow
from perflow_diffusers.app.pictures import from_png
from perflow_diffusers.cli import app
from perflow_diffusers.miniature import miniature_folder, unknown_words


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    return CliRunner().invoke(app, list(words))


def test_draw_writes_the_picture_of_the_library_and_overwrites_nothing(here):
    torch.set_num_threads(1)
    for expected in ("a-person-with-red-hair.png", "a-person-with-red-hair-2.png"):
        result = run("draw", "A person with red hair", "--seed", "3")
        assert (result.exit_code, result.stdout, result.stderr) == (0, expected + "\n", "")
    pipe = load_miniature()
    pipe.set_progress_bar_config(disable=True)
    load_perflow(pipe, "miniature")
    picture = pipe(
        "A person with red hair", num_inference_steps=4, guidance_scale=1.0, generator=torch.Generator().manual_seed(3)
    ).images[0]
    drawn = np.asarray(Image.open("a-person-with-red-hair.png"))
    assert (drawn == np.asarray(picture).repeat(8, 0).repeat(8, 1)).all()
    assert from_png((here / "a-person-with-red-hair-2.png").read_bytes()).seed == 3
    assert sorted(path.name for path in here.iterdir()) == [
        "a-person-with-red-hair-2.png",
        "a-person-with-red-hair.png",
    ]


def test_several_pictures_have_seeds_one_after_another(here):
    result = run("draw", "a person", "--n", "3", "--seed", "5", "--steps", "2", "--out", "x.png")
    names = result.stdout.split()
    assert names == ["x.png", "x-2.png", "x-3.png"]
    assert [from_png((here / name).read_bytes()).seed for name in names] == [5, 6, 7]


def test_unknown_words_are_named():
    result = run("draw", "a dragon", "--steps", "1")
    assert result.stdout == "a-dragon.png\n"
    assert result.stderr.startswith('perflow draw: note: "dragon" is unknown to the avatars')
    assert unknown_words("A person, wearing RED hair; and a beard!") == []
    assert unknown_words("orange dragon's hat") == ["dragon's"]
    assert unknown_words("an orange hat", "disco") == ["orange"]  # a colour that only the avatars have


@pytest.mark.parametrize(
    "words, said",
    [
        (["  "], "empty"),
        (["x", "--out", "x.jpg"], ".png"),
        (["x", "--out", "no/x.png"], "does not exist"),
        (["x", "--out", "there.png"], "exists already"),
        (["x", "--model", "/no/model"], "does not exist"),
        (["x", "--device", "warp", "--model", "some/model"], "is not there"),
    ],
)
def test_what_cannot_be_drawn_is_said_and_nothing_is_written(here, words, said):
    (here / "there.png").write_bytes(b"mine")
    result = run("draw", *words)
    assert result.exit_code == 2 and said in result.stderr and result.stdout == ""
    assert [(p.name, p.read_bytes()) for p in here.iterdir()] == [("there.png", b"mine")]


def test_version_short_help_and_module():
    for words in (["--version"], ["-h"], ["draw", "-h"], ["merge", "-h"]):
        assert run(*words).exit_code == 0
    out = subprocess.run([sys.executable, "-m", "perflow_diffusers", "--version"], capture_output=True, text=True)
    assert (out.stdout, out.stderr) == (f"perflow-diffusers {__version__}\n", "")


def test_going_back_to_a_stock_scheduler_says_nothing():
    """diffusers names attributes of a config that a scheduler does not know."""
    code = (
        "import sys, perflow_diffusers as pf; from diffusers import DDIMScheduler, EulerDiscreteScheduler; "
        "pipe = pf.load_miniature(); pf.load_perflow(pipe, 'miniature'); print('loaded', file=sys.stderr); "
        "[kind.from_config(pipe.scheduler.config) for kind in (DDIMScheduler, EulerDiscreteScheduler)]; "
        "pf.unload_perflow(pipe)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout == ""
    assert len(out.stderr.splitlines()) == 2 and out.stderr.endswith("\nloaded\n")  # one line on steps and guidance


def test_another_model_and_accelerator_are_drawn_with(here):
    load_miniature("disco").save_pretrained(here / "mine")
    delta = miniature_folder() / "delta" / "perflow.safetensors"
    result = run("draw", "a person", "--model", "mine", "--accelerator", str(delta), "--seed", "4", "--device", "cpu")
    assert (result.exit_code, result.stdout) == (0, "a-person.png\n"), result.output
    pipe = load_miniature("disco")
    pipe.set_progress_bar_config(disable=True)
    load_perflow(pipe, "miniature")
    picture = pipe(
        "a person", num_inference_steps=4, guidance_scale=1.0, generator=torch.Generator().manual_seed(4)
    ).images[0]
    drawn = np.asarray(Image.open("a-person.png"))[::8, ::8]
    assert np.abs(drawn.astype(int) - np.asarray(picture).astype(int)).max() <= 1  # of other numbers of threads


def test_loading_the_miniature_says_nothing():
    code = "import perflow_diffusers as pf; pf.load_miniature(); pf.load_miniature('disco')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (out.stdout, out.stderr) == ("", "")
