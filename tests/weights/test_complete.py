"""Complete weights and differences are told apart by their numbers: whole models never pass, real deltas always do."""

import zlib

import pytest
import torch
from diffusers import UNet2DConditionModel
from ldm_names import CONFIGS
from safetensors.torch import save_file

from perflow_diffusers.miniature import load_miniature
from perflow_diffusers.weights import (
    DeltaError,
    MergeError,
    check_extract,
    check_shrink,
    combine,
    compute_delta,
    extract_lora,
    merge_delta,
    merge_files,
    plan_merge,
    shrink_delta,
)
from perflow_diffusers.weights.make.comfy import check_comfy, delta_for_comfy
from perflow_diffusers.weights.read.complete import check_complete, check_difference, is_complete_beside
from perflow_diffusers.weights.read.source import WeightSource

FAMILIES = {
    "sd15": {"cross_attention_dim": 24},
    "sd21": {"cross_attention_dim": 32, "use_linear_projection": True, "attention_head_dim": (2, 4)},
    "sdxl": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 40,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
    },
    "inpainting": {"in_channels": 9},
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
DELTAS = {
    "1 %": lambda name, weight, noise: 0.01 * weight,
    "30 %": lambda name, weight, noise: 0.3 * weight,
    "-30 %": lambda name, weight, noise: -0.3 * weight,
    "gains alone": lambda name, weight, noise: 0.3 * weight if ".norm" in name or "norm_out" in name else 0 * weight,
    "no norms": lambda name, weight, noise: 0 * weight if "norm" in name else 0.05 * noise * weight.std(),
    "random 30 %": lambda name, weight, noise: 0.3 * noise * weight.square().mean().sqrt(),
    "random gains on 90 %": lambda name, weight, noise: 0.3 * weight + 0.02 * noise,
}


def difference(state, kind, dtype):
    generator = torch.Generator().manual_seed(5)
    noise = {name: torch.randn(weight.shape, generator=generator) for name, weight in state.items()}
    return {
        name: DELTAS[kind](name, weight.float(), noise[name]).nan_to_num().to(dtype) for name, weight in state.items()
    }


@pytest.fixture(params=[*FAMILIES, "miniature"])
def model(request, make_unet):
    """The state dict of a UNet; of the miniature the trained one."""
    if request.param == "miniature":
        return load_miniature().unet.state_dict()
    return make_unet(**FAMILIES[request.param]).state_dict()


@pytest.mark.parametrize("dtype", DTYPES)
def test_complete_models_never_pass_for_deltas(model, dtype, tmp_path):
    generator = torch.Generator().manual_seed(1)
    tuned = {
        name: (weight + 0.05 * weight.abs().mean() * torch.randn(weight.shape, generator=generator)).to(dtype)
        for name, weight in model.items()
    }
    save_file(tuned, tmp_path / "model.safetensors", {"format": "pt"})
    save_file(tuned, tmp_path / "lying.safetensors", {"format": "pt", "perflow_format": "delta-1"})
    for source in (tmp_path / "model.safetensors", tmp_path / "lying.safetensors"):
        with pytest.raises(MergeError, match=r"complete weights, not a delta.*compute_delta\(base, tuned\)"):
            merge_files(model, source, tmp_path / "out.safetensors")
        with pytest.raises(DeltaError, match="complete weights, not a delta"):
            shrink_delta(source, tmp_path / "out.safetensors", "int8")
        with pytest.raises(DeltaError, match="complete weights, not a delta"):
            check_shrink(source, "float16")
        with pytest.raises(DeltaError, match="complete weights, not a delta"):
            extract_lora(source, tmp_path / "out.safetensors", rank=2)
        with pytest.raises(DeltaError, match="complete weights, not a delta"):
            check_extract(source)
        for act in (check_comfy, lambda given: delta_for_comfy(given, tmp_path / "out.safetensors")):
            with pytest.raises(DeltaError, match="complete weights, not a delta"):
                act(source)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("kind", list(DELTAS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e5m2])
def test_deltas_never_pass_for_complete_models(model, kind, dtype, tmp_path):
    delta = difference(model, kind, dtype)
    merge_files(model, delta, tmp_path / "out.safetensors", dry_run=True)
    check_shrink(delta, "float16")
    check_extract(delta)
    check_comfy(delta)
    if kind != "gains alone" and dtype == torch.float32:
        for pair in ((delta, model), (model, delta)):
            with pytest.raises(DeltaError, match="is a difference, not complete weights"):
                compute_delta(*pair)


