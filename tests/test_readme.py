"""What the README and the recipe for threads promise runs, word for word."""

import copy
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import perflow_diffusers as pf

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_laptop_snippet_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "load_miniature" in code)
    exec(compile(snippet, "README.md", "exec"), {})
    with Image.open("four-steps.png") as picture:
        assert picture.size == (256, 256)


def test_a_pipeline_by_the_recipe_for_threads_shares_weights_and_nothing_that_a_call_changes():
    text = (Path(__file__).parents[1] / "docs" / "scheduler.md").read_text()
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
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for command in ("demo", "test"):
        assert f"make {command}" in "\n".join(README.splitlines()[:10])
        assert re.search(rf"^{command}:", makefile, re.M)


def test_every_file_the_readme_links_to_exists():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / link).exists(), link
