"""What the commands write: `.safetensors` files and folders, of which --force leaves nothing old."""

import json
import os

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from perflow_diffusers import compute_delta, convert_lora, extract_lora, shrink_delta
from perflow_diffusers.errors import WeightWriteError
from perflow_diffusers.weights import combine, delta_for_comfy, merge_files

OPTIONS = ("--prediction-type", "ddim_eps")


@pytest.fixture
def delta(perflow, folders, tmp_path):
    out = tmp_path / "delta.safetensors"
    assert perflow("diff", *folders, out, *OPTIONS).exit_code == 0
    return out


@pytest.fixture
def lora(perflow, delta, tmp_path):
    out = tmp_path / "lora.safetensors"
    assert perflow("extract-lora", delta, out, "--rank", 2).exit_code == 0
    return out


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


COMMANDS = {
    "diff": ("diff", "BASE", "TUNED", "OUT", *OPTIONS),
    "diff in shards": ("diff", "BASE", "TUNED", "OUT", "--shard-size", "1", *OPTIONS),
    "merge": ("merge", "BASE", "DELTA", "OUT"),
    "extract-lora": ("extract-lora", "DELTA", "OUT"),
    "combine": ("combine", "DELTA", "DELTA", "OUT"),
    "combine LoRAs": ("combine", "LORA", "LORA", "OUT"),
    "convert a LoRA": ("convert", "LORA", "OUT", "--to", "kohya"),
    "convert a delta": ("convert", "DELTA", "OUT", "--to", "int8"),
    "convert for ComfyUI": ("convert", "DELTA", "OUT", "--to", "comfy"),
}
#: those that write folders beside files, and the one that writes folders alone
BOTH, FOLDER = ("merge", "extract-lora", "combine LoRAs"), "diff in shards"


