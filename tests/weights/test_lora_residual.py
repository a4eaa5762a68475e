"""A LoRA with what no LoRA can carry beside it, and layers that it has for text encoders."""

import pytest
import torch
from lora_files import (
    products,
    write_diffusers,
    write_kohya,
)
from safetensors.torch import load_file, save_file

from perflow_diffusers.weights import (
    WeightSourceError,
    merge_delta,
    open_weights,
)


def test_lora_with_residual(make_unet, make_delta, bits, factors, tmp_path):
    unet = make_unet()
    rest = {name: value for name, value in make_delta(unet).items() if value.dim() == 1}
    rest["conv_in.weight"] = make_delta(unet)["conv_in.weight"]
    save_file(rest, tmp_path / "l.residual.safetensors", {"perflow_format": "delta-residual-1"})
    path = write_diffusers(tmp_path / "l.safetensors", factors, perflow_residual="l.residual.safetensors")
    assert open_weights(tmp_path).name == str(tmp_path) and open_weights(tmp_path).kind == "lora"
    before, wanted = bits(unet), products(factors)
    handle = merge_delta(unet, path)
    assert handle.report.untouched == ()
    for name, weight in bits(unet).items():
        exact = before[name].double() + wanted.get(name, 0) + (rest[name].double() if name in rest else 0)
        assert torch.allclose(weight.double(), exact, atol=2e-6)
    handle.undo()
    (tmp_path / "l.residual.safetensors").unlink()
    with pytest.raises(WeightSourceError, match="not beside it"):
        merge_delta(unet, path)
    for name in ("../l.residual.safetensors", "/etc/passwd", "l.bin", "..\\x.safetensors"):
        write_diffusers(path, factors, perflow_residual=name)
        with pytest.raises(WeightSourceError, match=r"not a \.safetensors file beside it"):
            merge_delta(unet, path)


def test_a_residual_of_another_lora_is_refused(unet, factors, tmp_path):
    save_file({"conv_in.weight": torch.zeros(3, 3)}, tmp_path / "l.residual.safetensors")
    path = write_diffusers(tmp_path / "l.safetensors", factors, perflow_residual="l.residual.safetensors")
    with pytest.raises(WeightSourceError, match=r"does not fit.*conv_in\.weight"):
        merge_delta(unet, path)


def test_text_encoder_layers_are_left_out_with_one_warning(unet, factors, tmp_path):
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1": (torch.ones(2, 4), torch.ones(4, 2))}
    tensors = load_file(write_kohya(tmp_path / "k.safetensors", factors))
    for name, (down, up) in text.items():
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    with pytest.warns(UserWarning, match="1 layers .* for text encoders.*load_lora_weights") as caught:
        merge_delta(unet, tensors)
    assert len(caught) == 1 and caught[0].filename == __file__
    only = {name: value for name, value in tensors.items() if name.startswith("lora_te_")}
    with pytest.raises(WeightSourceError, match="no layer for a UNet"):
        merge_delta(unet, only)
