"""LoRAs of transformers: what `extract_lora` writes is the delta in diffusers, too; those of others merge here."""

import copy

import pytest
import torch
from flow_builders import FLOW
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from perflow_diffusers import compute_delta, extract_lora, merge_delta, unmerge_delta
from perflow_diffusers.errors import WeightSourceError

ONE_EACH = ("sd3-text-to-image", "flux-text-to-image", "qwen-image", "z-image", "wan-text-to-video")


def is_linear(name, weight):
    return name.endswith(".weight") and weight.ndim == 2


def fine_tuned(transformer):
    """A copy of a transformer whose linear layers have moved."""
    other, generator = copy.deepcopy(transformer), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if is_linear(name, weight):
                weight += 0.01 * torch.randn(weight.shape, generator=generator)
    return other


def fused(pipe):
    """The weights of a transformer after diffusers fused the LoRA that is loaded, by plain names."""
    pipe.transformer.fuse_lora()
    state = pipe.transformer.state_dict()
    return {name.replace(".base_layer", ""): weight for name, weight in state.items() if ".lora_" not in name}


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_lora_of_full_rank_is_the_delta_for_diffusers_and_for_us(name, tmp_path):
    pipe = FLOW[name](None).pipe
    before = copy.deepcopy(pipe.transformer.state_dict())
    wanted = fine_tuned(pipe.transformer).state_dict()
    compute_delta(pipe.transformer, fine_tuned(pipe.transformer), tmp_path / "delta.safetensors", dtype="float32")
    extract_lora(
        tmp_path / "delta.safetensors",
        tmp_path / "lora.safetensors",
        rank=10_000,
        exact=True,
        residual=False,
        dtype="float32",
    )
    assert all(key.startswith("transformer.") for key in load_file(tmp_path / "lora.safetensors"))

    merge_delta(pipe, tmp_path / "lora.safetensors")
    for part, weight in pipe.transformer.state_dict().items():
        torch.testing.assert_close(weight, wanted[part], rtol=0, atol=2e-6, msg=part)
    unmerge_delta(pipe)
    assert all(torch.equal(weight, before[part]) for part, weight in pipe.transformer.state_dict().items())

    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    theirs = fused(pipe)
    assert theirs.keys() == wanted.keys()
    for part, weight in theirs.items():
        torch.testing.assert_close(weight, wanted[part], rtol=0, atol=2e-6, msg=part)


def with_adapter(pipe):
    """A LoRA of PEFT's on every attention, of rank 3 and alpha 5, all its numbers random."""
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.transformer.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for part, weight in pipe.transformer.named_parameters():
            if ".lora_" in part:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return get_peft_model_state_dict(pipe.transformer)


@pytest.mark.parametrize("name", ONE_EACH)
def test_loras_of_others_are_merged_under_every_name(name, tmp_path):
    """As diffusers saves them, as PEFT calls them, and as kohya does; alpha is in the file or in its header."""
    pipe = FLOW[name](None).pipe
    plain = copy.deepcopy(pipe.transformer)
    before = copy.deepcopy(plain.state_dict())
    peft = {key: weight.clone().contiguous() for key, weight in with_adapter(pipe).items()}
    metadata = {"transformer": pipe.transformer.peft_config["default"].to_dict()}
    type(pipe).save_lora_weights(
        tmp_path, transformer_lora_layers=peft, transformer_lora_adapter_metadata=metadata["transformer"]
    )
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "diffusers.safetensors")
    modules = sorted({key.partition(".lora_")[0] for key in peft})
    alphas = {f"{module}.alpha": torch.tensor(5.0) for module in modules}
    save_file(
        {f"base_model.model.{key}": weight for key, weight in (peft | alphas).items()}, tmp_path / "peft.safetensors"
    )
    kohya = {}
    for module in modules:
        flat = f"lora_transformer_{module.replace('.', '_')}"
        kohya[f"{flat}.lora_down.weight"] = peft[f"{module}.lora_A.weight"]
        kohya[f"{flat}.lora_up.weight"] = peft[f"{module}.lora_B.weight"]
        kohya[f"{flat}.alpha"] = torch.tensor(5.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    wanted = fused(pipe)
    assert any(not torch.equal(weight, before[part]) for part, weight in wanted.items())
    for layout in ("diffusers", "peft", "kohya"):
        with merge_delta(plain, tmp_path / f"{layout}.safetensors"):
            for part, weight in plain.state_dict().items():
                torch.testing.assert_close(weight, wanted[part], rtol=0, atol=2e-6, msg=f"{layout} {part}")
        assert all(torch.equal(weight, before[part]) for part, weight in plain.state_dict().items())


def test_another_transformer_s_lora_is_refused_and_nothing_changed(tmp_path):
    sd3, wan = FLOW["sd3-text-to-image"](None).pipe, FLOW["wan-text-to-video"](None).pipe
    before = copy.deepcopy(sd3.transformer.state_dict())
    compute_delta(wan.transformer, fine_tuned(wan.transformer), tmp_path / "delta.safetensors")
    extract_lora(tmp_path / "delta.safetensors", tmp_path / "lora.safetensors", rank=2, residual=False)
    with pytest.raises(WeightSourceError, match="is a LoRA for a transformer"):
        merge_delta(sd3, tmp_path / "lora.safetensors")
    assert all(torch.equal(weight, before[part]) for part, weight in sd3.transformer.state_dict().items())
