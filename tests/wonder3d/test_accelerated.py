"""A PeRFlow delta of the stock UNet on the Wonder3D UNet: what it changes, few steps, and back to the last bit."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from perflow_diffusers import PeRFlowScheduler, compute_delta, merge_delta, set_delta_scale, unmerge_delta
from perflow_diffusers.hub import load_perflow, unload_perflow

STOCK_ONLY = ("num_views", "multiview_attention", "sparse_mv_attention", "cd_attention_mid")


@pytest.fixture(scope="module")
def stock(tiny_unet):
    """SD's UNet of the tiny size: 4 input channels, no cameras, no joint attention."""
    config = {key: value for key, value in tiny_unet[0].items() if key not in STOCK_ONLY}
    config |= {"in_channels": 4, "class_embed_type": None, "projection_class_embeddings_input_dim": None}
    return UNet2DConditionModel.from_config(config)


@pytest.fixture
def delta(stock):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(w.shape, generator=generator) * 0.02 for name, w in stock.state_dict().items()}


@pytest.fixture
def fast(pipe):
    pipe.scheduler = PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type="diff_eps")
    return pipe


def weights_of(pipe):
    return {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}


def views(pipe, picture, seeded, steps=4):
    return pipe(picture, num_inference_steps=steps, generator=seeded(0), output_type="latent").images


def test_the_delta_goes_into_the_shared_weights_and_the_first_four_input_channels(fast, delta):
    before = weights_of(fast)
    report = merge_delta(fast, delta).report
    after = fast.unet.state_dict()
    assert report.padded == ("conv_in.weight",) and report.changed == len(delta)
    assert set(report.untouched) == {n for n in before if "_joint_mid." in n or n.startswith("class_embedding.")}
    for name, weight in before.items():
        expected = weight.clone()
        if name == "conv_in.weight":
            expected[:, :4] += delta[name]
        elif name in delta:
            expected += delta[name]
        assert torch.equal(after[name], expected), name


def test_conv_in_can_be_left_out(fast, delta, stock, tmp_path):
    before = weights_of(fast)
    with merge_delta(fast, delta, conv_in="skip") as merged:
        assert merged.report.skipped == ("conv_in.weight",)
        assert torch.equal(fast.unet.conv_in.weight, before["conv_in.weight"])
    tuned = {name: w + (0 if name == "conv_in.weight" else delta[name]) for name, w in stock.state_dict().items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    file = tmp_path / "delta.safetensors"
    compute_delta(stock, tmp_path / "tuned.safetensors", file, drop_identical=True)
    with merge_delta(fast, file) as merged:
        assert "conv_in.weight" in merged.report.untouched
        assert torch.equal(fast.unet.conv_in.weight, before["conv_in.weight"])
        assert not torch.equal(fast.unet.conv_in.bias, before["conv_in.bias"])
    after = fast.unet.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.filterwarnings("ignore:.*time windows. windows are merged")
def test_few_steps_run_and_the_delta_is_undone_to_the_last_bit(fast, delta, picture, seeded, steps):
    weights, before = weights_of(fast), views(fast, picture, seeded, steps)
    merge_delta(fast, delta)
    accelerated = views(fast, picture, seeded, steps)
    assert fast.num_timesteps == steps
    assert fast.scheduler.timesteps.tolist() == [1000 - 1000 * i // steps for i in range(steps)]
    assert torch.isfinite(accelerated).all() and (accelerated - before).abs().max() > 1e-3
    set_delta_scale(fast, 0.5)
    unmerge_delta(fast)
    after = fast.unet.state_dict()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(views(fast, picture, seeded, steps), before)


def test_load_perflow_brings_weights_and_scheduler_and_takes_them_out(pipe, delta, tmp_path):
    own = weights_of(pipe)
    base = {name: own[name][:, :4].clone() if name == "conv_in.weight" else own[name] for name in delta}
    tuned = {name: weight + delta[name] for name, weight in base.items()}
    settings = {"prediction_type": "diff_eps", "num_time_windows": 4}
    compute_delta(base, tuned, tmp_path / "delta.safetensors", metadata=settings)
    stock_scheduler = pipe.scheduler
    load_perflow(pipe, tmp_path / "delta.safetensors")
    assert pipe.scheduler.config["perflow_type"] == "diff_eps"
    assert torch.equal(pipe.unet.conv_in.weight[:, 4:], own["conv_in.weight"][:, 4:])
    assert (pipe.unet.conv_in.weight[:, :4] - tuned["conv_in.weight"]).abs().max() < 1e-6
    unload_perflow(pipe)
    assert pipe.scheduler is stock_scheduler
    assert all(torch.equal(weight, own[name]) for name, weight in pipe.unet.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*time windows. windows are merged")
def test_one_step_is_the_chord_of_one_window(fast, delta, picture, seeded):
    """diff_eps: z_end = (z_start - sqrt(1 - g^2) out) / g with g^2 = abar(1) / abar(0)."""
    merge_delta(fast, delta)
    seen = []
    views_after = fast(
        picture,
        num_inference_steps=1,
        generator=seeded(0),
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors) or {},
        callback_on_step_end_tensor_inputs=["latents", "image_embeds", "image_latents", "camera_embeds"],
    )
    (tensors,) = seen
    noise = torch.randn(12, 4, 8, 8, generator=seeded(0))
    with torch.no_grad():
        out = fast.unet(
            torch.cat([noise, tensors["image_latents"]], 1),
            1000,
            tensors["image_embeds"],
            class_labels=tensors["camera_embeds"],
        ).sample
    g = (fast.scheduler.alphas_cumprod[999].double() / fast.scheduler.alphas_cumprod[0].double()).sqrt()
    expected = (noise - (1 - g**2).sqrt() * out) / g
    ours = torch.cat([views_after.normals, views_after.images])
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
