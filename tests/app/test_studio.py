"""What the page draws with: exact, interruptible, and said in Python that draws the same."""

import dataclasses
import io
import warnings

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from perflow_diffusers import PeRFlowArtifact, PeRFlowScheduler, load_miniature
from perflow_diffusers.app import opening
from perflow_diffusers.app.code import as_python
from perflow_diffusers.app.opening import OpeningError, open_studio
from perflow_diffusers.app.pictures import PictureError, check_upload, enlarge, from_png, to_png
from perflow_diffusers.app.settings import SAME, Settings, SettingsError
from perflow_diffusers.app.studio import Interrupted, Studio
from perflow_diffusers.schedulers.stock import stock_scheduler
from perflow_diffusers.weights import compute_delta

PROMPT = "a happy person with red hair and glasses"


@pytest.fixture(scope="module")
def studio():
    return Studio.miniature()


@pytest.fixture(scope="module")
def plain():
    pipe = load_miniature()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(one, other):
    return (np.asarray(one) == np.asarray(other)).all()


def test_strength_0_is_the_checkpoint_itself_and_1_is_the_accelerator_again(studio, plain):
    settings = Settings(PROMPT, seed=5, steps=4, guidance_scale=3.0)
    full = studio.draw(settings).picture
    none = studio.draw(dataclasses.replace(settings, accelerator_scale=0.0)).picture
    former, plain.scheduler = plain.scheduler, PeRFlowScheduler.from_config(studio.pipe.scheduler.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = plain(PROMPT, num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(5))
    plain.scheduler = former
    assert same(none, expected.images[0]) and not same(none, full)
    for scale in (0.3, 1.5, 0.0):
        studio.draw(dataclasses.replace(settings, accelerator_scale=scale))
    assert same(studio.draw(settings).picture, full)


def test_the_comparison_is_plain_diffusers(studio, plain):
    settings = Settings(PROMPT, seed=7, stock="UniPC", stock_steps=5)
    former, plain.scheduler = plain.scheduler, stock_scheduler("UniPC", plain.scheduler.config)
    expected = plain(PROMPT, num_inference_steps=5, guidance_scale=7.5, generator=torch.Generator().manual_seed(7))
    plain.scheduler = former
    drawing = studio.draw_stock(settings)
    assert same(drawing.picture, expected.images[0])
    assert drawing.evaluations == 10 and studio.draw_stock(settings) is drawing
    assert isinstance(studio.pipe.scheduler, PeRFlowScheduler)


def test_the_same_solver_at_strength_0_is_the_comparison(studio):
    settings = Settings(PROMPT, accelerator_scale=0.0, stock=SAME, stock_guidance_scale=1.0)
    assert same(studio.draw(settings).picture, studio.draw_stock(settings).picture)


def test_a_studio_without_a_second_unet_draws_the_same_comparison(studio):
    settings = Settings(PROMPT, seed=9)
    expected, picture = studio.draw_stock(settings).picture, studio.draw(settings).picture
    second, studio.second = studio.second, None
    studio._kept.clear()
    try:
        assert same(studio.draw_stock(settings).picture, expected)
        assert same(studio.draw(settings).picture, picture)
    finally:
        studio.second = second


def test_the_states_end_in_the_picture(studio):
    drawing = studio.draw(Settings(PROMPT, steps=6))
    states = studio.states(drawing)
    assert len(states) == 6 and drawing.evaluations == 6
    errors = [np.abs(np.asarray(s, float) - np.asarray(drawing.picture, float)).mean() for s in states]
    assert errors[-1] < 2 and errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("draw", ["draw", "draw_stock"])
def test_an_interrupted_picture_leaves_all_as_it_was(studio, draw):
    settings = Settings(PROMPT, seed=21, stock_steps=8, steps=8)
    seen = []

    def cancelled(step, steps):
        seen.append((step, steps))
        return step == 2

    studio._kept.clear()
    expected = studio.draw(settings).picture
    with pytest.raises(Interrupted):
        getattr(studio, draw)(settings, None, cancelled)
    assert seen == [(1, 8), (2, 8)]
    assert same(studio.draw(settings).picture, expected) and "step" not in vars(studio.pipe.scheduler)
    assert not studio.pipe.unet._forward_pre_hooks


@pytest.mark.parametrize("scale", [1.0, 0.45])
@pytest.mark.parametrize("image", [False, True])
def test_the_python_draws_the_same_pixels(studio, tmp_path, monkeypatch, scale, image):
    monkeypatch.chdir(tmp_path)
    settings = Settings('a sad person with a "purple" hat', seed=3, steps=5, accelerator_scale=scale)
    source = None
    if image:
        source = Image.effect_noise((80, 60), 90).convert("RGB")
        source.save("input.png")
        settings = dataclasses.replace(settings, strength=0.7)
    drawing = studio.draw(settings, source)
    code = as_python(settings, studio, "input.png" if image else None)
    exec(compile(code, "shown", "exec"), {"__name__": "__main__"})
    assert same(Image.open("picture.png"), drawing.picture)


def test_settings_travel_in_a_png(studio):
    settings = Settings(
        "a person, with: a “hat”\nand more", negative_prompt="sad", seed=2**32 - 1, steps=7, strength=0.5
    )
    picture = studio.draw(Settings(PROMPT)).picture
    png = to_png(enlarge(picture), settings, studio.about)
    opened = Image.open(io.BytesIO(png))
    assert from_png(png) == settings and opened.size == (256, 256)
    assert same(np.asarray(opened)[::8, ::8], picture)
    lines = opened.info["parameters"].split("\n")
    assert lines[0] == "a person, with: a “hat” and more" and lines[1] == "Negative prompt: sad"
    assert lines[2].startswith(
        "Steps: 7, Sampler: PeRFlow, CFG scale: 1, Seed: 4294967295, Size: 256x256, Model: avatars"
    )


def _png(**texts):
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def test_settings_of_another_tool():
    text = "a cat\non a mat\nNegative prompt: dog\nSteps: 30, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x512"
    settings = from_png(_png(parameters=text))
    assert (settings.prompt, settings.negative_prompt, settings.seed) == ("a cat\non a mat", "dog", 42)
    assert (settings.steps, settings.guidance_scale) == (4, 1.0)  # of Euler, not of ours


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "no picture"),
        (b"\x89PNG\r\n\x1a\nnonsense", "no picture"),
        (_png(), "carries no settings"),
        (_png(perflow="{"), "damaged"),
        (_png(perflow="[]"), "damaged"),
        (_png(perflow='{"settings": {"prompt": "x", "steps": "4"}}'), "whole number"),
        (_png(perflow='{"settings": {"prompt": "x", "evil": 1}}'), "unknown"),
        (_png(perflow='{"settings": {"steps": 4}}'), "no prompt"),
        (_png(perflow="[" * 90_000), "damaged"),
        (_png(perflow="{}")[:-30], "no picture|damaged"),
        (b"x" * (20 * 2**20 + 1), "MB"),
    ],
)
def test_pngs_that_carry_no_settings(data, said):
    with pytest.raises((PictureError, SettingsError), match=said):
        from_png(data)


