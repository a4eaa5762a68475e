"""`perflow` on weight files, as a user runs it."""

import json
import os
import warnings

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from perflow_diffusers.weights import open_weights
from perflow_diffusers.weights.read.lora import as_delta

OPTIONS = ("--prediction-type", "ddim_eps", "--num-time-windows", "4", "--recommended-steps", "4")


@pytest.fixture
def delta(perflow, folders, tmp_path):
    out = tmp_path / "delta.safetensors"
    result = perflow("diff", *folders, out, *OPTIONS)
    assert result.exit_code == 0, result.output
    return out


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_diff_writes_the_difference_and_what_it_is_for(delta, folders, perflow):
    base, tuned = map(weights, folders)
    for name, value in load_file(delta).items():
        assert torch.equal(value, tuned[name] - base[name])
    said = json.loads(perflow("info", delta, "--json").output)
    assert said["kind"] == "delta"
    assert said["settings"]["prediction_type"] == "ddim_eps"
    assert said["settings"]["num_time_windows"] == 4
    assert said["settings"]["recommended_steps"] == [4]
    assert said["parameters"] == sum(value.numel() for value in base.values())


def test_diff_of_a_finer_base_rounds_it_if_asked(folders, perflow, tmp_path):
    base, tuned, out = weights(folders[0]), tmp_path / "tuned.safetensors", tmp_path / "delta.safetensors"
    save_file({name: (value + 0.05).half() for name, value in weights(folders[1]).items()}, tuned)
    rounding = ("--round-base", "--drop-identical")
    assert "rounded to F16" in perflow("diff", folders[0], tuned, out, "--dry-run", *rounding).output
    assert perflow("diff", folders[0], tuned, out, "--dtype", "float32", *rounding).exit_code == 0
    wanted = {name: value.float() - base[name].half().float() for name, value in load_file(tuned).items()}
    assert all(torch.equal(value, wanted[name]) for name, value in load_file(out).items())
    assert json.loads(perflow("info", out, "--json").output)["settings"]["base_rounded"] == "F16"


def test_combine_adds_deltas_and_loras(delta, perflow, tmp_path):
    change, lora, out = load_file(delta), tmp_path / "lora.safetensors", tmp_path / "sum.safetensors"
    plain = ("--dtype", "float32", "--no-residual")
    assert perflow("extract-lora", delta, lora, "--rank", 1000, "--alpha", 2, *plain).exit_code == 0
    result = perflow("combine", delta, lora, out, "--scale", 1, "--scale", -0.5)
    assert result.exit_code == 0, result.output
    for name, value in load_file(out).items():
        wanted = (0.5 if value.dim() > 1 else 1) * change[name]
        assert torch.allclose(value, wanted, rtol=1e-4, atol=1e-5)
    both = tmp_path / "both"
    assert perflow("combine", lora, lora, both, "--dry-run").exit_code == 0 and not both.exists()
    result = perflow("combine", lora, lora, both)
    assert result.exit_code == 0 and "as one lora" in result.output
    found, rank = as_delta(open_weights(both)), open_weights(both).shapes["unet.conv_in.lora_A.weight"][0]
    assert rank == 2 * open_weights(lora).shapes["unet.conv_in.lora_A.weight"][0]
    assert torch.allclose(found["conv_in.weight"], 2 * change["conv_in.weight"], rtol=1e-4, atol=1e-5)
    result = perflow("combine", lora, lora, both, "--scale", 1, "--force")
    assert result.exit_code == 2 and "2 sources and 1 scales" in result.output


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_merge_writes_a_model_that_diffusers_loads(delta, folders, perflow, tmp_path, scale):
    out = tmp_path / "merged"
    result = perflow("merge", folders[0], delta, out, "--scale", scale)
    assert result.exit_code == 0, result.output
    base, change, merged = weights(folders[0]), load_file(delta), UNet2DConditionModel.from_pretrained(out)
    for name, value in merged.state_dict().items():
        assert torch.equal(value, (base[name].double() + scale * change[name].double()).float())


def test_merge_to_a_file_takes_a_lora_too(delta, folders, perflow, tmp_path):
    lora, out = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    assert perflow("extract-lora", delta, lora, "--rank", 2, "--dtype", "float32").exit_code == 0
    result = perflow("merge", folders[0], lora, out)
    assert result.exit_code == 0, result.output
    base, merged = weights(folders[0]), load_file(out)
    change = as_delta(open_weights(lora))
    assert {name for name in merged if not torch.equal(merged[name], base[name])} <= set(change)
    for name in change:
        assert torch.allclose(merged[name], base[name] + change[name], atol=1e-7)


