"""Cards say what the Hub filters by, and their snippets run."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import perflow_diffusers as pf
from perflow_diffusers import hub
from perflow_diffusers.hub.card import INSTALL, INSTALL_NOTE, artifact_card, saved_card
from perflow_diffusers.miniature import miniature_folder


@pytest.fixture
def here(tmp_path, monkeypatch, artifact_folder):
    """A working folder in which the artefact lies, as the card's snippet expects it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / artifact_folder.name).symlink_to(artifact_folder)
    return tmp_path


def snippet(card):
    return next(iter(re.findall(r"```python\n(.*?)```", str(card), re.S)))


def test_the_snippet_of_the_miniatures_card_draws_the_picture_of_four_steps(here, artifact_folder):
    scope = {}
    torch.manual_seed(3)
    exec(compile(snippet((artifact_folder / "README.md").read_text()), "README.md", "exec"), scope)
    with Image.open("few-steps.png") as picture:
        assert picture.size == (32, 32)
        drawn = picture.tobytes()
    pipe = pf.load_miniature()
    artifact = hub.load_perflow(pipe, artifact_folder)
    prompt = ModelCard.load(artifact_folder / "README.md").data["widget"][0]["text"]
    torch.manual_seed(3)
    image = pipe(prompt, num_inference_steps=artifact.steps, guidance_scale=artifact.guidance_scale).images[0]
    assert image.tobytes() == drawn


def test_the_snippet_for_another_base_runs_as_it_stands(here, artifact_folder):
    artifact = hub.PeRFlowArtifact.from_folder(artifact_folder)
    base = str(miniature_folder() / "avatars")
    card = artifact_card(replace(artifact, base_model=base), artifact_folder.name, ["delta"])
    assert f'DiffusionPipeline.from_pretrained("{base}", dtype=dtype)' in snippet(card)
    exec(compile(snippet(card), "README.md", "exec"), {})
    assert (here / "few-steps.png").is_file()


def test_the_metadata_is_what_the_hub_filters_by(artifact_folder):
    artifact = replace(hub.PeRFlowArtifact.from_folder(artifact_folder), base_model="someone/base", licence="openrail")
    forms, samples = ["delta", "lora", "kohya"], [('a "quoted": prompt', "images/sample-0.png")]
    data = ModelCard(str(artifact_card(artifact, "me/x", forms, samples))).data.to_dict()
    assert data == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "openrail",
        "base_model": "someone/base",
        "base_model_relation": "adapter",
        "tags": ["diffusers", "text-to-image", "perflow", "few-step", "lora"],
        "widget": [{"text": 'a "quoted": prompt', "output": {"url": "images/sample-0.png"}}],
    }
    without = ModelCard(str(artifact_card(artifact, "me/x", ["delta"]))).data.to_dict()
    assert "lora" not in without["tags"] and "widget" not in without


def test_texts_of_others_stay_texts(artifact_folder):
    artifact = replace(hub.PeRFlowArtifact.from_folder(artifact_folder), recipe={})
    prompt = 'x") ; import os #```\n<script>](http://x)'
    card = artifact_card(artifact, "me/x", ["delta"], [(prompt, "images/sample-0.png")])
    tree = compile(snippet(card), "README.md", "exec")
    assert prompt in tree.co_consts and "<script>" not in str(card).replace(snippet(card), "").split("---")[-1]
    assert card.data["widget"][0]["text"] == prompt


def test_every_card_and_the_readme_say_how_to_install(artifact_folder, tmp_path):
    pipe = pf.load_miniature()
    pf.load_perflow(pipe, "miniature")
    pf.export_pipeline(pipe, tmp_path / "plain")
    pf.export_pipeline(pipe, tmp_path / "code", form="code")
    written = [
        (folder / "README.md").read_text() for folder in (artifact_folder, tmp_path / "plain", tmp_path / "code")
    ]
    for card in (*written, str(saved_card("me/pipeline"))):
        assert INSTALL_NOTE[1:] in card
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"\n    {INSTALL} " in readme.split("## ")[0]
