"""Live models with adapters attached: their numbers are read as the model runs, or not at all."""

import copy

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel

from perflow_diffusers.weights import (
    MergeError,
    WeightSourceError,
    compute_delta,
    content_hash,
    convert_lora,
    describe_weights,
    extract_lora,
    merge_delta,
    merge_files,
    open_weights,
    shrink_delta,
    unmerge_delta,
)

TARGETS = ["to_q", "to_v", "conv1", "time_emb_proj"]
CONFIGS = {
    "lora": peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False),
    "dora": peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True, init_lora_weights=False),
    "loha": peft.LoHaConfig(r=2, target_modules=TARGETS, init_weights=False),
    "lokr": peft.LoKrConfig(r=2, target_modules=TARGETS, init_weights=False),
    "oft": peft.OFTConfig(r=2, target_modules=["to_q", "to_v"], init_weights=False, oft_block_size=0),
    "ia3": peft.IA3Config(target_modules=["to_q"], feedforward_modules=[], init_ia3_weights=False),
}


@pytest.fixture(params=list(CONFIGS))
def adapted(request, make_unet):
    """A plain UNet, and the same with an adapter that acts."""
    torch.manual_seed(3)
    unet = make_unet()
    peft.inject_adapter_in_model(CONFIGS[request.param], unet, "style")
    return make_unet(), unet.requires_grad_(False)


def outputs(unet):
    noise, text = torch.linspace(-1, 1, 256).view(1, 4, 8, 8), torch.linspace(-1, 1, 48).view(1, 3, 16)
    with torch.no_grad():
        return unet(noise, torch.tensor(500), text).sample


def layers(unet):
    return [layer for layer in unet.modules() if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)]


def rebuilt(unet, source):
    """A plain UNet of the weights that a source holds."""
    plain = UNet2DConditionModel.from_config(unet.config)
    plain.load_state_dict(dict(source))
    return plain


@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")
def test_what_is_read_computes_what_the_model_computes(adapted):
    """Plain diffusers, given the weights that were read, is the judge; where that cannot be, it is an error."""
    base, unet = adapted
    acting = outputs(unet)
    assert not torch.allclose(acting, outputs(base), atol=1e-3)
    with pytest.raises(WeightSourceError, match=r"'style' \(in \d+ layers\).*`fuse_lora\(\)`.*first.*unload"):
        open_weights(unet)
    for layer in layers(unet):
        layer.merge()
    assert torch.allclose(outputs(rebuilt(base, open_weights(unet))), acting, atol=1e-4)
    for layer in layers(unet):
        layer.unmerge()
        layer.enable_adapters(False)
    assert torch.allclose(outputs(rebuilt(base, open_weights(unet))), outputs(unet), atol=1e-5)
    for layer in layers(unet):
        layer.enable_adapters(True)
        layer.delete_adapter("style")
    assert torch.allclose(outputs(rebuilt(base, open_weights(unet))), outputs(base), atol=1e-4)


def test_merging_beside_any_adapter_still_works(adapted, make_delta, bits, same):
    base, unet = adapted
    before, delta = bits(unet), make_delta(base)
    merge_delta(unet, delta)
    merge_delta(base, delta)
    for layer in layers(unet):
        layer.enable_adapters(False)
    assert torch.equal(outputs(unet), outputs(base))
    unmerge_delta(unet)
    assert same(bits(unet), before)


@pytest.fixture
def styled(make_unet):
    unet = make_unet()
    unet.add_adapter(CONFIGS["lora"], "style")
    return unet.requires_grad_(False)


def test_every_door_refuses_an_adapter_that_would_be_dropped(unet, styled, delta, tmp_path):
    out = tmp_path / "out.safetensors"
    for act in (
        lambda: compute_delta(unet, styled),
        lambda: compute_delta(styled, unet, out),
        lambda: merge_files(styled, delta, out),
        lambda: merge_delta(unet, styled),
        lambda: content_hash(styled),
        lambda: extract_lora(styled, out),
        lambda: shrink_delta(styled, out, "float16"),
    ):
        with pytest.raises(WeightSourceError, match="act beside its weights"):
            act()
    assert not list(tmp_path.iterdir())