def test_extract_lora_reports_each_layer(delta, perflow, tmp_path):
    report = tmp_path / "report.json"
    result = perflow("extract-lora", delta, tmp_path / "lora", "--energy", 0.9, "--exact", "--report", report)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    layers = json.loads(report.read_text())["layers"]
    change = load_file(delta)
    for layer in layers:
        values = torch.linalg.svdvals(change[layer["name"]].double().flatten(1)) ** 2
        kept = values.cumsum(0) / values.sum()
        assert layer["rank"] == int((kept < 0.9).sum()) + 1
    said = json.loads(perflow("info", tmp_path / "lora", "--json").output)
    assert said["form"] == "diffusers LoRA" and sum(said["ranks"].values()) == len(layers)


def test_convert_there_and_back_is_bit_exact(delta, perflow, tmp_path):
    lora, kohya, back = (tmp_path / f"{name}.safetensors" for name in ("lora", "kohya", "back"))
    assert perflow("extract-lora", delta, lora, "--rank", 3).exit_code == 0
    assert perflow("convert", lora, kohya, "--to", "kohya").exit_code == 0
    assert json.loads(perflow("info", kohya, "--json").output)["form"] == "kohya LoRA"
    assert perflow("convert", kohya, back, "--to", "diffusers").exit_code == 0
    first, second = load_file(lora), load_file(back)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_convert_for_comfy_holds_every_number(delta, perflow, tmp_path):
    out = tmp_path / "comfy.safetensors"
    assert perflow("convert", delta, out, "--to", "comfy", "--dry-run").exit_code == 0 and not out.exists()
    assert perflow("convert", delta, out, "--to", "comfy").exit_code == 0
    whole, found = load_file(delta), load_file(out)
    assert len(found) == len(whole)
    for name, value in whole.items():
        module, _, leaf = name.rpartition(".")
        suffix = {"weight": "diff", "bias": "diff_b"}[leaf]
        assert torch.equal(found[f"lora_unet_{module.replace('.', '_')}.{suffix}"], value)


@pytest.mark.parametrize(("form", "bound"), [("float16", 2**-11), ("bfloat16", 2**-8), ("int8", 0.01)])
def test_convert_makes_smaller_deltas(delta, perflow, tmp_path, form, bound):
    out = tmp_path / "small.safetensors"
    assert perflow("convert", delta, out, "--to", form).exit_code == 0
    assert out.stat().st_size < delta.stat().st_size
    whole, small = load_file(delta), as_delta(open_weights(out))
    lost = sum(float((small[name].double() - whole[name].double()).pow(2).sum()) for name in whole)
    assert (lost / sum(float(value.double().pow(2).sum()) for value in whole.values())) ** 0.5 < bound


