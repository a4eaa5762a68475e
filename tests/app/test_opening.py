"""Pipelines that are opened from folders: they draw what the miniature does, or say why they cannot."""

import dataclasses

import numpy as np
import pytest
import torch

from perflow_diffusers import PeRFlowArtifact, load_miniature
from perflow_diffusers.app import opening
from perflow_diffusers.app.code import as_python
from perflow_diffusers.app.opening import OpeningError, open_studio
from perflow_diffusers.app.settings import Settings
from perflow_diffusers.app.studio import Studio
from perflow_diffusers.schedulers.stock import stock_scheduler
from perflow_diffusers.weights import compute_delta

PROMPT = "a happy person with red hair and glasses"


@pytest.fixture(scope="module")
def plain():
    pipe = load_miniature()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(one, other):
    return (np.asarray(one) == np.asarray(other)).all()


def test_a_real_pipeline_from_its_folder(tmp_path, plain):
    plain.save_pretrained(tmp_path / "my-model")
    said = []
    studio = open_studio(str(tmp_path / "my-model"), "miniature", device="cpu", progress=said.append)
    assert not studio.is_miniature and studio.about == {"model": "my-model", "accelerator": "miniature"}
    assert said[0] == "Loading my-model (float32, cpu)"
    settings = Settings(PROMPT, seed=4)
    assert same(studio.draw(settings).picture, Studio.miniature().draw(settings).picture)
    code = as_python(settings, studio)
    assert "StableDiffusionPipeline.from_pretrained(" in code and 'pf.load_perflow(pipe, "miniature")' in code


@pytest.mark.parametrize(
    "model, options, said",
    [
        ("/nowhere/at/all", {}, "does not exist"),
        ("model.ckpt", {}, "pickle"),
        ("model.safetensors", {}, "does not exist"),
        ("EMPTY", {}, "model_index.json"),
        ("miniature-copy", {"device": "warp"}, "is not there"),
        ("miniature-copy", {"offload": "model", "device": "cpu"}, "here is none"),
        ("miniature-copy", {"dtype": "float8"}, "float16, bfloat16, float32"),
        ("MINE", {}, "--accelerator"),
    ],
)
def test_models_that_cannot_be_opened(tmp_path, plain, model, options, said):
    if model == "EMPTY":
        model = str(tmp_path)
    if model == "MINE":
        plain.save_pretrained(tmp_path / "mine")
        model = str(tmp_path / "mine")
    with pytest.raises(OpeningError, match=said):
        open_studio(model, **options)


