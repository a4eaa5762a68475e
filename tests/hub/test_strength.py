"""One call sets the strength of all parts, and a run without them is warned of, whatever diffusers did to them."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from hub_pipes import draw, make_pipe
from peft import LoraConfig
from safetensors.torch import load_file

from perflow_diffusers import PeRFlowScheduler, merge_delta, set_delta_scale
from perflow_diffusers.hub import ArtifactError, export_pipeline, load_perflow, set_perflow_scale, unload_perflow
from perflow_diffusers.weights import MergeError

WAYS = pytest.mark.parametrize("way", ["delta", "lora", "merged lora"])


def add_style(pipe, seed=1):
    """Another LoRA, loaded as diffusers loads one: it alone is active afterwards."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with warnings.catch_warnings():  # PEFT warns of a second adapter
        warnings.simplefilter("ignore")
        pipe.unet.add_adapter(config, adapter_name="style")


def accelerated(way, accelerators, scale=1.0):
    pipe = make_pipe("sd")
    if way == "merged lora":  # beside one that is switched off, an adapter could not act
        add_style(pipe)
        pipe.disable_lora()
    load_perflow(pipe, accelerators["sd"].folder, way.split()[-1], scale)
    return pipe


def by_hand(accelerators, scale=1.0, style=None):
    """The picture of the delta merged into the base, under PeRFlow's scheduler, beside a style at a strength."""
    pipe = make_pipe("sd")
    merge_delta(pipe, accelerators["sd"].delta, scale)
    pipe.scheduler = PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type="ddim_eps")
    if style is not None:
        add_style(pipe)
        pipe.set_adapters(["style"], [style])
    return draw(pipe)


