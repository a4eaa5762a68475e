"""Several LoRAs or deltas as one file: what plain diffusers makes of all of them together."""

import json

import pytest
import torch
from lora_files import products, random_factors, write_diffusers, write_kohya
from lora_pipelines import (
    FAMILIES,
    added,
    distance,
    fused,
    kohya_file_tensors,
    make_pipe,
    parts_of,
    random_layers,
    save_with_diffusers,
)
from safetensors.torch import load_file, save_file

from perflow_diffusers.weights import DeltaError, combine, merge_delta, open_weights, shrink_delta
from perflow_diffusers.weights.read.lora import lora_layers

SCALES = [1.0, -0.7]


# PEFT says this of any second adapter, whatever its file.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("family", FAMILIES)
def test_one_lora_is_what_diffusers_makes_of_several(family, tmp_path):
    own = save_with_diffusers(make_pipe(family), random_layers(make_pipe(family), seed=1), tmp_path)
    layers = random_layers(make_pipe(family), seed=2)
    kohya = tmp_path / "k.safetensors"
    save_file(kohya_file_tensors(make_pipe(family), layers), kohya)
    report = combine([own, kohya], tmp_path / "both.safetensors", SCALES)
    wanted = added(family, random_layers(make_pipe(family), seed=1))
    plain = {f"{n}.{k}": w.double() for n, p in parts_of(make_pipe(family)).items() for k, w in p.state_dict().items()}
    second = added(family, layers)
    wanted = {name: value - 0.7 * (second[name] - plain[name]) for name, value in wanted.items()}
    assert distance(fused(family, report.path), wanted) <= 3e-7
    ranks = {(layer.component, layer.module): layer.rank for layer in lora_layers(open_weights(report.path))}
    assert ranks == {
        (part, module.removeprefix("text_model.")): 2 * len(layers[part, module][0]) for part, module in layers
    }
    assert report.ranks == {4: report.ranks[4], 6: report.ranks[6], 8: report.ranks[8]}
    # and diffusers' own weighted sum of the two adapters
    pipe = make_pipe(family)
    pipe.load_lora_weights(str(own.parent), weight_name=own.name, adapter_name="first")
    converted = combine([kohya], tmp_path / "second.safetensors").path
    pipe.load_lora_weights(str(tmp_path), weight_name=converted.name, adapter_name="second")
    pipe.set_adapters(["first", "second"], SCALES)
    pipe.fuse_lora(components=list(parts_of(pipe)), adapter_names=["first", "second"])
    pipe.unload_lora_weights()
    theirs = {f"{name}.{key}": w for name, part in parts_of(pipe).items() for key, w in part.state_dict().items()}
    assert distance(fused(family, report.path), theirs) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_keep_their_bits_where_strengths_are_equal(unet, tmp_path, dtype):
    first, second = random_factors(unet, dtype), random_factors(unet, dtype, seed=9)
    first, second = ({m: (d, u, 0.5 * len(d)) for m, (d, u, _) in each.items()} for each in (first, second))
    second.pop("conv_out")
    paths = [write_kohya(tmp_path / "a.safetensors", first), write_diffusers(tmp_path / "b.safetensors", second)]
    found = load_file(combine(paths, tmp_path / "c.safetensors", [0.8, -0.8]).path)
    for module, (_, up, _) in first.items():
        downs, ups = ([each[module][part] for each in (first, second) if module in each] for part in (0, 1))
        assert torch.equal(found[f"unet.{module}.lora_A.weight"], torch.cat(downs))
        wanted = torch.cat([up, *(-other for other in ups[1:])], dim=1)
        assert (
            torch.equal(found[f"unet.{module}.lora_B.weight"], wanted)
            and found[f"unet.{module}.lora_A.weight"].dtype == dtype
        )
    layers = lora_layers(open_weights(tmp_path / "c.safetensors"))
    assert all(layer.scale == pytest.approx(0.4, rel=1e-12) for layer in layers)


def test_what_must_be_scaled_is_not_rounded_to_fp16(unet, tmp_path):
    first, second = random_factors(unet, torch.float16), random_factors(unet, torch.float16, seed=9)
    paths = [write_kohya(tmp_path / "a.safetensors", first), write_kohya(tmp_path / "b.safetensors", second)]
    combine(paths, tmp_path / "c.safetensors", [1, 0.3])
    for layer in lora_layers(open_weights(tmp_path / "c.safetensors")):
        source = load_file(tmp_path / "c.safetensors")
        up, down = (source[key].double().flatten(1) for key in (layer.up, layer.down))
        name = f"{layer.module}.weight"
        wanted = (products(first)[name] + 0.3 * products(second)[name]).flatten(1)
        assert (up @ down * layer.scale - wanted).norm() <= 1e-7 * wanted.norm()


