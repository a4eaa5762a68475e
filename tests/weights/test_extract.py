"""Deltas as LoRAs: optimal per layer, loadable by plain diffusers, complete with the residual."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from perflow_diffusers.weights import merge_delta, open_weights
from perflow_diffusers.weights.make.extract import extract_lora

FP32 = {"dtype": torch.float32}


def matrices(delta):
    """`{name: float64 matrix}` of the weights that a LoRA carries."""
    return {name: value.double().flatten(1).numpy() for name, value in delta.items() if value.ndim > 1}


def optimum(matrix, rank):
    """Relative error of the best approximation (Eckart-Young), from an SVD in float64."""
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    return float(np.sqrt(squares[rank:].sum() / squares.sum()))


def products(file):
    """`{weight name: up @ down}` of a LoRA file in float64, as matrices."""
    factors = {name: value.double().flatten(1) for name, value in load_file(file).items()}
    names = {name.split(".lora_")[0] for name in factors}
    return {
        f"{name.removeprefix('unet.')}.weight": factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
        for name in names
    }


def forward(unet):
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([900, 300]), text).sample


@pytest.fixture
def make_pipe(tiny_components):
    def make(unet):
        parts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
        return StableDiffusionPipeline(
            vae=tiny_components[1], unet=unet, scheduler=None, requires_safety_checker=False, **parts
        )

    return make


@pytest.fixture
def pipe(make_pipe, unet):
    return make_pipe(unet)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 64])
def test_every_layer_is_optimal(delta, tmp_path, rank, exact):
    report = extract_lora(delta, tmp_path / "lora.safetensors", rank=rank, exact=exact, **FP32)
    assert [layer.name for layer in report.layers] == sorted(matrices(delta))
    rebuilt = products(report.path)
    for layer in report.layers:
        matrix = matrices(delta)[layer.name]
        best = optimum(matrix, layer.rank)
        error = np.linalg.norm(matrix - rebuilt[layer.name].numpy()) / np.linalg.norm(matrix)
        assert layer.rank == min(rank, *matrix.shape)
        assert best - 1e-6 <= error <= 1.005 * best + 1e-6
        assert layer.relative_error == pytest.approx(error, rel=1e-4, abs=1e-6)
        assert layer.optimal_error is None or layer.optimal_error == pytest.approx(best, rel=1e-6, abs=1e-7)
        assert layer.norm == pytest.approx(np.linalg.norm(matrix), rel=1e-6)
    assert not exact or all(layer.optimal_error is not None for layer in report.layers)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99])
def test_energy_takes_the_smallest_rank(delta, tmp_path, energy):
    report = extract_lora(delta, tmp_path / "lora.safetensors", energy=energy, **FP32)
    for layer in report.layers:
        squares = np.linalg.svd(matrices(delta)[layer.name], compute_uv=False) ** 2
        kept = np.cumsum(squares) / squares.sum()
        assert layer.rank == 1 + int(np.argmax(kept >= energy))
        assert layer.relative_error**2 <= 1 - energy + 1e-6
    assert len({layer.rank for layer in report.layers}) > 3


def test_rank_caps_energy(delta, tmp_path):
    free = extract_lora(delta, tmp_path / "free.safetensors", energy=0.9)
    capped = extract_lora(delta, tmp_path / "capped.safetensors", energy=0.9, rank=4)
    assert [layer.rank for layer in capped.layers] == [min(4, layer.rank) for layer in free.layers]


@pytest.mark.parametrize("rank", [3, 64])
def test_diffusers_loads_it_and_gets_the_merged_output(pipe, make_unet, delta, tmp_path, rank):
    plain = forward(pipe.unet)
    report = extract_lora(delta, tmp_path / "folder", rank=rank, residual=False, **FP32)
    merged = make_unet()
    for name, product in products(report.path).items():
        weight = merged.get_parameter(name)
        weight.copy_((weight.double() + product.reshape(weight.shape)).float())
    wanted = forward(merged)
    pipe.load_lora_weights(tmp_path / "folder")
    got = forward(pipe.unet)
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    assert (wanted - plain).norm() > 1e-3 * wanted.norm()
    pipe.unload_lora_weights()
    assert torch.equal(forward(pipe.unet), plain)


def test_ranks_and_alphas_reach_the_layers(pipe, delta, tmp_path):
    report = extract_lora(delta, tmp_path / "own-name.safetensors", energy=0.8)
    pipe.load_lora_weights(report.path, adapter_name="fast")
    modules = dict(pipe.unet.named_modules())
    for layer in report.layers:
        module = modules[layer.name.removesuffix(".weight")]
        assert module.r["fast"] == module.lora_alpha["fast"] == layer.rank
        assert module.scaling["fast"] == 1.0
    assert len({layer.rank for layer in report.layers}) > 3


def test_a_name_that_ends_another_name_keeps_its_own_rank(pipe, delta, tmp_path):
    pipe.unet.extra = torch.nn.Module()
    pipe.unet.extra.conv_in = torch.nn.Conv2d(4, 8, 3)
    flat = torch.ones(8, 1, 1, 1) * torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    report = extract_lora({**delta, "extra.conv_in.weight": flat}, tmp_path / "lora.safetensors", energy=0.9)
    pipe.load_lora_weights(report.path, adapter_name="fast")
    ranks = {layer.name: layer.rank for layer in report.layers}
    assert pipe.unet.conv_in.r["fast"] == ranks["conv_in.weight"] > 1
    assert pipe.unet.extra.conv_in.r["fast"] == ranks["extra.conv_in.weight"] == 1


def test_layers_without_a_difference_are_left_out(pipe, delta, tmp_path):
    delta = {**delta, "conv_in.weight": torch.zeros_like(delta["conv_in.weight"])}
    report = extract_lora(delta, tmp_path / "lora.safetensors", rank=2)
    assert report.zero == ("conv_in.weight",) and "conv_in.weight" in str(report)
    pipe.load_lora_weights(report.path)
    assert type(pipe.unet.conv_in) is torch.nn.Conv2d and type(pipe.unet.conv_out) is not torch.nn.Conv2d


# PEFT says this of any second adapter, whatever its file.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_beside_a_style_lora(pipe, make_unet, delta, tmp_path):
    report = extract_lora(delta, tmp_path / "fast", rank=4, residual=False, **FP32)
    style_delta = {name: torch.roll(value, 1, 0) for name, value in delta.items() if "attn" in name}
    style = extract_lora(style_delta, tmp_path / "style", rank=2, residual=False, **FP32)
    pipe.load_lora_weights(tmp_path / "fast", adapter_name="fast")
    pipe.load_lora_weights(tmp_path / "style", adapter_name="style")
    pipe.set_adapters(["fast", "style"], [1.0, 0.5])
    merged = make_unet()
    for file, scale in ((report.path, 1.0), (style.path, 0.5)):
        for name, product in products(file).items():
            weight = merged.get_parameter(name)
            weight.copy_((weight.double() + scale * product.reshape(weight.shape)).float())
    wanted = forward(merged)
    assert (forward(pipe.unet) - wanted).norm() <= 1e-5 * wanted.norm()
    pipe.set_adapters("style")
    assert (forward(pipe.unet) - wanted).norm() > 1e-3 * wanted.norm()


def test_header_is_what_diffusers_writes_itself(pipe, delta_file, tmp_path):
    report = extract_lora(delta_file, tmp_path / "ours", energy=0.8)
    pipe.load_lora_weights(tmp_path / "ours", adapter_name="default")
    config = pipe.unet.peft_config["default"].to_dict()
    tensors = {name.removeprefix("unet."): value for name, value in load_file(report.path).items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "theirs", tensors, unet_lora_adapter_metadata=config)
    with safe_open(tmp_path / "theirs" / report.path.name, "pt") as theirs, safe_open(report.path, "pt") as ours:
        assert set(theirs.keys()) == set(ours.keys())
        header, wanted = ours.metadata(), theirs.metadata()
    given, written = (json.loads(found["lora_adapter_metadata"]) for found in (header, wanted))
    modules = given.pop("unet.target_modules")
    assert sorted(modules) == [layer.name.removesuffix(".weight") for layer in report.layers]
    assert given == {key: written[key] for key in given} and header["format"] == wanted["format"]
    assert len(given["unet.rank_pattern"]) > 10 and given["unet.rank_pattern"] == given["unet.alpha_pattern"]
    assert header["perflow_format"] == "lora-1" and header["perflow_residual"] == report.residual_path.name
    assert header["prediction_type"] == "ddim_eps" and header["steps"] == "4"


def test_lora_and_residual_are_the_delta_at_full_rank(delta, delta_file, make_unet, tmp_path):
    report = extract_lora(delta_file, tmp_path / "lora.safetensors", rank=1000, **FP32)
    rest = load_file(report.residual_path)
    assert set(rest) == set(delta) - set(matrices(delta)) == set(report.not_carried)
    assert all(torch.equal(rest[name], delta[name]) for name in rest)
    for name, product in products(report.path).items():
        wanted = delta[name].double().flatten(1)
        assert (product - wanted).norm() <= 2e-6 * wanted.norm()
    assert report.relative_error_with_residual < 2e-6
    assert open_weights(report.residual_path).metadata["perflow_format"] == "delta-residual-1"
    with_lora, with_delta = make_unet(), make_unet()
    merge_delta(with_lora, report.path)
    merge_delta(with_delta, delta)
    wanted = forward(with_delta)
    assert (forward(with_lora) - wanted).norm() <= 1e-5 * wanted.norm()


def test_totals_add_up(delta, tmp_path):
    kept = extract_lora(delta, tmp_path / "kept", rank=4)
    dropped = extract_lora(delta, tmp_path / "dropped", rank=4, residual=False)
    rebuilt = products(kept.path)
    total = sum(value.double().square().sum().item() for value in delta.values())
    vectors = sum(value.double().square().sum().item() for value in delta.values() if value.ndim == 1)
    lost = sum(float(((matrix - rebuilt[name].numpy()) ** 2).sum()) for name, matrix in matrices(delta).items())
    assert kept.not_carried_energy == pytest.approx(vectors / total, rel=1e-6)
    assert kept.relative_error == pytest.approx(((lost + vectors) / total) ** 0.5, rel=1e-5)
    assert kept.relative_error_with_residual == pytest.approx((lost / total) ** 0.5, rel=1e-5)
    assert dropped.residual_path is None and len(list((tmp_path / "dropped").iterdir())) == 1
    assert dropped.relative_error_with_residual == dropped.relative_error == kept.relative_error
    assert kept.nbytes == sum(value.nbytes for value in load_file(kept.path).values())
    assert kept.residual_nbytes == sum(value.nbytes for value in load_file(kept.residual_path).values())
    assert kept.delta_nbytes == sum(value.nbytes for value in delta.values())
    content = json.loads(json.dumps(kept.to_dict()))
    assert content["layers"][0]["rank"] == kept.layers[0].rank and content["path"] == str(kept.path)
    assert f"{kept.relative_error:.4f}" in str(kept) and "lora_weights.residual.safetensors" in str(kept)


def test_tiny_and_large_differences_survive_fp16(delta, tmp_path):
    for size in (1e-6, 1e3):
        scaled = {name: value.float() * (size / 0.01) for name, value in delta.items()}
        half = extract_lora(scaled, tmp_path / f"{size}-half", rank=4)
        full = extract_lora(scaled, tmp_path / f"{size}-full", rank=4, **FP32)
        for rounded, plain in zip(half.layers, full.layers, strict=True):
            assert rounded.relative_error == pytest.approx(plain.relative_error, abs=2e-3)


def test_same_seed_same_file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    delta = {"a.weight": torch.randn(200, 260, generator=generator)}  # large enough for the random basis
    same = [extract_lora(delta, tmp_path / str(number), rank=4, seed=7).path.read_bytes() for number in range(2)]
    other = extract_lora(delta, tmp_path / "other", rank=4, seed=8).path.read_bytes()
    assert same[0] == same[1] != other


def test_a_lora_can_be_made_smaller(delta, tmp_path):
    first = extract_lora(delta, tmp_path / "first", rank=6, **FP32)
    second = extract_lora(first.path, tmp_path / "second", rank=3, **FP32)
    given = products(first.path)
    for name, product in products(second.path).items():
        best = optimum(given[name].numpy(), 3)
        error = (product - given[name]).norm() / given[name].norm()
        assert error == pytest.approx(best, rel=5e-3, abs=1e-6)
    assert second.residual_path is not None
    assert load_file(second.residual_path).keys() == load_file(first.residual_path).keys()


def test_progress_counts_tensors(delta, tmp_path):
    seen = []
    extract_lora(delta, tmp_path / "lora", rank=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, len(delta)) for done in range(1, len(delta) + 1)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["conv_in.weight", "conv_in.bias"])
def test_not_finite_is_refused_before_anything_is_written(delta, tmp_path, bad, name):
    delta = copy.deepcopy(delta)
    delta[name].view(-1)[1] = bad
    with pytest.raises(ValueError, match=rf"NaN or Inf.*{name}"):
        extract_lora(delta, tmp_path / "lora.safetensors", rank=2)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unless_asked(delta, tmp_path):
    target = tmp_path / "lora.safetensors"
    (tmp_path / "lora.residual.safetensors").write_text("precious")
    with pytest.raises(ValueError, match="exists"):
        extract_lora(delta, target, rank=2)
    assert not target.exists() and (tmp_path / "lora.residual.safetensors").read_text() == "precious"
    extract_lora(delta, target, rank=2, residual=False)
    with pytest.raises(ValueError, match="exists"):
        extract_lora(delta, target, rank=2, residual=False)
    extract_lora(delta, target, rank=2, overwrite=True)
    assert len(load_file(tmp_path / "lora.residual.safetensors")) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"energy": 0.0}, "energy=0.0"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
        ({"oversampling": -1}, "oversampling=-1"),
    ],
)
def test_arguments_out_of_range(delta, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        extract_lora(delta, tmp_path / "lora.safetensors", **options)


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        ({}, "empty"),
        ({"a.weight": torch.zeros(4, 4)}, "no layer"),
        ({"a.weight": torch.ones(4, 4, dtype=torch.int32)}, "floating point"),
        ({"a.weight": torch.ones(4, 4), "_orig_mod.a.weight": torch.ones(4, 4)}, "more than one"),
        ({"model.diffusion_model.out.2.weight": torch.ones(4, 4)}, "original format"),
    ],
)
def test_sources_that_are_no_delta(tmp_path, delta, message):
    with pytest.raises(ValueError, match=message):
        extract_lora(delta, tmp_path / "lora.safetensors")


def test_out_that_cannot_be_written(delta, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        extract_lora(delta, tmp_path / "file")
    with pytest.raises(ValueError, match="cannot be made"):
        extract_lora(delta, tmp_path / "file" / "folder")
    with pytest.raises(ValueError, match="no folder"):
        extract_lora(delta, tmp_path / "none" / "lora.safetensors")


def test_int8_deltas_are_read(tmp_path):
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (6, 8), dtype=torch.int8, generator=generator)
    scale = torch.rand(6, generator=generator)
    save_file({"a.weight": q, "a.weight.scale": scale}, tmp_path / "q.safetensors", {"perflow_format": "delta-int8-1"})
    report = extract_lora(tmp_path / "q.safetensors", tmp_path / "lora.safetensors", rank=6, **FP32)
    wanted = q.double() * scale.double()[:, None]
    assert torch.allclose(products(report.path)["a.weight"], wanted, rtol=1e-5, atol=1e-4)