def quiet(pipe):
    """A picture, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return draw(pipe)


def near(first, second):
    return np.abs(first - second).max() < 2e-4


@WAYS
def test_strength_reaches_all_parts_and_comes_back_without_drift(way, accelerators, bits):
    pipe = accelerated(way, accelerators)
    full = quiet(pipe)
    for scale in (0.5, -0.3, 1.7):
        set_perflow_scale(pipe, scale)
        assert near(quiet(pipe), by_hand(accelerators, scale))
    set_perflow_scale(pipe, 0)
    with pytest.warns(UserWarning, match=r"their? strength is 0|its strength is 0"):
        assert near(draw(pipe), by_hand(accelerators, 0.0))
    set_perflow_scale(pipe, 1)
    assert np.array_equal(quiet(pipe), full)
    unload_perflow(pipe)
    assert np.array_equal(draw(pipe), draw(make_pipe("sd")))


def test_a_lora_loaded_after_the_accelerator_is_seen_and_put_right(accelerators):
    pipe = accelerated("lora", accelerators)
    add_style(pipe)
    assert pipe.get_active_adapters() == ["style"]  # what diffusers does
    with pytest.warns(UserWarning, match=r"not active: another one was loaded.*`set_perflow_scale\(pipe, 1\)`"):
        draw(pipe)
    draw(pipe)  # said once
    set_perflow_scale(pipe, 1.0)
    assert sorted(pipe.get_active_adapters()) == ["perflow", "style"]
    assert near(quiet(pipe), by_hand(accelerators, style=1.0))
    pipe.set_adapters(["perflow", "style"], [1.0, 0.4])  # the order that works, for other strengths of others
    assert near(quiet(pipe), by_hand(accelerators, style=0.4))


def test_what_reaches_only_the_lora_is_seen_and_put_right(accelerators):
    pipe = accelerated("lora", accelerators)
    pipe.set_adapters("perflow", 0.5)
    with pytest.warns(UserWarning, match="act at the strength 0.5 instead of 1"):
        halved = draw(pipe)
    assert not near(halved, by_hand(accelerators, 0.5))  # its biases and norms are still whole
    set_perflow_scale(pipe, 0.5)
    assert near(quiet(pipe), by_hand(accelerators, 0.5))
    set_delta_scale(pipe, 1.0)  # of the residual alone
    with pytest.warns(UserWarning, match="act at the strength 1 instead of 0.5"):
        draw(pipe)


def test_a_switched_off_lora_is_seen_and_comes_back_without_the_others(accelerators):
    pipe = accelerated("lora", accelerators)
    add_style(pipe)
    set_perflow_scale(pipe, 1.0)
    pipe.disable_lora()
    with pytest.warns(UserWarning, match=r"switched off, e.g. by `disable_lora\(\)`"):
        draw(pipe)
    set_perflow_scale(pipe, 0.7)
    assert pipe.get_active_adapters() == ["perflow"]
    assert near(quiet(pipe), by_hand(accelerators, 0.7))


def test_a_call_with_a_scale_of_nought_leaves_another_strength_which_the_next_call_says(accelerators):
    pipe = accelerated("lora", accelerators, 0.8)
    unet_call = pipe.unet.forward
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    unet_call(sample, 500, text, cross_attention_kwargs={"scale": 0.5})
    assert near(quiet(pipe), by_hand(accelerators, 0.8))  # diffusers puts it back
    unet_call(sample, 500, text, cross_attention_kwargs={"scale": 0.0})  # and here it does not
    with pytest.warns(UserWarning, match=r"strength 1 instead of 0.8.*cross_attention_kwargs"):
        draw(pipe)
    set_perflow_scale(pipe, 0.8)
    assert near(quiet(pipe), by_hand(accelerators, 0.8))


@pytest.mark.parametrize("how", ["unload_lora_weights", "delete_adapters"])
def test_a_removed_lora_is_seen_and_has_no_strength(how, accelerators, bits):
    pipe = accelerated("lora", accelerators)
    pipe.unload_lora_weights() if how == "unload_lora_weights" else pipe.delete_adapters("perflow")
    before = bits.copy(pipe.unet)
    with pytest.warns(UserWarning, match="was removed from the UNet"):
        draw(pipe)
    with pytest.raises(ArtifactError, match="was removed from the UNet"):
        set_perflow_scale(pipe, 0.5)
    assert bits.same(bits.copy(pipe.unet), before)
    unload_perflow(pipe)
    assert np.array_equal(draw(pipe), draw(make_pipe("sd")))


def test_fusing_others_hides_it_and_fusing_itself_does_not(accelerators, tmp_path):
    pipe = accelerated("lora", accelerators)
    add_style(pipe)
    set_perflow_scale(pipe, 1.0)
    pipe.fuse_lora(adapter_names=["style"])
    with pytest.warns(UserWarning, match="other LoRAs are fused into its layers"):
        draw(pipe)
    with pytest.raises(ArtifactError, match=r"unfuse_lora\(\)` first"):
        set_perflow_scale(pipe, 0.5)
    with warnings.catch_warnings():  # PEFT warns of layers in which nothing is fused
        warnings.simplefilter("ignore")
        pipe.unfuse_lora()
    pipe.delete_adapters("style")
    quiet(pipe)
    pipe.fuse_lora(adapter_names=["perflow"])
    assert near(quiet(pipe), by_hand(accelerators))


def test_an_export_of_what_is_not_at_work_is_refused(accelerators, tmp_path):
    pipe = accelerated("lora", accelerators)
    pipe.disable_lora()
    with pytest.raises(ArtifactError, match=r"not whole in this pipeline.*switched off"):
        export_pipeline(pipe, tmp_path / "out", licence="mit")
    assert not (tmp_path / "out").exists()


def test_a_strength_that_cannot_be_set_changes_nothing(accelerators, bits):
    with pytest.raises(ArtifactError, match="Nothing is loaded"):
        set_perflow_scale(make_pipe("sd"), 1.0)
    pipe = accelerated("lora", accelerators)
    for wrong in ("x", float("nan"), None):
        with pytest.raises(ArtifactError, match="not a finite number"):
            set_perflow_scale(pipe, wrong)
    pipe.unet.conv_norm_out.bias.add_(1.0)  # a weight of the residual
    before = bits.copy(pipe.unet)
    with pytest.raises(MergeError, match="have changed since the merge"):
        set_perflow_scale(pipe, 0.5)
    assert bits.same(bits.copy(pipe.unet), before)
    with pytest.warns(UserWarning, match="switched off"):
        pipe.disable_lora()
        pipe.scheduler.set_timesteps(4)
    permanent = make_pipe("sd")
    load_perflow(permanent, accelerators["sd"].folder, backup="none")
    quiet(permanent)
    with pytest.raises(MergeError, match="backup='none'"):
        set_perflow_scale(permanent, 0.5)


def test_a_compiled_network_is_watched_like_any_other(accelerators):
    pipe = accelerated("lora", accelerators)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe.scheduler.set_timesteps(4)
    pipe.unet.disable_lora()
    with pytest.warns(UserWarning, match="switched off"):
        pipe.scheduler.set_timesteps(4)


def test_the_watch_is_of_this_scheduler_and_travels_in_no_file(accelerators, tmp_path):
    pipe = accelerated("delta", accelerators)
    pipe.scheduler.save_pretrained(tmp_path)
    made = [
        PeRFlowScheduler.from_pretrained(tmp_path),
        PeRFlowScheduler.from_config(pipe.scheduler.config),
        EulerDiscreteScheduler.from_config(pipe.scheduler.config),
    ]
    unload_perflow(pipe)
    for scheduler in made:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            scheduler.set_timesteps(4)


def test_another_scheduler_of_the_user_gives_way_to_the_former_one(accelerators):
    pipe = make_pipe("sd")
    former = pipe.scheduler
    load_perflow(pipe, accelerators["sd"].folder)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    unload_perflow(pipe)
    assert pipe.scheduler is former


BLOCKS = {"down": 0.5, "mid": 0.25, "up": {"block_0": [0.1, 0.8], "block_1": 1.5}, "conv_in": 0.3, "time_embedding": 2}


@WAYS
def test_strength_by_block_is_that_of_the_whole_delta_by_block(way, accelerators):
    """The judge is the delta, multiplied name by name and added to the base's weights."""
    wanted = make_pipe("sd")
    state = wanted.unet.state_dict()
    for name, change in load_file(accelerators["sd"].delta).items():
        top, number, kind, place = (name.split(".") + [""] * 3)[:4]
        by_block = {"down_blocks": 0.5, "mid_block": 0.25, "conv_in": 0.3, "time_embedding": 2}
        by_block["up_blocks"] = (
            1.5 if number == "1" else 0.1 if (kind, place) in (("resnets", "0"), ("attentions", "0")) else 0.8
        )
        state[name] += change * by_block.get(top, 1)
    wanted.scheduler = PeRFlowScheduler.from_config(wanted.scheduler.config, prediction_type="ddim_eps")
    for pipe in (accelerated(way, accelerators, BLOCKS), accelerated(way, accelerators, 0.7)):
        set_perflow_scale(pipe, BLOCKS)
        assert near(quiet(pipe), draw(wanted))
        set_perflow_scale(pipe, 1)
        assert near(quiet(pipe), by_hand(accelerators))
        unload_perflow(pipe)
        assert np.array_equal(draw(pipe), draw(make_pipe("sd")))