@pytest.mark.parametrize(
    "words",
    [
        ("diff", "BASE", "TUNED", "OUT.safetensors"),
        ("merge", "BASE", "DELTA", "OUT.safetensors"),
        ("merge", "BASE", "DELTA", "OUT"),
        ("extract-lora", "DELTA", "OUT", "--rank", "2"),
        ("convert", "DELTA", "OUT.safetensors", "--to", "int8"),
    ],
)
def test_a_dry_run_writes_nothing_and_nothing_is_overwritten_unasked(words, delta, folders, perflow, tmp_path):
    place = tmp_path / "here"
    place.mkdir()
    names = {"BASE": folders[0], "TUNED": folders[1], "DELTA": delta}
    words = [names.get(word, place / word if word.startswith("OUT") else word) for word in words]
    result = perflow(*words, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "Dry run" in result.output and os.listdir(place) == []
    assert perflow(*words).exit_code == 0
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    refused = perflow(*words)
    assert refused.exit_code == 2 and "--force" in refused.output
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    again = perflow(*words, "--force")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("info", "no-such-file.safetensors"), "No file, folder or known weights"),
        (("diff", "BASE", "TUNED", "no/folder/x.safetensors"), "does not exist"),
        (("merge", "BASE", "BASE", "x.safetensors"), "complete weights, not a delta"),
        (("extract-lora", "BASE", "x", "--energy", "0"), "energy=0.0"),
        (("extract-lora", "BASE", "x", "--energy", "1.5"), "--energy"),
        (("convert", "BASE", "x.safetensors", "--to", "kohya"), "LoRA"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_exit_code_2(words, message, folders, perflow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"BASE": folders[0], "TUNED": folders[1]}
    result = perflow(*(names.get(word, word) for word in words))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output and os.listdir(tmp_path) == []


def test_a_delta_of_another_model_is_refused_before_anything_is_written(folders, perflow, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"conv_in.weight": torch.zeros(320, 4, 3, 3)}, other)
    result = perflow("merge", folders[0], other, tmp_path / "out.safetensors")
    assert result.exit_code == 2 and "does not fit" in " ".join(result.output.split())
    assert sorted(os.listdir(tmp_path)) == ["other.safetensors"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("convert", "DELTA", "OUT", "--to", "kohya"), "is not a LoRA"),
        (("convert", "LORA", "OUT", "--to", "int8"), "is a LoRA, which is small already"),
        (("convert", "LORA", "OUT", "--to", "comfy"), "is a LoRA already"),
        (("extract-lora", "DELTA", "OUT", "--energy", "0"), "energy=0.0"),
        (("merge", "BASE", "DELTA", "OUT", "--scale", "nan"), "not a finite number"),
        (("merge", "DELTA", "DELTA", "OUT"), "is a delta, not complete weights"),
    ],
)
def test_a_dry_run_fails_where_the_run_would(words, message, delta, folders, perflow, tmp_path):
    lora, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    if "LORA" in words:
        assert perflow("extract-lora", delta, lora, "--rank", 2).exit_code == 0
    names = {"BASE": folders[0], "DELTA": delta, "LORA": lora, "OUT": out}
    words = [names.get(word, word) for word in words]
    for more in (("--dry-run",), ()):
        result = perflow(*words, *more)
        assert result.exit_code == 2 and message in result.output, result.output
        assert not out.exists()


def test_a_warning_is_a_sentence_without_a_line_of_code(delta, perflow, tmp_path):
    lora = tmp_path / "lora.safetensors"
    assert perflow("extract-lora", delta, lora, "--no-residual").exit_code == 0
    tensors = {**load_file(lora), "bundle_emb.mystyle.string_to_param.*": torch.zeros(1, 16)}
    with_words = tmp_path / "with-words.safetensors"
    save_file(tensors, with_words)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = perflow("convert", with_words, tmp_path / "kohya.safetensors", "--to", "kohya")
    assert result.exit_code == 0, result.output
    assert "perflow convert: note: " in result.output and "mystyle" in result.output
    assert ".py" not in result.output and "UserWarning" not in result.output


def test_ema_weights_if_asked(folders, perflow, tmp_path):
    base, tuned, out = tmp_path / "base.safetensors", folders[1], tmp_path / "out.safetensors"
    save_file({"model_ema.diffusion_modelinput_blocks00weight": torch.ones(1)}, base)
    for words in (
        ("diff", tuned, tuned, "--base-ema"),
        ("diff", base, tuned, "--tuned-ema"),
        ("merge", tuned, tuned, "--base-ema"),
    ):
        result = perflow(*words[:3], out, words[3])
        assert result.exit_code == 2 and "has no EMA weights" in " ".join(result.output.split())
    assert "EMA weights only" in perflow("info", base).output


def test_a_dry_run_says_that_a_lora_would_be_larger_than_its_delta(delta, perflow, tmp_path):
    for rank, larger in ((1000, True), (1, False)):
        told = perflow("extract-lora", delta, tmp_path / "x", "--rank", rank, "--dry-run").output
        assert ("more than the" in told) == larger
        assert perflow("extract-lora", delta, tmp_path / f"{rank}.safetensors", "--rank", rank).exit_code == 0
        written = load_file(tmp_path / f"{rank}.safetensors")
        carried = [value for name, value in load_file(delta).items() if value.dim() in (2, 4)]
        size = sum(value.numel() for value in written.values())
        assert (size > sum(value.numel() for value in carried)) == larger


def test_combine_asks_the_hub_as_it_is_told(delta, perflow, tmp_path):
    told = ("--local-files-only", "--cache-dir", tmp_path / "cache")
    result = perflow("combine", delta, "someone/elsewhere", tmp_path / "sum.safetensors", *told)
    assert result.exit_code == 2, result.output
    assert "'someone/elsewhere' is no file" in result.output and "local_files_only=True" in result.output
    assert not (tmp_path / "sum.safetensors").exists()
