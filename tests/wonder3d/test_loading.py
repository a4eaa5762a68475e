"""Folders: ours, the authors' layout of 2023, and those whose weights are pickled."""

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from perflow_diffusers import PeRFlowScheduler
from perflow_diffusers.pipelines.wonder3d import UNetMV2DConditionModel, Wonder3DPipeline
from perflow_diffusers.pipelines.wonder3d.loading import available_variant

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def released(saved):
    """The folder as the authors publish it: classes of a library that is not installed, old names throughout."""
    index = json.loads((saved / "model_index.json").read_text())
    index |= {
        "_class_name": "MVDiffusionImagePipeline",
        "_diffusers_version": "0.19.3",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "unet": ["mvdiffusion.models.unet_mv2d_condition", "UNetMV2DConditionModel"],
        "safety_checker": [None, None],
        "requires_safety_checker": True,
    }
    (saved / "model_index.json").write_text(json.dumps(index))
    config = json.loads((saved / "unet/config.json").read_text())
    for name in ("down_block_types", "up_block_types"):
        config[name] = [block.replace("Block2D", "BlockMV2D") if "Cross" in block else block for block in config[name]]
    config |= {
        "_diffusers_version": "0.19.3",
        "mid_block_type": "UNetMidBlockMV2DCrossAttn",
        "joint_attention": False,
        "joint_attention_twice": True,
        "cross_domain_attention": False,
        "cd_attention_last": False,
        "mvcd_attention": False,
    }
    (saved / "unet/config.json").write_text(json.dumps(config))
    weights = load_file(saved / UNET)
    renamed = {key.replace("_joint_mid.", "_joint_twice."): weight for key, weight in weights.items()}
    save_file(renamed, saved / UNET, {"format": "pt"})
    vision = load_file(saved / "image_encoder/model.safetensors")
    vision["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(vision, saved / "image_encoder/model.safetensors", {"format": "pt"})
    return saved


def pickle_weights(folder, *names):
    for name in names:
        (file,) = (folder / name).glob("*.safetensors")
        old = "pytorch_model.bin" if file.name == "model.safetensors" else file.with_suffix(".bin").name
        torch.save(load_file(file), file.with_name(old))
        file.unlink()


def same(first, second, picture, seeded):
    """Every bit of the weights, and the pictures (weights read from a file lie otherwise: last bits differ)."""
    for name in ("unet", "vae", "image_encoder"):
        one, other = first.components[name].state_dict(), second.components[name].state_dict()
        if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
            return False
    views = []
    for pipe in (first, second):
        pipe.set_progress_bar_config(disable=True)
        views.append(pipe(picture, num_inference_steps=1, generator=seeded(0), output_type="pt").images)
    return bool((views[0] - views[1]).abs().max() <= 1e-5)


def test_saved_and_reloaded_it_draws_the_same_bits(pipe, saved, picture, seeded):
    again = Wonder3DPipeline.from_pretrained(saved)
    assert same(again, pipe, picture, seeded)
    assert again.config["unet"] == ("perflow_diffusers.pipelines.wonder3d.unet", "UNetMV2DConditionModel")


def test_the_released_layout_loads_and_draws_the_same_bits(pipe, released, picture, seeded, tmp_path):
    again = Wonder3DPipeline.from_pretrained(released)
    assert same(again, pipe, picture, seeded)
    again.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again/model_index.json").read_text())
    assert index["_class_name"] == "Wonder3DPipeline" and "mvdiffusion" not in json.dumps(index)
    assert same(Wonder3DPipeline.from_pretrained(tmp_path / "again"), pipe, picture, seeded)


def test_a_perflow_scheduler_is_saved_with_the_pipeline(pipe, tmp_path):
    pipe.scheduler = PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type="diff_eps")
    pipe.save_pretrained(tmp_path)
    again = Wonder3DPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is PeRFlowScheduler
    assert dict(again.scheduler.config)["perflow_type"] == "diff_eps"


def test_passed_components_and_dtypes_are_used(released):
    unet = UNetMV2DConditionModel.from_pretrained(released, subfolder="unet")
    (released / UNET).unlink()
    pipe = Wonder3DPipeline.from_pretrained(released, unet=unet, dtype=torch.float16)
    assert pipe.unet is unet and pipe.vae.dtype == torch.float16


def test_the_dtype_of_each_component_can_be_given(released):
    pipe = Wonder3DPipeline.from_pretrained(released, dtype={"unet": torch.bfloat16, "default": torch.float32})
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)


def test_a_variant_is_taken_where_there_is_one(pipe, saved):
    pipe.vae.half().save_pretrained(saved / "vae", variant="fp16")
    assert available_variant(saved / "vae", "fp16") == "fp16" and available_variant(saved / "unet", "fp16") is None
    assert Wonder3DPipeline.from_pretrained(saved, variant="fp16").unet.dtype == torch.float32
    pipe.unet.half().save_pretrained(saved / "unet", variant="fp16")
    (saved / UNET).unlink()
    assert Wonder3DPipeline.from_pretrained(saved, variant="fp16", dtype=torch.float16).unet.dtype == torch.float16


@pytest.mark.parametrize("name", ["unet", "vae", "image_encoder"])
def test_pickled_weights_are_refused_with_the_way_out(saved, name):
    pickle_weights(saved, name)
    with pytest.raises(ValueError, match=rf"{name} has only .*\.bin; expected a .safetensors file.*docs/wonder3d.md"):
        Wonder3DPipeline.from_pretrained(saved)


def test_the_documented_conversion_makes_a_pickled_folder_loadable(pipe, released, picture, seeded):
    pickle_weights(released, "unet", "vae", "image_encoder")
    text = (Path(__file__).parents[2] / "docs/wonder3d.md").read_text()
    (snippet,) = re.findall(r"```python\n(from pathlib.*?)```", text, flags=re.S)
    assert "snapshot_download(" in snippet and "weights_only=True" in snippet
    local = re.sub(r"snapshot_download\(.*?\)", repr(str(released)), snippet)
    exec(compile(local, "docs/wonder3d.md", "exec"), {})
    assert same(Wonder3DPipeline.from_pretrained(released), pipe, picture, seeded)


def test_a_hub_id_is_downloaded_without_code_and_pickles(released, monkeypatch, pipe, picture, seeded):
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(released)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    again = Wonder3DPipeline.from_pretrained("someone/wonder3d", revision="refs/pr/1")
    assert same(again, pipe, picture, seeded)
    assert (asked["repo_id"], asked["revision"]) == ("someone/wonder3d", "refs/pr/1")
    assert asked["allow_patterns"] == ["*.json", "*.safetensors"]


@pytest.mark.parametrize("options", [{"device_map": "balanced"}, {"quantization_config": {}}])
def test_options_that_would_miss_the_unet_are_refused(saved, options):
    with pytest.raises(ValueError, match="needs the UNet to be loaded beforehand"):
        Wonder3DPipeline.from_pretrained(saved, **options)
