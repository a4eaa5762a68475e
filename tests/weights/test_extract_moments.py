"""Second moments of layer inputs, and LoRAs that are weighted by them."""

import pytest
import torch
from safetensors.torch import load_file

from perflow_diffusers.weights.make.extract import extract_lora
from perflow_diffusers.weights.make.moments import measure_moments


class Two(torch.nn.Module):
    """A convolution and a linear layer whose inputs are known."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 3)
        self.linear = torch.nn.Linear(3, 4)
        self.unused = torch.nn.Linear(3, 4)

    def forward(self, pictures):
        return self.linear(self.conv(pictures).movedim(1, -1))


@pytest.fixture
def low_rank_inputs():
    """A delta, inputs (count, in) that are far from white, and their moment."""
    generator = torch.Generator().manual_seed(0)
    delta = {"a.weight": torch.randn(30, 40, generator=generator)}
    inputs = torch.randn(1000, 40, generator=generator) * torch.logspace(0, -2, 40)
    inputs = inputs @ torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]
    return delta, inputs


def loss(delta, report, inputs):
    """Root mean square error of the layer's outputs, in float64."""
    factors = {name: value.double() for name, value in load_file(report.path).items()}
    error = delta["a.weight"].double() - factors["unet.a.lora_B.weight"] @ factors["unet.a.lora_A.weight"]
    return (inputs.double() @ error.T).square().mean().sqrt().item()


def test_moments_are_means_of_squares():
    torch.manual_seed(0)
    model, calls = Two(), [torch.randn(2, 2, 5, 6), torch.randn(1, 2, 8, 4)]
    inner = torch.cat([model.conv(pictures).movedim(1, -1).reshape(-1, 3) for pictures in calls]).double()
    outer = torch.cat([pictures.movedim(1, -1).reshape(-1, 2) for pictures in calls]).double()
    found = measure_moments(model, lambda: [model(pictures) for pictures in calls])
    assert set(found) == {"conv.weight", "linear.weight"}
    assert torch.allclose(found["conv.weight"].double(), outer.square().mean(0), rtol=1e-5)
    assert torch.allclose(found["linear.weight"].double(), inner.square().mean(0), rtol=1e-5)
    full = measure_moments(model, lambda: [model(pictures) for pictures in calls], full=True)
    assert torch.allclose(full["linear.weight"].double(), inner.T @ inner / len(inner), rtol=1e-4, atol=1e-6)
    assert torch.equal(full["conv.weight"], found["conv.weight"])


def test_hooks_are_gone_afterwards_even_after_an_error():
    model = Two()

    def fail():
        raise RuntimeError("no pictures")

    with pytest.raises(RuntimeError, match="no pictures"):
        measure_moments(model, fail)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="never called"):
        measure_moments(model, lambda: None)


def test_moments_of_a_pipeline_fit_its_delta(tiny_pipeline, embeddings, tmp_path):
    unet = tiny_pipeline.unet

    def draw():
        tiny_pipeline(**embeddings, num_inference_steps=2, output_type="latent")

    moments = measure_moments(tiny_pipeline, draw)
    generator = torch.Generator().manual_seed(0)
    delta = {name: torch.randn(weight.shape, generator=generator) for name, weight in unet.state_dict().items()}
    assert set(moments) == {name for name, value in delta.items() if value.ndim > 1}
    plain = extract_lora(delta, tmp_path / "plain", rank=2, moments=moments, exact=True)
    assert all(layer.weighted_error >= layer.optimal_error * (1 - 1e-5) for layer in plain.layers)
    assert all(layer.weighted_error <= layer.optimal_error * 1.005 + 1e-3 for layer in plain.layers)


@pytest.mark.parametrize("full", [False, True])
def test_weighting_lowers_the_weighted_error(low_rank_inputs, tmp_path, full):
    delta, inputs = low_rank_inputs
    if not full:  # inputs whose moment is diagonal
        inputs = torch.linalg.qr(inputs.double())[0].float() * torch.logspace(1, -1, 40)
    moment = inputs.double().T @ inputs.double() / len(inputs)
    given = {"a.weight": moment if full else moment.diagonal()}
    plain = extract_lora(delta, tmp_path / "plain", rank=6, dtype=torch.float32)
    weighted = extract_lora(delta, tmp_path / "weighted", rank=6, moments=given, dtype=torch.float32)
    assert loss(delta, weighted, inputs) < 0.8 * loss(delta, plain, inputs)
    assert weighted.layers[0].relative_error > plain.layers[0].relative_error
    # The best weighted error of rank 6, from an SVD in float64 of D C^(1/2).
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    singular = torch.linalg.svdvals(delta["a.weight"].double() @ root) ** 2
    best = (singular[6:].sum() / singular.sum()).sqrt().item()
    assert weighted.layers[0].weighted_error == pytest.approx(best, rel=5e-3)
    assert plain.layers[0].weighted_error is None


def test_convolutions_take_a_moment_per_channel(tmp_path):
    generator = torch.Generator().manual_seed(0)
    delta = {"a.weight": torch.randn(12, 3, 3, 3, generator=generator)}
    moment = torch.tensor([100.0, 1.0, 0.0])
    report = extract_lora(delta, tmp_path / "lora", rank=4, moments={"a.weight": moment}, dtype=torch.float32)
    factors = load_file(report.path)
    up, down = factors["unet.a.lora_B.weight"], factors["unet.a.lora_A.weight"]
    assert up.shape == (12, 4, 1, 1) and down.shape == (4, 3, 3, 3)
    error = delta["a.weight"] - torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    lost = error.double().square().sum(dim=(0, 2, 3))
    singular = torch.linalg.svdvals((delta["a.weight"] * moment.sqrt()[:, None, None]).double().flatten(1)) ** 2
    assert (lost * moment.double()).sum().item() == pytest.approx(singular[4:].sum().item(), rel=5e-3)


def test_layers_without_a_moment_are_plain(delta, tmp_path):
    report = extract_lora(delta, tmp_path / "lora", rank=2, moments={"conv_in.weight": torch.rand(4) + 0.1})
    assert [layer.name for layer in report.layers if layer.weighted_error is not None] == ["conv_in.weight"]
    never = extract_lora(delta, tmp_path / "never", rank=2, moments={"conv_in.weight": torch.zeros(4)})
    assert all(layer.weighted_error is None for layer in never.layers)


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (torch.ones(5), r"shape \(5,\).*Expected \(4,\)"),
        (torch.tensor([1.0, 1.0, -1.0, 1.0]), "negative"),
        (torch.tensor([1.0, 1.0, float("nan"), 1.0]), "NaN"),
        (torch.ones(36, 36) - 2 * torch.eye(36).roll(1, 0) - 2 * torch.eye(36).roll(-1, 0), "semidefinite"),
    ],
)
def test_moments_that_do_not_fit(delta, tmp_path, moment, message):
    with pytest.raises(ValueError, match=message):
        extract_lora(delta, tmp_path / "lora.safetensors", rank=2, moments={"conv_in.weight": moment})
    assert list(tmp_path.iterdir()) == []


def test_moments_of_another_model_are_refused(delta, tmp_path):
    with pytest.raises(ValueError, match="None of the moments"):
        extract_lora(delta, tmp_path / "lora.safetensors", moments={"other.weight": torch.ones(4)})
