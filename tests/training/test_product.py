"""Products: their values from outside our code, the forms that are written, and how much is held while they are."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from live_tensors import live_bytes, only_new
from peft import PeftModel
from safetensors.torch import load_file, save_file

from perflow_diffusers import load_miniature
from perflow_diffusers.io import writer
from perflow_diffusers.miniature import miniature_folder
from perflow_diffusers.weights import content_hash, open_weights
from perflow_training.config import ConfigError, TrainingConfig, load_config
from perflow_training.export import header, open_base, write_products
from perflow_training.lazy import read_afresh
from perflow_training.student import build_student, lora_config, trained

LORA = {"lora_rank": 3, "lora_alpha": 6.0}


def config(**options):
    return TrainingConfig(pretrained_model_name_or_path=str(miniature_folder() / "avatars"), **options)


def moved(network):
    """Trained weights as a run may leave them: each a little off, LoRA's second factors not zero."""
    torch.manual_seed(1)
    return {name: value.detach() + 0.01 * torch.randn_like(value) for name, value in trained(network).items()}


@pytest.fixture(scope="module")
def pipe():
    return load_miniature()


@pytest.fixture(scope="module")
def lora_weights(pipe):
    return moved(build_student(pipe.unet, config(**LORA)))


def test_all_weights_are_the_student_bit_for_bit_and_the_delta_their_difference(pipe, tmp_path):
    weights = moved(load_miniature().unet)
    options = config(solve_guidance=7.5)
    paths = write_products(options, weights, tmp_path)
    assert set(paths) == {"student", "delta"}
    student = UNet2DConditionModel.from_pretrained(paths["student"]).state_dict()
    assert all(torch.equal(student[name], value) for name, value in weights.items())
    delta = open_weights(paths["delta"])
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(delta[name], (weights[name] - value).half())
    assert delta.metadata["base_hash"] == content_hash(pipe.unet)
    assert header(options, open_base(options).pipeline) == header(options, pipe)


def test_a_lora_s_forms_are_what_peft_merges(pipe, lora_weights, tmp_path):
    paths = write_products(config(**LORA), lora_weights, tmp_path, ["student", "delta", "lora"])
    student, delta = UNet2DConditionModel.from_pretrained(paths["student"]).state_dict(), load_file(paths["delta"])
    peft = PeftModel(load_miniature().unet, lora_config(config(**LORA)))
    with torch.no_grad():
        for name, value in trained(peft).items():
            value.copy_(lora_weights[name.removeprefix("base_model.model.")])
    merged = peft.merge_and_unload().state_dict()
    changed = 0
    for name, value in pipe.unet.state_dict().items():
        torch.testing.assert_close(student[name], merged[name], rtol=0, atol=1e-7)
        factors = [lora_weights.get(f"{name.removesuffix('.weight')}.lora_{x}.default.weight") for x in "BA"]
        if factors[0] is None:
            assert torch.equal(student[name], value) and not delta[name].any()
            continue
        up, down = (factor.double().flatten(1) for factor in factors)
        wanted = (up @ down * 6 / 3).reshape(value.shape)
        torch.testing.assert_close(delta[name].double(), wanted, rtol=2**-10, atol=3e-7)
        changed += 1
    assert changed == len(lora_weights) // 2
    lora = load_file(paths["lora"])
    assert all(torch.equal(lora[f"unet.{name.replace('.default', '')}"], v.half()) for name, v in lora_weights.items())
    assert open_weights(paths["lora"]).metadata["base_hash"] == content_hash(pipe.unet)


@pytest.mark.parametrize(
    ("options", "forms"),
    [({}, {"student", "delta"}), (LORA, {"lora"}), ({**LORA, "product": ["artifact"]}, {"lora", "artifact"})],
)
def test_a_run_writes_what_was_trained_or_asked_for(pipe, lora_weights, tmp_path, options, forms):
    weights = lora_weights if options else moved(load_miniature().unet)
    assert set(write_products(config(**options), weights, tmp_path)) == forms
    assert (tmp_path / "unet").exists() == ("student" in forms)
    assert (tmp_path / "perflow.safetensors").exists() == ("delta" in forms)
    if "artifact" in forms:
        assert {path.suffix for path in (tmp_path / "artifact").iterdir()} >= {".safetensors", ".json", ".md"}


def test_forms_that_do_not_exist_are_refused():
    for wrong in ("[kohya]", "[]"):
        with pytest.raises(ConfigError, match="must name some of student, delta, lora, artifact"):
            load_config(None, ["pretrained_model_name_or_path=a", "train_captions=b", f"product={wrong}"])


@pytest.mark.parametrize("options", [{}, LORA], ids=["all weights", "lora"])
def test_no_more_than_a_few_tensors_are_held(pipe, lora_weights, tmp_path, monkeypatch, options):
    """Every form from a checkpoint's file: neither the base nor the student nor the delta is ever whole in memory."""
    weights = lora_weights if options else moved(load_miniature().unet)
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "ema.safetensors")
    whole = sum(value.nbytes for value in pipe.unet.state_dict().values())
    largest = max(value.nbytes for value in pipe.unet.state_dict().values())
    held, write = [], writer.tensor_bytes

    def looked_at(tensor):
        held.append(live_bytes())
        return write(tensor)

    monkeypatch.setattr(writer, "tensor_bytes", looked_at)
    with only_new():
        write_products(
            config(**options), read_afresh(tmp_path / "ema.safetensors"), tmp_path / "out", ["student", "delta"]
        )
    assert len(held) >= 2 * len(pipe.unet.state_dict())
    assert 0 < max(held) < min(5 * largest, whole / 2)
