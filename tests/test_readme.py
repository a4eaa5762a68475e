"""What the README and the recipe for threads promise runs, word for word, and its figures are the demo's."""

import copy
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import perflow_diffusers as pf
from perflow_diffusers.cli import app
from perflow_diffusers.demo import draw_rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_laptop_snippet_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "load_miniature" in code)
    exec(compile(snippet, "README.md", "exec"), {})
    with Image.open("four-steps.png") as picture:
        assert picture.size == (256, 256)


def test_the_commands_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = README.split("## At the terminal")[1].split("## ")[0]
    commands = [line.strip() for line in section.splitlines() if line.startswith("    perflow ")]
    assert len(commands) >= 4
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command, comments=True)[1:])
        assert result.exit_code == 0, (command, result.output)
    for made in ("a-person-with-red-hair.png", "comfy.safetensors", "lora/pytorch_lora_weights.safetensors"):
        assert (tmp_path / made).is_file()


def test_the_table_says_what_the_demo_draws():
    rows = {row.label: row for row in draw_rows(None, 8, 0) if row.label.startswith("base")}
    section = README.split("## What it gains")[1].split("## ")[0]
    told = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    assert len(told) == 5
    stock = min(
        (row for label, row in rows.items() if "PeRFlow" not in label and row.distance), key=lambda r: r.distance
    )
    drawn = (rows["base: 100 steps"], stock, rows["base: PeRFlow, 4 steps"], rows["base: PeRFlow, 8 steps"])
    for (name, steps, evaluations, error, _), row in zip(told[1:], drawn, strict=True):
        assert f"{steps} steps" in row.label and int(evaluations) == row.evaluations
        if row.distance is None:
            assert error == "the reference"
        else:
            assert name.split(",")[0] in row.label
            assert float(error) == pytest.approx(row.distance, abs=2e-3)


def test_the_tables_on_quality_are_those_of_the_last_run():
    printed = (ROOT / "benchmarks" / "results" / "miniature.md").read_text().splitlines()
    told = (ROOT / "docs" / "quality.md").read_text().splitlines()
    figures = [
        line for line in told if line.startswith(("| DDIM", "| Euler", "| DPM", "| UniPC", "| PeRFlow", "| base"))
    ]
    assert len(figures) > 30 and set(figures) <= set(printed)


@pytest.mark.parametrize(
    ("source", "picture", "page"),
    [
        (None, "", "quality"),
        (
            "https://example.org/me/x/",
            "![Avatars](https://example.org/me/x/raw/HEAD/docs/demo.png)",
            "[quality](https://example.org/me/x/blob/HEAD/docs/quality.md)",
        ),
    ],
)
def test_no_link_of_the_packages_description_leads_nowhere(source, picture, page):
    standalone = runpy.run_path(str(ROOT / "setup.py"))["standalone"]
    text = "![Avatars](docs/demo.png) [quality](docs/quality.md) [paper](https://arxiv.org/abs/2405.07510) [up](#top)"
    assert standalone(text, source) == f"{picture} {page} [paper](https://arxiv.org/abs/2405.07510) [up](#top)"


def test_a_pipeline_by_the_recipe_for_threads_shares_weights_and_nothing_that_a_call_changes():
    text = (ROOT / "docs" / "scheduler.md").read_text()
    recipe = re.search(r"```python\n(own = .*?)```", text, re.S)[1]
    pipe, prompt = pf.load_miniature(), "a happy person with red hair"
    pf.load_perflow(pipe, "miniature")
    pipe.set_progress_bar_config(disable=True)
    names = {"pf": pf, "copy": copy, "pipe": pipe, "prompt": prompt}
    exec(compile(recipe.replace("(**own)", "(**own, requires_safety_checker=False)"), "scheduler.md", "exec"), names)
    own = names["own"]
    for name in ("unet", "vae", "text_encoder"):
        assert getattr(own, name) is getattr(pipe, name)

    def meddle(module, args):
        """What another thread does that has come to its tokenizer and its scheduler."""
        pipe.tokenizer(prompt, padding="longest")
        pipe.scheduler.set_timesteps(8)

    wanted = pipe(prompt, num_inference_steps=4, guidance_scale=4.5, generator=torch.manual_seed(0), output_type="np")[
        0
    ]
    given = own.tokenizer(prompt, padding="max_length").input_ids
    pipe.tokenizer(prompt, padding="longest")
    assert own.tokenizer.backend_tokenizer.padding["length"] == len(given)  # the setting is the object's, not a call's
    handle = own.unet.register_forward_pre_hook(meddle)
    found = own(prompt, num_inference_steps=4, guidance_scale=4.5, generator=torch.manual_seed(0), output_type="np")[0]
    handle.remove()
    assert np.array_equal(found, wanted)


def test_both_commands_are_in_the_first_lines_and_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for command in ("demo", "test"):
        assert f"make {command}" in "\n".join(README.splitlines()[:10])
        assert re.search(rf"^{command}:", makefile, re.M)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
)
def test_every_file_that_a_page_links_to_exists(page):
    for link in re.findall(r"\]\((?!http)([^)#\s]+)[^)]*\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(link).exists(), link