@pytest.mark.parametrize("ending", [".bin", ".ckpt", ".pt", ".txt", ".json", ".gguf", ".safetensor"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_name_that_no_loader_takes_is_refused(name, ending, folders, delta, lora, perflow, tmp_path, monkeypatch):
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    names = {"BASE": folders[0], "TUNED": folders[1], "DELTA": delta, "LORA": lora, "OUT": f"out{ending}"}
    words = [names.get(word, word) for word in COMMANDS[name]]
    for more in ((), ("--dry-run",), ("--force",)):
        result = perflow(*words, *more)
        said = " ".join(result.output.split())
        assert (result.exit_code == 2 and f"out{ending}" in said and ".safetensors" in said) or name == FOLDER
        assert os.listdir(place) == [], said


def test_the_library_refuses_it_too(folders, delta, lora, tmp_path):
    out = tmp_path / "out.bin"
    for write in (
        lambda: compute_delta(*folders, out),
        lambda: compute_delta(*folders, tmp_path / "out.safetensors", max_shard_size=1 << 20),
        lambda: merge_files(folders[0], delta, out),
        lambda: extract_lora(delta, out, rank=2),
        lambda: combine([delta, delta], out),
        lambda: combine([lora, lora], out),
        lambda: convert_lora(lora, out, "kohya"),
        lambda: shrink_delta(delta, out, "int8"),
        lambda: delta_for_comfy(delta, out),
    ):
        with pytest.raises(WeightWriteError, match=r"\.safetensors"):
            write()
    assert not out.exists() and not (tmp_path / "out.safetensors").exists()


def test_a_version_in_the_name_of_a_folder_is_no_ending(folders, delta, perflow, tmp_path):
    assert perflow("merge", folders[0], delta, tmp_path / "model-v1.5").exit_code == 0
    assert UNet2DConditionModel.from_pretrained(tmp_path / "model-v1.5")


@pytest.mark.parametrize("name", [*BOTH, FOLDER])
def test_force_leaves_nothing_of_an_old_folder(name, folders, delta, lora, perflow, tmp_path):
    names = {"BASE": folders[0], "TUNED": folders[1], "DELTA": delta, "LORA": lora}
    fresh, out = tmp_path / "fresh", tmp_path / "out"
    assert perflow(*(names.get(word, fresh if word == "OUT" else word) for word in COMMANDS[name])).exit_code == 0
    out.mkdir()
    old = ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors")
    for file in (*old, "other.residual.safetensors", "diffusion_pytorch_model.bin", "config.json", "README.md"):
        (out / file).write_text("old")
    words = [names.get(word, out if word == "OUT" else word) for word in COMMANDS[name]]
    refused = perflow(*words)
    assert refused.exit_code == 2 and "--force" in refused.output and (out / old[0]).read_text() == "old"
    result = perflow(*words, "--force")
    assert result.exit_code == 0, result.output
    assert tree(out) == tree(fresh) and str(out) in result.output and ".tmp" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_force_keeps_the_old_folder_if_anything_fails(folders, delta, perflow, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert perflow("merge", folders[0], delta, out).exit_code == 0
    before = tree(out)
    import perflow_diffusers.weights.merge.files as files

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(files, "write_text", full)  # after the weights, before the end
    result = perflow("merge", folders[0], delta, out, "--scale", "0.5", "--force")
    assert result.exit_code == 2 and "no space left" in result.output
    assert tree(out) == before and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_force_replaces_the_model_that_it_reads(folders, delta, perflow, tmp_path):
    out = tmp_path / "model"
    assert perflow("merge", folders[0], delta, out, "--scale", "0").exit_code == 0
    assert perflow("merge", out, delta, out, "--force").exit_code == 0
    base, change = (load_file(place) for place in (folders[0] / "diffusion_pytorch_model.safetensors", delta))
    for name, value in UNet2DConditionModel.from_pretrained(out).state_dict().items():
        assert torch.equal(value, base[name] + change[name])


@pytest.mark.parametrize("foreign", ["notes.txt", "unet/config.json", ".git/config", "thesis.pdf"])
def test_force_does_not_delete_what_is_no_weights(foreign, folders, delta, perflow, tmp_path):
    out = tmp_path / "out"
    (out / foreign).parent.mkdir(parents=True)
    (out / foreign).write_text("mine")
    for more in ((), ("--dry-run",)):
        result = perflow("merge", folders[0], delta, out, "--force", *more)
        said = " ".join(result.output.split())
        assert result.exit_code == 2 and foreign.split("/")[0] in said and "delete the folder yourself" in said
    assert tree(out) == {foreign: b"mine"}


def test_a_file_is_not_replaced_by_a_folder_nor_a_folder_by_a_file(folders, delta, perflow, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    for out, said in (("file", "is a file"), ("folder.safetensors", "is a folder")):
        result = perflow("merge", folders[0], delta, tmp_path / out, "--force")
        assert result.exit_code == 2 and said in " ".join(result.output.split())
    assert (tmp_path / "file").read_text() == "mine"


def test_the_residual_of_an_old_lora_goes_with_it(delta, perflow, tmp_path):
    out, rest = tmp_path / "out.safetensors", tmp_path / "out.residual.safetensors"
    assert perflow("extract-lora", delta, out, "--rank", 2).exit_code == 0 and rest.exists()
    assert perflow("extract-lora", delta, out, "--rank", 2, "--no-residual", "--force").exit_code == 0
    assert not rest.exists()
    assert perflow("extract-lora", delta, out, "--rank", 2, "--force").exit_code == 0 and rest.exists()
    kept = rest.read_bytes()
    assert perflow("convert", out, out, "--to", "kohya", "--force").exit_code == 0  # its own residual stays
    assert rest.read_bytes() == kept
    assert perflow("combine", out, out, out, "--force").exit_code == 0
    assert all(torch.equal(value, 2 * load_file(delta)[name]) for name, value in load_file(rest).items())


def test_the_report_names_the_place_and_not_the_way_there(delta, perflow, tmp_path):
    out, report = tmp_path / "lora", tmp_path / "report.json"
    words = ("extract-lora", delta, out, "--rank", 2, "--report", report)
    assert perflow(*words).exit_code == 0 and perflow(*words, "--force").exit_code == 0
    assert json.loads(report.read_text())["path"] == str(out / "pytorch_lora_weights.safetensors")


def test_a_delta_in_a_folder_needs_its_option(folders, perflow, tmp_path):
    result = perflow("diff", *folders, tmp_path / "delta", *OPTIONS)
    assert result.exit_code == 2 and "--shard-size" in result.output
    result = perflow("diff", *folders, tmp_path / "delta.safetensors", "--shard-size", "1", *OPTIONS)
    assert result.exit_code == 2 and "is to be a folder" in " ".join(result.output.split())
