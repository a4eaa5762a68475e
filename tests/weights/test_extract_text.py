"""Extraction from a LoRA with text encoder layers, alphas of any size, and headers that tell of the new tensors."""

import numpy as np
import pytest
import torch
from lora_pipelines import (
    FAMILIES,
    added,
    distance,
    fused,
    kohya_file_tensors,
    make_pipe,
    random_layers,
)
from safetensors.torch import load_file, save_file

from perflow_diffusers.weights import convert_lora, extract_lora, open_weights, shrink_delta
from perflow_diffusers.weights.read.lora import lora_layers

KOHYA_HEADER = {
    "ss_network_dim": "3",
    "ss_network_alpha": "2.5",
    "ss_network_args": '{"conv_dim": "3", "conv_alpha": "1.5"}',
    "ss_network_module": "lycoris.kohya",
    "sshs_model_hash": "0123",
    "sshs_legacy_hash": "4567",
    "modelspec.hash_sha256": "0x89",
    "ss_base_model_version": "sdxl_base_v1-0",
    "modelspec.title": "a style",
}
HASHES = {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def kohya(family, tmp_path):
    layers = random_layers(make_pipe(family))
    path = tmp_path / "k.safetensors"
    save_file(kohya_file_tensors(make_pipe(family), layers), path, KOHYA_HEADER)
    return path, layers


@pytest.mark.parametrize("alpha", [None, 1.0, 7])
def test_layers_of_text_encoders_are_made_anew_too(family, kohya, tmp_path, alpha):
    path, layers = kohya
    report = extract_lora(path, tmp_path / "l.safetensors", rank=8, alpha=alpha, dtype=torch.float32)
    assert distance(fused(family, report.path), added(family, layers)) <= 2e-7
    found = {(layer.component, layer.module): layer for layer in lora_layers(open_weights(report.path))}
    assert found.keys() == {(part, module.removeprefix("text_model.")) for part, module in layers}
    assert all(layer.alpha == (alpha or layer.rank) for layer in found.values())
    assert report.relative_error < 1e-6 and any(layer.name.startswith("text_encoder.") for layer in report.layers)


def test_lower_ranks_of_text_encoders_are_the_best_ones(tmp_path):
    layers = random_layers(make_pipe("sdxl"))
    given = kohya_file_tensors(make_pipe("sdxl"), layers)
    out = extract_lora(given, tmp_path / "l.safetensors", rank=1, alpha=0.5, dtype=torch.float32).path
    factors = {name: value.double().flatten(1).numpy() for name, value in load_file(out).items()}
    for (component, module), (down, up, alpha) in layers.items():
        if component == "unet":
            continue
        whole = (up.double() @ down.double() * alpha / len(down)).numpy()
        stem = f"{component}.text_model.{module}" if module.startswith("encoder.") else f"{component}.{module}"
        product = factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"] * 0.5
        best = np.sqrt((np.linalg.svd(whole, compute_uv=False)[1:] ** 2).sum())
        assert np.linalg.norm(whole - product) == pytest.approx(best, rel=5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("alpha", [0.25, 16])
def test_the_report_measures_what_alpha_makes_of_the_factors(delta, tmp_path, alpha, dtype):
    report = extract_lora(delta, tmp_path / "l.safetensors", rank=4, alpha=alpha, dtype=dtype)
    tensors = load_file(report.path)
    for layer in report.layers:
        stem = f"unet.{layer.name.removesuffix('.weight')}"
        up, down = (tensors[f"{stem}.lora_{role}.weight"].double().flatten(1) for role in "BA")
        whole = delta[layer.name].double().flatten(1)
        error = (up @ down * alpha / layer.rank - whole).norm() / whole.norm()
        assert layer.relative_error == pytest.approx(error.item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), True, "8"])
def test_alphas_that_are_none(delta, tmp_path, alpha):
    with pytest.raises(ValueError, match="alpha="):
        extract_lora(delta, tmp_path / "l.safetensors", alpha=alpha)


def test_headers_say_nothing_of_tensors_that_are_gone(kohya, tmp_path):
    path, _ = kohya
    smaller = extract_lora(path, tmp_path / "s.safetensors", rank=1, alpha=0.5).path
    header = open_weights(smaller).metadata
    assert not set(header) & (set(KOHYA_HEADER) - {"ss_base_model_version", "modelspec.title"})
    assert header["ss_base_model_version"] == "sdxl_base_v1-0" and header["modelspec.title"] == "a style"
    header = open_weights(convert_lora(smaller, tmp_path / "sk.safetensors", "kohya")).metadata
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("1", "0.5")
    assert header["ss_network_module"] == "networks.lora" and not HASHES & set(header)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_conversion_keeps_what_still_holds(kohya, tmp_path, layout):
    path, _ = kohya
    header = open_weights(convert_lora(path, tmp_path / "c.safetensors", layout)).metadata
    assert not HASHES & set(header)
    assert KOHYA_HEADER.items() - {(key, KOHYA_HEADER[key]) for key in HASHES} <= header.items()


def test_facts_of_another_file_are_put_right_for_kohya(tmp_path):
    """A header that says ranks and alphas of which no layer is: from a tool that resized and left them."""
    layers = random_layers(make_pipe("sd15"), uniform=True)
    save_file(kohya_file_tensors(make_pipe("sd15"), layers), tmp_path / "k.safetensors", {"ss_network_dim": "128"})
    header = open_weights(convert_lora(tmp_path / "k.safetensors", tmp_path / "b.safetensors", "kohya")).metadata
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("3", "1.5")


def test_a_smaller_delta_has_other_bytes(delta, tmp_path):
    save_file(delta, tmp_path / "d.safetensors", {"perflow_format": "delta-1", "sshs_model_hash": "01", "steps": "4"})
    path = shrink_delta(tmp_path / "d.safetensors", tmp_path / "s.safetensors", "bfloat16").path
    header = open_weights(path).metadata
    assert "sshs_model_hash" not in header and header["steps"] == "4"
