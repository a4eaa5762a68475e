"""Every script of examples/ in its offline form, in this process, against the same thing done through the API."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image, ImageSequence
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import perflow_diffusers as pf
from perflow_diffusers.weights.read.source import SHORT_NAMES

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.stem != "text_to_multiview")  # that: tests/wonder3d
OFFLINE = [path for path in SCRIPTS if path.stem != "sdxl"]
PROMPT = "a happy person with red hair and glasses"


def script(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, out, *words):
    """The picture that a script writes, RGB."""
    script(name).main([*map(str, words), "--out", str(out)])
    with Image.open(out) as picture:
        return picture.convert("RGB")


def panels(picture, count, side=32):
    """The parts of a picture from left to right, at their own size."""
    small = picture.resize((count * side, side), Image.Resampling.NEAREST)
    return [np.asarray(small)[:, i * side : (i + 1) * side].astype(int) for i in range(count)]


def error(one, other):
    return float(((one - other) ** 2).mean())


@pytest.fixture(scope="module")
def pipe():
    """The miniature with its accelerator, put together through the API."""
    pipe = pf.load_miniature()
    pipe.set_progress_bar_config(disable=True)
    merged = pf.merge_delta(pipe, "miniature")
    kind = merged.metadata["prediction_type"]
    pipe.scheduler = pf.PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type=kind)
    return pipe


def draw(pipe, prompt=PROMPT, seed=0, **options):
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0} | options
    return pipe(prompt, generator=generator, **options).images[0]


def pixels(picture):
    return np.asarray(picture).astype(int)


@pytest.fixture(scope="module")
def published(pipe, tmp_path_factory):
    """Folders that stand in for what the Hub has: the base pipeline and a ControlNet that does something."""
    folder = tmp_path_factory.mktemp("published")
    pf.load_miniature().save_pretrained(folder / "model")
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 64))
    for name, weights in controlnet.named_parameters():
        if name.startswith("controlnet_") and name.endswith("weight"):
            torch.nn.init.normal_(weights, std=0.1)
    controlnet.save_pretrained(folder / "controlnet")
    return folder


@pytest.fixture
def photo(tmp_path, pipe):
    path = tmp_path / "photo.png"
    draw(pipe, "a sad person with green hair", seed=5).save(path)
    return path


def test_text_to_image_writes_what_the_api_draws_and_says_where(tmp_path, pipe, capsys):
    out = tmp_path / "picture.png"
    for said in ("writing", "replacing"):
        picture = run("text_to_image", out, "--miniature", "--seed", 3, "--steps", 5)
        assert f"{said} {out}" in capsys.readouterr().out
        (drawn,) = panels(picture, 1)
        assert picture.size == (256, 256)
        np.testing.assert_array_equal(drawn, pixels(draw(pipe, seed=3, num_inference_steps=5)))


def test_text_to_image_with_a_checkpoint_of_ones_own(tmp_path, pipe, published):
    words = [
        "--model",
        published / "model",
        "--delta",
        "miniature",
        "--negative-prompt",
        "a beard",
        "--prompt",
        "a man",
    ]
    picture = run("text_to_image", tmp_path / "x.png", *words)
    expected = draw(pipe, "a man", negative_prompt="a beard", guidance_scale=4.5)
    np.testing.assert_array_equal(pixels(picture), pixels(expected))


def test_a_checkpoint_that_cannot_be_found_is_named(tmp_path):
    with pytest.raises((OSError, ValueError), match="no/such/checkpoint"):
        run("text_to_image", tmp_path / "x.png", "--model", "/no/such/checkpoint")
    assert not (tmp_path / "x.png").exists()


def test_image_to_image_edits_the_picture(tmp_path, pipe):
    before, after = panels(run("image_to_image", tmp_path / "x.png", "--miniature"), 2)
    noise = torch.Generator().manual_seed(0)
    first = draw(pipe, "a happy person with brown hair and fair skin", seed=noise)
    np.testing.assert_array_equal(before, pixels(first))
    editor = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    editor.set_progress_bar_config(disable=True)
    asked = "a sad person with blue hair and fair skin"
    np.testing.assert_array_equal(after, pixels(draw(editor, asked, noise, image=first, strength=0.75)))
    # It is the same person still, nearer than other drawings of the prompt are, but with blue hair.
    others = [error(before, pixels(draw(pipe, asked, seed))) for seed in range(1, 9)]
    assert error(before, after) < min(others)
    red, _, blue = after[3:6, 10:22].mean((0, 1))
    assert blue > red + 100


def test_image_to_image_takes_a_picture_and_goes_further_from_it_with_more_strength(tmp_path, photo):
    distances = []
    for strength in (0.25, 0.5, 1.0):
        words = ["--miniature", "--image", photo, "--steps", 8, "--strength", strength]
        before, after = panels(run("image_to_image", tmp_path / "x.png", *words), 2)
        with Image.open(photo) as picture:
            np.testing.assert_array_equal(before, pixels(picture))
        distances.append(error(before, after))
    assert 0 < distances[0] < distances[1] < distances[2]


def test_image_to_image_refuses_a_strength_that_leaves_no_step(tmp_path, photo):
    with pytest.raises(ValueError, match="strength"):
        run("image_to_image", tmp_path / "x.png", "--miniature", "--image", photo, "--strength", 0.1)
    assert not (tmp_path / "x.png").exists()


def test_an_untrained_controlnet_changes_nothing(tmp_path, pipe, photo, capsys):
    words = ["--miniature", "--image", photo, "--prompt", PROMPT]
    image, edges, result = panels(run("controlnet", tmp_path / "x.png", *words), 3)
    assert "untrained" in capsys.readouterr().out
    with Image.open(photo) as picture:
        np.testing.assert_array_equal(image, pixels(picture))
    assert set(np.unique(edges)) == {0, 255}
    np.testing.assert_array_equal(result, pixels(draw(pipe)))


def test_controlnet_finds_the_edges_of_a_square_and_none_at_the_border(tmp_path):
    canvas = np.full((32, 32, 3), 255, np.uint8)
    canvas[8:24, 8:24] = 0
    Image.fromarray(canvas).save(tmp_path / "square.png")
    words = ["--miniature", "--image", tmp_path / "square.png", "--steps", 1]
    with pytest.warns(UserWarning, match="windows are merged"):
        _, edges, _ = panels(run("controlnet", tmp_path / "x.png", *words), 3)
    expected = np.zeros((32, 32, 3), int)
    expected[7:25, 7:25] = 255  # the Laplacian of white beside black is positive on the white side only
    expected[8:24, 8:24] = 0
    np.testing.assert_array_equal(edges, expected)


def test_a_controlnet_with_weights_is_used(tmp_path, published, photo):
    words = ["--model", published / "model", "--delta", "miniature", "--guidance-scale", 1, "--image", photo]
    words += ["--controlnet", published / "controlnet"]
    _, _, held = panels(run("controlnet", tmp_path / "a.png", *words), 3)
    _, _, free = panels(run("controlnet", tmp_path / "b.png", "--miniature", "--image", photo), 3)
    assert error(held, free) > 100


def test_tile_refiner_sharpens_what_it_enlarges(tmp_path, pipe):
    enlarged, refined = panels(run("tile_refiner", tmp_path / "x.png", "--miniature"), 2)
    noise = torch.Generator().manual_seed(0)
    large = draw(pipe, seed=noise).resize((16, 16)).resize((32, 32))
    np.testing.assert_array_equal(enlarged, pixels(large))
    plain = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(refined, pixels(draw(plain, seed=noise, image=large, strength=0.5)))
    steepest = [np.percentile(np.abs(np.diff(picture, axis=1)), 97) for picture in (enlarged, refined)]
    assert steepest[1] > 1.3 * steepest[0]


def test_tile_refiner_doubles_the_size_with_a_tile_controlnet(tmp_path, published):
    words = ["--model", published / "model", "--delta", "miniature", "--controlnet", published / "controlnet"]
    assert run("tile_refiner", tmp_path / "x.png", *words).size == (64, 64)


def test_an_untrained_ip_adapter_changes_nothing(tmp_path, pipe, photo, capsys):
    image, result = panels(run("ip_adapter", tmp_path / "x.png", "--miniature", "--image", photo), 2)
    assert "untrained" in capsys.readouterr().out
    with Image.open(photo) as picture:
        np.testing.assert_array_equal(image, pixels(picture))
    np.testing.assert_array_equal(result, pixels(draw(pipe)))


def test_an_ip_adapter_with_weights_is_used(tmp_path, published, photo):
    base = pf.load_miniature()
    torch.manual_seed(0)
    weights = script("ip_adapter").zero_adapter(base)
    flat = {
        f"{part}.{name}": torch.randn_like(value) for part, some in weights.items() for name, value in some.items()
    }
    (tmp_path / "models").mkdir()
    save_file(flat, tmp_path / "models" / "ip-adapter_sd15.safetensors")
    base.image_encoder.save_pretrained(tmp_path / "models" / "image_encoder")
    words = ["--model", published / "model", "--delta", "miniature", "--adapter", tmp_path, "--image", photo]
    pictures = [
        panels(run("ip_adapter", tmp_path / "x.png", *words, "--guidance-scale", 1, "--scale", scale), 2)[1]
        for scale in (0, 0.6)
    ]
    assert error(*pictures) > 100


def test_animatediff_draws_every_frame_and_ties_them_with_a_motion_adapter_only(tmp_path, pipe, capsys):
    out = tmp_path / "x.png"
    run("animatediff", out, "--miniature", "--frames", 4)
    assert "untrained" in capsys.readouterr().out
    with Image.open(out) as movie:
        frames = [panels(frame.convert("RGB"), 1)[0] for frame in ImageSequence.Iterator(movie)]
    latents = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))[0].transpose(0, 1)
    for frame, noise in zip(frames, latents, strict=True):
        single = pixels(draw(pipe, latents=noise[None]))
        assert np.abs(frame - single).max() <= 2  # of 255: a batch of four is added up in another order


def test_animatediff_reads_an_adapter_and_writes_a_gif(tmp_path, published):
    adapter = script("animatediff").zero_adapter(pf.load_miniature().unet)
    adapter.save_pretrained(tmp_path / "motion")
    words = ["--model", published / "model", "--delta", "miniature", "--motion", tmp_path / "motion", "--frames", 3]
    run("animatediff", tmp_path / "x.gif", *words)
    with Image.open(tmp_path / "x.gif") as movie:
        assert (movie.n_frames, movie.size, movie.info["loop"]) == (3, (32, 32), 0)


def test_sdxl_draws_what_the_api_draws(tmp_path, pipe):
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
        **blocks,
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": pipe.tokenizer.bos_token_id, "eos_token_id": pipe.tokenizer.eos_token_id}
    text = CLIPTextConfig(
        vocab_size=len(pipe.tokenizer), max_position_embeddings=32, projection_dim=16, **sizes, **ids
    )
    tiny = StableDiffusionXLPipeline(
        vae=pipe.vae,
        text_encoder=CLIPTextModel(text).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text).eval(),
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer,
        unet=unet.eval(),
        scheduler=pf.load_miniature().scheduler,
    )
    tiny.save_pretrained(tmp_path / "tiny", variant="v0-fix")  # as the published weights are called
    picture = run("sdxl", tmp_path / "x.png", "--model", tmp_path / "tiny", "--size", 32)
    tiny.scheduler = pf.PeRFlowScheduler.from_config(tiny.scheduler.config, prediction_type="ddim_eps")
    options = {"guidance_scale": 2.0, "negative_prompt": "blurry, low quality, over-saturated", "height": 32}
    expected = draw(tiny, "a colorful bird on a branch, open beak, photo, 8k uhd", width=32, **options)
    np.testing.assert_array_equal(pixels(picture), pixels(expected))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_teaches(path, capsys):
    with pytest.raises(SystemExit) as end:
        script(path.stem).main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for option in ("--prompt", "--steps", "--guidance-scale", "--seed", "--device", "--out"):
        assert option in text
    assert ("--miniature" in text) == (path in OFFLINE)
    assert "None" not in text and "( )" not in text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_short_and_use_public_names_only(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 60
    nodes = list(ast.walk(ast.parse(source)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name.startswith("perflow")} == {"perflow_diffusers"}
    used = {
        n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "pf"
    }
    assert used and used <= set(pf.__all__)


def test_defaults_name_weights_that_the_package_knows():
    for path in OFFLINE:
        delta = re.search(r'"--delta", default="([^"]+)"', path.read_text()).group(1)
        assert {"prediction_type": "diff_eps", "num_time_windows": "4"}.items() <= SHORT_NAMES[delta].metadata.items()
    for path in SCRIPTS:
        for option in re.findall(r'"--(?:model|controlnet|adapter|motion)", default="([^"]+)"', path.read_text()):
            assert re.fullmatch(r"[\w-]+/[\w-]+", option), option


def test_the_table_has_every_script_and_its_commands_parse(tmp_path):
    table = (FOLDER / "README.md").read_text()
    commands = re.findall(r"`python examples/(\w+)\.py([^`]*)`", table)
    assert {name for name, _ in commands} == {path.stem for path in SCRIPTS}
    for name, words in commands:
        known = set(re.findall(r'add\("(--[\w-]+)"', (FOLDER / f"{name}.py").read_text()))
        assert {word for word in shlex.split(words) if word.startswith("--")} <= known
