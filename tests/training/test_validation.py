"""Straightness against a student whose bend is known, and the pictures of a run."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageFont

from closed_form import GaussianWorld
from perflow_diffusers import load_miniature
from perflow_diffusers.flow import NoisePath, Windows, coefficients
from perflow_training.teacher.backbone import Backbone
from perflow_training.validation import picture_grid, straightness

PATH = NoisePath.from_betas()
WORLD = GaussianWorld(PATH)
WINDOWS = Windows.uniform(4, 1000)


@pytest.mark.parametrize("prediction_type", ["ddim_eps", "diff_eps", "velocity"])
def test_an_ideal_student_is_straight(prediction_type):
    def predict(z, timestep):
        start, end = WINDOWS.of(timestep)
        return WORLD.student(z, timestep, start, end, prediction_type)

    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = straightness(predict, Backbone(None, PATH, "epsilon"), WINDOWS, prediction_type, noise)
    assert len(scores) == 4
    assert max(scores) < 1e-12


def test_the_score_is_the_share_of_the_velocity_that_varies():
    """Velocities 1 + d, 1 - d, 1 + d, 1 - d times one number: mean 1, score d^2."""
    seen = []

    def predict(z, timestep):
        seen.append(int(timestep[0]))
        return torch.full_like(z, 2.0 * (1.3 if len(seen) % 2 else 0.7))

    noise = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    scores = straightness(predict, Backbone(None, PATH, "epsilon"), WINDOWS, "velocity", noise)
    assert torch.allclose(torch.tensor(scores), torch.tensor(0.09))
    assert seen[:5] == [1000, 937, 875, 812, 750]
    assert float(coefficients(PATH, "velocity", 750, 500)[1]) == -0.25


def test_validation_pictures_of_every_pair_beside_the_teacher(run):
    out = run(
        "max_train_steps=2", "validation_steps=2", "validation_prompts=[a dog, a green hat]",
        "validation_samplings=[[4, 1], [5, 4]]", "validation_teacher_steps=3", "learning_rate=0.0",
    )  # fmt: skip
    with Image.open(out / "validation" / "step-000002.png") as grid:
        grid.load()
    assert grid.size[1] == 16 + 2 * 128  # enlarged by 4
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(lines[-1]["straightness"]) == 4
    pipe = load_miniature()  # learning rate 0: the teacher's column is drawn by the pipeline itself
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for guidance, left in ((1.0, 0), (4.0, 2 * 128)):  # each beside the student's column at its guidance
        picture = pipe("a green hat", latents=noise[1:], num_inference_steps=3, guidance_scale=guidance).images[0]
        drawn = grid.crop((left, 16 + 128, left + 128, 16 + 256))
        large = picture.resize((128, 128), Image.Resampling.NEAREST)
        assert list(drawn.get_flattened_data()) == list(large.get_flattened_data())
    assert not list(Path(out).glob("*.tmp"))


def test_validation_and_trackers_in_sixteen_bits_with_sdxl(run, tiny_sdxl, monkeypatch):
    sent = {}
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: sent.setdefault(step, {}).update(values))
    out = run(
        f"pretrained_model_name_or_path={tiny_sdxl}", "max_train_steps=1", "mixed_precision=bf16",
        "validation_steps=1", "validation_prompts=[a dog]", "validation_samplings=[[4, 2]]",
        "validation_teacher_steps=2",
    )  # fmt: skip
    with Image.open(out / "validation" / "step-000001.png") as grid:
        assert grid.size[1] == 16 + 128  # enlarged by 8
    assert all(isinstance(value, (int, float)) for value in sent[1].values())
    named = {"loss/window_1", "loss/window_4", "straightness/window_2", "grad_norm", "samples_per_second"}
    assert named <= set(sent[1])


def test_grid_has_a_column_a_name_and_a_row_a_prompt():
    """Wide pictures stand side by side; tall ones leave room for the names; small ones are enlarged without blur."""
    red, blue = Image.new("RGB", (140, 4), "red"), Image.new("RGB", (140, 4), "blue")
    grid = picture_grid({"a": [red, blue], "b": [blue, red]})
    assert grid.size == (280, 16 + 8)
    assert [grid.getpixel(place) for place in ((1, 18), (145, 18), (1, 22), (145, 22))] == [
        (255, 0, 0), (0, 0, 255), (0, 0, 255), (255, 0, 0),
    ]  # fmt: skip
    name = "teacher 25 @ 7.5 " * 3
    narrow = picture_grid({name: [red.crop((0, 0, 4, 4))], "8 @ 7.5": [red.crop((0, 0, 4, 4))]})
    second = round(ImageFont.load_default().getlength(name)) + 4
    red_columns = [x for x in range(130, narrow.width) if narrow.getpixel((x, 19)) == (255, 0, 0)]
    assert abs(red_columns[0] - second) <= 1 and narrow.height == 16 + 128