def test_what_old_versions_made_of_whole_models_is_refused(make_unet, bits, same, tmp_path):
    """An int8 file and a LoRA with a residual, as `shrink_delta` and `extract_lora` wrote them of a model."""
    from perflow_diffusers.weights.make.shrink import quantise

    unet, packed = make_unet(), {}
    before, state = bits(unet), make_unet(seed=0).state_dict()
    for name, weight in state.items():
        if weight.dim() > 1:
            packed[name], packed[f"{name}.scale"] = quantise(weight)
        else:
            packed[name] = weight
    save_file(packed, tmp_path / "int8.safetensors", {"perflow_format": "delta-int8-1"})
    factors = {
        "unet.conv_out.lora_A.weight": torch.ones(1, 8, 3, 3),
        "unet.conv_out.lora_B.weight": torch.ones(4, 1, 1, 1),
    }
    save_file(factors, tmp_path / "lora.safetensors", {"perflow_residual": "lora.residual.safetensors"})
    rest = {name: weight for name, weight in state.items() if weight.dim() == 1}
    save_file(rest, tmp_path / "lora.residual.safetensors")
    for name in ("int8", "lora"):
        with pytest.raises(MergeError, match="complete weights, not a delta"):
            merge_delta(unet, tmp_path / f"{name}.safetensors")
    assert same(bits(unet), before)
    with pytest.raises(DeltaError, match="complete weights"):
        shrink_delta(tmp_path / "int8.safetensors", tmp_path / "out.safetensors", "float16")


def test_base_and_delta_the_other_way_round(model, tmp_path):
    delta = difference(model, "random 30 %", torch.float32)
    with pytest.raises(MergeError, match="complete weights, not a delta"):
        merge_files(delta, model, tmp_path / "out.safetensors")


def test_sharded_models_and_models_without_norms(make_unet, tmp_path):
    unet = make_unet()
    unet.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    with pytest.raises(MergeError, match="complete weights"):
        plan_merge(unet, tmp_path / "sharded")
    with pytest.raises(DeltaError, match="complete weights"):
        check_shrink(tmp_path / "sharded", "int8")
    state = unet.state_dict()
    bare = {name: weight for name, weight in state.items() if weight.dim() > 1}
    save_file(bare, tmp_path / "bare.safetensors", {"identical": " ".join(name for name in state if name not in bare)})
    with pytest.raises(MergeError, match="complete weights"):
        plan_merge(unet, tmp_path / "bare.safetensors")


def test_a_model_among_deltas_is_not_combined(model, tmp_path):
    delta = difference(model, "30 %", torch.float32)
    combine([delta, delta], tmp_path / "out.safetensors", dry_run=True)
    for sources in ([model], [delta, model], [model, delta]):
        with pytest.raises(DeltaError, match="complete weights, not a delta"):
            combine(sources, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def drawn(name):
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def trained(shapes, gain, share=1.0):
    """Weights with a trained model's figures, at these shapes, drawn when they are read; times `share`.

    Gains `gain` +- 30 % from channel to channel, each norm its own 0.3 to 1.7 of that, one in ten near 0, that of the
    end thrice as large; layers of 0.6 to 1.3 / sqrt(inputs), one in six still near the 0 that it began at.
    """

    def read(name):
        shape, generator = shapes[name], drawn(name)
        luck = torch.rand(2, generator=generator).tolist()
        if len(shape) == 1 and name.endswith(".weight"):
            own = 3 if name.startswith("conv_norm_out") else 0.02 if luck[0] < 0.1 else 0.3 + 1.4 * luck[1]
            return share * gain * own * (1 + 0.3 * torch.randn(shape, generator=generator))
        own = 0.02 if luck[0] < 1 / 6 else 0.6 + 0.7 * luck[1]
        row = torch.randn(1, *shape[1:], generator=generator) * own / max(1, torch.Size(shape[1:]).numel()) ** 0.5
        return share * (row if len(shape) > 1 else row[0]).expand(shape)

    return WeightSource(f"{share:g} x a model", shapes, dict.fromkeys(shapes, torch.float32), read)


@pytest.mark.parametrize("family", ["SD 1.5", "KOALA-700M"])
@pytest.mark.parametrize("gain", [0.05, 5.0])
def test_gains_of_any_size_are_told_in_models_of_real_size(family, gain):
    with torch.device("meta"):
        state = UNet2DConditionModel(**CONFIGS[family]).state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in state.items()}
    names, model = {name: name for name in shapes}, trained(shapes, gain)
    with pytest.raises(DeltaError, match="complete weights, not a delta"):
        check_difference(model, names)
    assert is_complete_beside(model, names, trained(shapes, 0.9 * gain))
    for share in (0.3, -0.3, 0.01):
        delta = trained(shapes, gain, share)
        check_difference(delta, names)
        assert not is_complete_beside(delta, names, model)
        with pytest.raises(DeltaError, match="is a difference, not complete weights"):
            check_complete(model, names, delta, names)
    check_complete(model, names, trained(shapes, 1.3 * gain), names)