def test_middle_factors_are_multiplied_in(tmp_path):
    torch.manual_seed(0)
    stem, name = "lora_unet_mid_block_resnets_0_conv1", "unet.mid_block.resnets.0.conv1"
    down, mid, up = torch.randn(3, 16, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(16, 3, 1, 1)
    tucker = {f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": mid, f"{stem}.lora_up.weight": up}
    plain = {f"{name}.lora_A.weight": torch.randn(2, 16, 3, 3), f"{name}.lora_B.weight": torch.randn(16, 2, 1, 1)}
    found = load_file(
        combine([{**tucker, f"{stem}.alpha": torch.tensor(1.5)}, plain], tmp_path / "c.safetensors").path
    )
    conv, image = torch.nn.functional.conv2d, torch.randn(1, 16, 8, 8)
    wanted = 0.5 * conv(conv(conv(image, down), mid, padding=1), up)
    wanted += conv(conv(image, plain[f"{name}.lora_A.weight"], padding=1), plain[f"{name}.lora_B.weight"])
    layer = lora_layers(open_weights(tmp_path / "c.safetensors"))[0]
    got = conv(conv(image, found[f"{name}.lora_A.weight"], padding=1), found[f"{name}.lora_B.weight"]) * layer.scale
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-3)


def test_residuals_are_added_too(unet, bits, tmp_path):
    factors, vectors = random_factors(unet), {n: w for n, w in unet.state_dict().items() if w.dim() == 1}
    paths = []
    for number in (1, 2):
        rest = {name: torch.full_like(value, float(number)) for name, value in vectors.items()}
        save_file(rest, tmp_path / f"{number}.residual.safetensors", {"perflow_format": "delta-residual-1"})
        header = {"perflow_residual": f"{number}.residual.safetensors"}
        paths.append(write_diffusers(tmp_path / f"{number}.safetensors", factors, **header))
    before = bits(unet)
    report = combine(paths, tmp_path / "folder", [1, 0.5])
    assert report.residual_path.parent == report.path.parent == tmp_path / "folder"
    merge_delta(unet, tmp_path / "folder")
    for name, weight in bits(unet).items():
        exact = before[name].double() + 1.5 * products(factors).get(name, 0) + (2 if name in vectors else 0)
        assert torch.allclose(weight.double(), exact, atol=2e-6)


def test_deltas_of_all_forms_and_a_lora(unet, make_delta, tmp_path):
    full, half = make_delta(unet, torch.float32, seed=1), make_delta(unet, torch.float16, seed=2)
    save_file(make_delta(unet, torch.float32, seed=3), tmp_path / "d.safetensors", {"perflow_format": "delta-1"})
    packed = shrink_delta(tmp_path / "d.safetensors", tmp_path / "q.safetensors", "int8").path
    factors = random_factors(unet)
    lora = write_kohya(tmp_path / "k.safetensors", factors)
    stored = load_file(packed)
    report = combine([full, half, packed, lora], tmp_path / "sum.safetensors", [1, -2, 0.5, 0.25])
    assert report.form == "delta" and open_weights(report.path).kind == "delta"
    found = load_file(report.path)
    assert found.keys() == full.keys()
    for name, value in found.items():
        q = stored[name].double()
        if f"{name}.scale" in stored:
            q = q * stored[f"{name}.scale"].double().reshape(-1, *[1] * (q.dim() - 1))
        exact = full[name].double() - 2 * half[name].double() + 0.5 * q + 0.25 * products(factors).get(name, 0)
        assert value.dtype == torch.float32 and torch.allclose(value.double(), exact, rtol=1e-6, atol=1e-7)


def test_a_lone_delta_and_dtypes(unet, make_delta, tmp_path):
    half = make_delta(unet, torch.float16)
    alone = load_file(combine([half], tmp_path / "a.safetensors").path)
    assert all(torch.equal(alone[name], half[name]) and alone[name].dtype == torch.float16 for name in half)
    double = load_file(combine([half, half], tmp_path / "b.safetensors", dtype=torch.bfloat16).path)
    assert all(torch.equal(double[name], (2 * half[name].float()).bfloat16()) for name in half)


def test_headers_keep_what_all_say(unet, tmp_path):
    factors = random_factors(unet)
    common = {"ss_base_model_version": "sd_v1", "licence": "mit"}
    one = {"ss_seed": "1", "prediction_type": "ddim_eps", "steps": "[4]", "sshs_model_hash": "0"}
    first = write_kohya(tmp_path / "a.safetensors", factors, ss_network_dim="3", **common, **one)
    second = write_kohya(tmp_path / "b.safetensors", factors, **common, ss_output_name="x", steps="[8]")
    report = combine([first, second], tmp_path / "c.safetensors")
    header = dict(open_weights(report.path).metadata)
    config = json.loads(header.pop("lora_adapter_metadata"))
    assert header == {**common, "prediction_type": "ddim_eps", "format": "pt", "perflow_format": "lora-1"}
    assert report.disagreed == ("steps",) and "steps" in str(report) and len(config["unet.target_modules"]) > 10
    assert json.loads(json.dumps(report.to_dict()))["disagreed"] == ["steps"]


def test_text_encoder_layers_in_a_delta_are_named(unet, delta, factors, tmp_path):
    stem = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    text = {f"{stem}.lora_down.weight": torch.ones(2, 4), f"{stem}.lora_up.weight": torch.ones(4, 2)}
    lora = {**load_file(write_kohya(tmp_path / "k.safetensors", factors)), **text}
    with pytest.warns(UserWarning, match="1 layers .* for text encoders"):
        combine([delta, lora], tmp_path / "c.safetensors")


@pytest.mark.filterwarnings("ignore:scale=.* is far from")
def test_sources_that_do_not_fit_together(unet, make_unet, delta, factors, tmp_path):
    out = tmp_path / "c.safetensors"
    lora = load_file(write_diffusers(tmp_path / "l.safetensors", factors))
    other = load_file(write_diffusers(tmp_path / "o.safetensors", random_factors(make_unet(cross_attention_dim=32))))
    deep = {"unet.up_blocks.7.resnets.0.conv1.lora_A.weight": torch.ones(1, 4, 3, 3)}
    deep["unet.up_blocks.7.resnets.0.conv1.lora_B.weight"] = torch.ones(4, 1, 1, 1)
    wide = {**delta, "conv_in.weight": torch.ones(8, 5, 3, 3)}
    nan = {**delta, "conv_in.bias": torch.full_like(delta["conv_in.bias"], float("nan"))}
    for sources, options, message in (
        ([lora, other], {}, "layers have other shapes in other sources.*attn2"),
        ([delta, wide], {}, r"1 weights have other shapes.*conv_in\.weight"),
        ([delta, deep], {}, r"1 weights that a LoRA changes are in none of the deltas.*up_blocks\.7"),
        ([delta, nan], {}, r"conv_in\.bias has NaN or Inf"),
        ([delta, delta], {"scales": [1e30, 1e30]}, "has NaN or Inf in torch.float16"),
        ([delta, delta], {"scales": [1]}, "2 sources and 1 scales"),
        ([delta, delta], {"scales": [1, float("nan")]}, "not a finite number"),
        ([delta], {"dtype": torch.int8}, "dtype=torch.int8"),
        ([], {}, "not a list"),
        (delta, {}, "not a list"),
        ([{}], {}, "is empty"),
        ([delta, {"model.diffusion_model.out.2.weight": torch.ones(4, 4)}], {}, "complete checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            combine(sources, out, **options)
        assert not out.exists()
    (tmp_path / "c.safetensors").write_text("precious")
    with pytest.raises(ValueError, match="exists"):
        combine([lora, lora], out)
    with pytest.raises(DeltaError, match="NaN"):
        combine([delta, nan], out, overwrite=True)
    assert out.read_text() == "precious"


def test_a_dry_run_writes_nothing(delta, factors, tmp_path):
    lora = load_file(write_diffusers(tmp_path / "l.safetensors", factors))
    before = set(tmp_path.rglob("*"))
    reports = [
        combine([delta, delta], tmp_path / "c.safetensors", dry_run=True),
        combine([lora], tmp_path / "new", dry_run=True),
    ]
    assert set(tmp_path.rglob("*")) == before
    written = [combine([delta, delta], tmp_path / "c.safetensors"), combine([lora], tmp_path / "new")]
    assert reports == written


def test_progress_counts_tensors(factors, tmp_path):
    seen = []
    lora = load_file(write_diffusers(tmp_path / "l.safetensors", factors))
    combine([lora, lora], tmp_path / "c.safetensors", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, len(lora)) for done in range(1, len(lora) + 1)]