def test_uploads_are_checked_and_put_upright():
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.new("L", (40, 20), 128).save(out, "JPEG", exif=exif)
    picture = check_upload(out.getvalue())
    assert picture.size == (20, 40) and picture.mode == "RGB"
    noise = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(noise, "JPEG")
    with pytest.raises(PictureError, match="damaged"):
        check_upload(noise.getvalue()[: len(noise.getvalue()) // 2])
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    with pytest.raises(PictureError, match="40 million pixels"):
        check_upload(bomb.getvalue())
    gif = io.BytesIO()
    Image.new("P", (8, 8)).save(gif, "GIF")
    with pytest.raises(PictureError, match="no picture that can be read"):
        check_upload(gif.getvalue())


@pytest.mark.parametrize(
    "values, said",
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 17}, "1 to 16"),
        ({"steps": True}, "steps=True"),
        ({"seed": -1}, "seed"),
        ({"accelerator_scale": 1.6}, "0 to 1.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"stock": "Magic"}, "DPM-Solver"),
        ({"strength": 0.1}, "skipped"),
        ({"width": 100}, "multiple of 8"),
        ({"prompt": "x" * 2001}, "2000"),
    ],
)
def test_settings_that_nothing_can_be_drawn_with(values, said):
    with pytest.raises(SettingsError, match=said):
        Settings(**{"prompt": "a person", **values})


def test_a_prompt_that_is_too_long_is_said(studio):
    with pytest.raises(SettingsError, match="reads"):
        studio.draw(Settings("hat " * 200))


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


def test_weights_that_are_offloaded_one_by_one_come_home_for_another_strength(monkeypatch):
    """Nothing can be added to weights that are on the meta device, where such an offload leaves them."""
    studio = Studio.miniature()
    studio.second, studio.offload, studio.device = None, "sequential", "cpu"
    pipe, done = studio.pipe, []
    at_1 = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}

    def offload(device):
        done.append((device, pipe.unet.conv_in.weight.is_meta))
        accelerate.cpu_offload(pipe.unet, torch.device(device))

    monkeypatch.setattr(pipe, "enable_sequential_cpu_offload", offload)
    offload("cpu")
    assert pipe.unet.conv_in.weight.is_meta
    for scale in (0, 0.5, 1):
        studio._rescale(scale)
    assert done == [("cpu", False)] * 4 and pipe.unet.conv_in.weight.is_meta
    pipe.remove_all_hooks()
    assert all(torch.equal(weight, at_1[name]) for name, weight in pipe.unet.state_dict().items())