def test_an_attached_lora_has_the_strengths_by_block_that_diffusers_gives_it(accelerators):
    """The judge is `set_adapters` on a LoRA of attention layers, the only ones that diffusers takes mappings for."""
    scale = {"down": {"block_1": [0.5]}, "mid": 0.25, "up": {"block_0": [0.1, 0.8]}}

    def strengths(unet, name):
        layers = ((place, layer) for place, layer in unet.named_modules() if name in getattr(layer, "scaling", {}))
        return {place: layer.scaling[name] / layer.lora_alpha[name] * layer.r[name] for place, layer in layers}

    other = make_pipe("sd")
    add_style(other)
    other.unet.set_adapters("style", scale)
    wanted = strengths(other.unet, "style")
    found = strengths(accelerated("lora", accelerators, scale).unet, "perflow")
    assert set(wanted.values()) == {0.5, 0.25, 0.1, 0.8}
    assert {place: found[place] for place in wanted} == pytest.approx(wanted)


def test_a_strength_by_block_is_watched_block_by_block(accelerators):
    pipe = accelerated("lora", accelerators, {"up": 0.5})
    quiet(pipe)
    pipe.set_adapters("perflow", 0.5)
    with pytest.warns(UserWarning, match=r"strength 0.5 instead of 1.*set_perflow_scale\(pipe, {\"up\": 0.5}\)"):
        draw(pipe)
    set_perflow_scale(pipe, {"up": 0.5})
    set_delta_scale(pipe, {"up_blocks": 0.5})  # the same for what is merged beside it, in other words
    quiet(pipe)
    set_delta_scale(pipe, 0.5)
    with pytest.warns(UserWarning, match="strength 0.5 instead of 1"):
        draw(pipe)
    nowhere = {"down": 0, "mid": 0, "up": 0} | dict.fromkeys(("conv_in", "conv_out", "conv_norm_out"), 0)
    nowhere["time_embedding"] = 0
    for way in ("delta", "lora", "merged lora"):
        pipe = accelerated(way, accelerators, nowhere)
        with pytest.warns(UserWarning, match="strength is 0"):
            draw(pipe)


@WAYS
def test_a_strength_of_blocks_that_are_not_there_changes_nothing(way, accelerators, bits):
    pipe = accelerated(way, accelerators, {"up": 0.5})
    before, picture = bits.copy(pipe.unet), quiet(pipe)
    for wrong in ({"up": {"block_7": 1}}, {"IN99": 1}, {"down": float("inf")}, {"up_blocks.0.nothing": 1}):
        with pytest.raises(ArtifactError, match=r"(block_7|IN99|inf|nothing).*Nothing was changed"):
            set_perflow_scale(pipe, wrong)
        plain = make_pipe("sd")
        with pytest.raises(ArtifactError, match=r"(block_7|IN99|inf|nothing).*Nothing was changed"):
            load_perflow(plain, accelerators["sd"].folder, way.split()[-1], wrong)
        assert not hasattr(plain.unet, "peft_config") and np.array_equal(draw(plain), draw(make_pipe("sd")))
    assert bits.same(bits.copy(pipe.unet), before) and np.array_equal(quiet(pipe), picture)


def test_an_export_has_the_strengths_by_block(accelerators, tmp_path):
    for way in ("delta", "lora"):
        pipe = accelerated(way, accelerators, BLOCKS)
        picture = quiet(pipe)
        export_pipeline(pipe, tmp_path / way, licence="mit")
        assert np.array_equal(quiet(pipe), picture)
        again = make_pipe("sd")
        again.unet = type(again.unet).from_pretrained(tmp_path / way, subfolder="unet")
        again.scheduler = PeRFlowScheduler.from_config(again.scheduler.config, prediction_type="ddim_eps")
        assert near(draw(again), picture)
