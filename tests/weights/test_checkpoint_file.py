"""One file in the original format as a model, opened by diffusers with configs that a cache has."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ldm_names import ldm_state
from PIL import Image
from safetensors.torch import save_file

import perflow_diffusers as pf
from perflow_diffusers.miniature import miniature_folder

REPOSITORY = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # whose configs diffusers takes for such a file
_VAE = (
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda found: f"up.{2 - int(found[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{2 - int(found[1])}.upsample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)


def vae_name(name):
    """The original code's name of a tensor of an autoencoder of three blocks."""
    for pattern, original in _VAE:
        name = re.sub(pattern, original, name)
    return name


def vae_state(vae):
    """Its weights in the original format, where attention is a convolution of 1 x 1."""
    state = {vae_name(name): weight.contiguous() for name, weight in vae.state_dict().items()}
    return {
        name: weight[:, :, None, None] if ".attn_1." in name and weight.dim() == 2 else weight
        for name, weight in state.items()
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the miniature as one file, and a cache that has the configs alone."""
    folder = tmp_path_factory.mktemp("original")
    pipe = pf.load_miniature("disco")
    text = {name.removeprefix("text_model."): weight for name, weight in pipe.text_encoder.state_dict().items()}
    parts = (
        ("model.diffusion_model.", ldm_state(pipe.unet)),
        ("first_stage_model.", vae_state(pipe.vae)),
        ("cond_stage_model.transformer.text_model.", text),
    )
    save_file(
        {prefix + name: weight for prefix, state in parts for name, weight in state.items()},
        folder / "disco.safetensors",
    )
    stored = folder / "home" / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text("0" * 40)
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(miniature_folder() / "avatars", stored / "snapshots" / ("0" * 40), ignore=weights)
    return folder


def draw(place, *arguments, home="home"):
    env = {**os.environ, "HF_HOME": str(place / home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "perflow_diffusers", "draw", "a person with red hair", *arguments]
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=300)


def test_the_picture_is_that_of_the_same_weights_as_a_folder(place):
    done = draw(place, "--model", "disco.safetensors", "--accelerator", "miniature", "--seed", "3", "--out", "one.png")
    assert done.returncode == 0, done.stderr
    plain = draw(place, "--model", "disco", "--seed", "3", "--out", "two.png")
    assert plain.returncode == 0, plain.stderr
    first, second = (np.asarray(Image.open(place / name)).astype(int) for name in ("one.png", "two.png"))
    assert abs(first - second).max() <= 1  # attention of the autoencoder: a matrix or a convolution of 1 x 1


def test_without_the_configs_it_says_which_and_how_to_get_them(place):
    done = draw(place, "--model", "disco.safetensors", "--accelerator", "miniature", home="empty")
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert "A single file has no tokenizer; that of disco.safetensors is elsewhere" in said
    assert REPOSITORY in said and "Traceback" not in said
    assert not list(Path(place).glob("*red-hair*"))