@pytest.mark.parametrize(
    ("there", "options", "said"),
    [
        ((), {}, "float32, cpu"),
        (("cuda",), {}, "float16, cuda"),
        (("mps",), {}, "float16, mps"),
        (("cuda", "mps"), {}, "float16, cuda"),
        (("cuda",), {"device": "cpu"}, "float32, cpu"),
        (("cuda",), {"dtype": "bfloat16"}, "bfloat16, cuda"),
    ],
)
def test_device_and_dtype_are_chosen(there, options, said, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    monkeypatch.setattr(opening, "_load", lambda model, dtype: dtype)  # which has no UNet
    told = []
    with pytest.raises(OpeningError, match="has no UNet"):
        open_studio(str(tmp_path), "miniature", progress=told.append, **options)
    assert told == [f"Loading {tmp_path.name} ({said})"]


@pytest.mark.parametrize("alarmed", [True, False])
def test_the_safety_checker_is_the_checkpoints_own(plain, tmp_path, alarmed):
    """One whose thresholds are beyond any cosine: it alarms at everything, or at nothing."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = {**size, "image_size": 32, "patch_size": 16, "projection_dim": 4}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=size, vision_config=vision, projection_dim=4))
    for name, threshold in checker.named_parameters():
        if name.endswith("_weights"):
            threshold.data.fill_(-2.0 if alarmed else 2.0)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    parts = {**plain.components, "safety_checker": checker, "feature_extractor": processor}
    StableDiffusionPipeline(**parts).save_pretrained(tmp_path / "checked")
    studio = open_studio(str(tmp_path / "checked"), "miniature", device="cpu")
    assert np.asarray(studio.draw(Settings(PROMPT)).picture).any() != alarmed
    assert plain.safety_checker is None and Studio.miniature().pipe.safety_checker is None


def test_an_exported_pipeline_has_no_picture_without_its_accelerator(tmp_path):
    from perflow_diffusers import export_pipeline, load_perflow

    pipe = load_miniature()
    load_perflow(pipe, "miniature")
    export_pipeline(pipe, tmp_path / "exported")
    studio = open_studio(str(tmp_path / "exported"), device="cpu")
    settings = Settings(PROMPT, seed=8)
    assert studio.draw_stock(settings) is None
    assert (studio.steps, studio.guidance_scale) == (4, 1.0)
    difference = np.abs(
        np.asarray(studio.draw(settings).picture, float) - np.asarray(Studio.miniature().draw(settings).picture, float)
    )
    assert difference.max() <= 3
    assert "pf.set_scheduler(pipe)" in as_python(settings, studio)
    assert isinstance(PeRFlowArtifact.from_pretrained("miniature"), PeRFlowArtifact)


def save_xl(folder):
    """A complete SDXL pipeline of random weights and the miniature's tokenizer, and a student of its UNet."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from perflow_diffusers.miniature import miniature_folder

    torch.manual_seed(0)
    tokenizer = load_miniature().tokenizer
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length, "pad_token_id": 0,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=24, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 16, use_linear_projection=True,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(miniature_folder() / "avatars" / "vae"),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=8, **size)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=16, projection_dim=16, **size)),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        add_watermarker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "xl")
    student = {name: weight + 0.02 * torch.randn_like(weight) for name, weight in unet.state_dict().items()}
    metadata = {"prediction_type": "ddim_eps", "num_time_windows": 4, "recommended_guidance_scale": 1.0}
    compute_delta(unet, student, folder / "xl-perflow.safetensors", metadata=metadata)
    return pipe


def test_an_sdxl_pipeline_with_its_second_encoder(tmp_path):
    plain = save_xl(tmp_path)
    studio = open_studio(str(tmp_path / "xl"), str(tmp_path / "xl-perflow.safetensors"), device="cpu")
    assert studio.stock_guidance_scale == 5.0 and studio.size == (32, 32)
    settings = Settings("a person with a hat", seed=2, stock="DDIM", stock_steps=3, stock_guidance_scale=5.0)
    plain.scheduler = stock_scheduler("DDIM", plain.scheduler.config)
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        settings.prompt, num_inference_steps=3, guidance_scale=5.0, generator=torch.Generator().manual_seed(2),
        width=32, height=32,
    ).images[0]  # fmt: skip
    assert same(studio.draw_stock(settings).picture, expected)
    drawing = studio.draw(settings)
    assert drawing.evaluations == 4 and len(studio.states(drawing)) == 4
    image = studio.draw(dataclasses.replace(settings, strength=0.5), drawing.picture)
    assert image.evaluations == 2 and image.picture.size == (32, 32)


def test_an_offloaded_pipeline_draws_the_same(tmp_path, plain, monkeypatch):
    """Hooks set on the CPU move every part as they would to a GPU."""
    plain.save_pretrained(tmp_path / "mine")
    settings = Settings(PROMPT, seed=4)
    monkeypatch.setattr(opening, "_device", lambda device: "cpu:0")
    studio = open_studio(str(tmp_path / "mine"), "miniature", dtype="float32", offload="model")
    assert {hook.model for hook in studio.pipe._all_hooks} >= {studio.pipe.unet, studio.pipe.vae}
    expected = Studio.miniature()
    for _ in range(2):
        assert same(studio.draw(settings).picture, expected.draw(settings).picture)
    assert same(studio.draw_stock(settings).picture, expected.draw_stock(settings).picture)