def test_a_fused_adapter_is_in_the_weights_until_it_is_disabled(unet, styled):
    acting = outputs(styled)
    styled.fuse_lora()
    assert compute_delta(unet, styled).relative_norm > 0.01
    assert torch.allclose(outputs(rebuilt(unet, open_weights(styled))), acting, atol=1e-5)
    styled.disable_lora()
    with pytest.raises(WeightSourceError, match=r"fused into its weights and disabled.*unfuse_lora"):
        open_weights(styled)
    outputs(styled)  # PEFT has taken it out
    assert compute_delta(unet, styled).relative_norm < 1e-6


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`|Adapter .* was active")
def test_an_adapter_of_scale_zero_or_without_effect_is_none(unet, styled, make_unet, bits, same):
    styled.set_adapters("style", 0.0)
    assert same(dict(open_weights(styled)), bits(unet))
    styled.set_adapters("style", 0.5)
    with pytest.raises(WeightSourceError, match="style"):
        open_weights(styled)
    fresh = make_unet()
    fresh.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS), "new")
    assert same(dict(open_weights(fresh)), bits(unet))
    fresh.add_adapter(CONFIGS["lora"], "second")
    fresh.set_adapters(["new", "second"], [1.0, 0.0])
    assert same(dict(open_weights(fresh)), bits(unet))


def test_peft_models(unet, make_unet, delta, tmp_path):
    wrapped = peft.get_peft_model(make_unet(), copy.deepcopy(CONFIGS["lora"]))
    acting = outputs(wrapped)
    with pytest.raises(WeightSourceError, match=r"UNet2DConditionModel has .*merge_and_unload\(\).*unload\(\)"):
        compute_delta(unet, wrapped)
    with merge_delta(wrapped, delta):
        assert torch.equal(wrapped.get_base_model().conv_in.weight, unet.conv_in.weight + delta["conv_in.weight"])
    assert torch.allclose(outputs(rebuilt(unet, open_weights(wrapped.merge_and_unload()))), acting, atol=1e-5)
    config = peft.LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_out"])
    saving = peft.get_peft_model(make_unet(), config)
    with pytest.raises(WeightSourceError, match="'default'"):
        open_weights(saving)
    with pytest.raises(MergeError, match=r"trained copies in place of conv_out"):
        merge_delta(saving, delta)
    saving.base_model.disable_adapter_layers()
    assert compute_delta(unet, saving).relative_norm == 0


def test_saved_models_with_adapters_attached_are_told_for_what_they_are(unet, styled, delta, bits, same, tmp_path):
    styled.save_pretrained(tmp_path / "attached")
    out = tmp_path / "out.safetensors"
    for source in (tmp_path / "attached", dict(styled.state_dict())):
        for act in (
            lambda source=source: compute_delta(unet, source),
            lambda source=source: compute_delta(source, unet),
            lambda source=source: merge_delta(unet, source),
            lambda source=source: merge_files(source, delta, out),
            lambda source=source: merge_files(unet, source, out),
            lambda source=source: shrink_delta(source, out, "int8"),
            lambda source=source: extract_lora(source, out),
            lambda source=source: convert_lora(source, out, "kohya"),
        ):
            with pytest.raises(WeightSourceError, match=r"saved with adapters attached.*fuse_lora\(\).*save\s+again"):
                act()
    assert not out.exists() and "saved with adapters attached" in str(describe_weights(tmp_path / "attached"))
    state = dict(open_weights(tmp_path / "attached"))  # the recipe of docs/deltas.md
    plain = {name.replace(".base_layer", ""): value for name, value in state.items() if ".lora_" not in name}
    assert same(plain, bits(unet)) and compute_delta(unet, plain).relative_norm == 0
