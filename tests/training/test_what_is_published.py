"""What a run publishes names no place of the machine, and what it prints is what its user caused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from perflow_diffusers import compute_delta, load_miniature
from perflow_diffusers.miniature import miniature_folder
from perflow_training.compiling import can_compile
from perflow_training.config import TrainingConfig
from perflow_training.export import header, recipe

ROOT = Path(__file__).parents[2]
SMALL = ["max_train_steps=2", "logging_steps=1", "buffer_size=16", "solve_batch_size=8", "train_batch_size=4",
         "solver_steps=1", "validation_steps=2",
         "validation_teacher_steps=2", "validation_prompts=[a hat]"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The try-out of the documents, shortened, in a process whose output nobody looks at; paths are absolute."""
    out = tmp_path_factory.mktemp("secret-place") / "run"
    captions = ROOT / "training" / "miniature" / "data" / "avatars-train.parquet"
    words = [sys.executable, "training/train_perflow.py", "--config", "training/configs/tryout.yaml", *SMALL,
             f"output_dir={out}", f"train_captions={captions}", "learning_rate=0.1", "lr_warmup_steps=0",
             f"pretrained_model_name_or_path={miniature_folder() / 'avatars'}",
             "product=[student,delta,lora,artifact]"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "training"), "OMP_NUM_THREADS": "1"}
    environment.pop("TRANSFORMERS_VERBOSITY", None)
    source = str(ROOT / "src")
    environment["PYTHONPATH"] = os.pathsep.join([source, environment["PYTHONPATH"]])
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return out, done


def texts(folder):
    """Everything in a folder that a person or program reads as text, headers of weights included."""
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                yield file.name, json.dumps(weights.metadata())
        elif file.suffix in (".json", ".md", ".yaml", ".txt"):
            yield file.name, file.read_text()


def test_no_place_of_the_machine_is_in_what_is_published(run):
    out, _ = run
    private = {str(ROOT), str(out), str(out.parent), str(Path.home()), "secret-place", "state dict", "site-packages"}
    found = []
    for folder in (out / "unet", out / "lora", out / "artifact"):
        said = dict(texts(folder))
        assert said
        found += [(folder.name, name, word) for name, text in said.items() for word in private if word in text]
    with safe_open(out / "perflow.safetensors", "pt") as delta:
        header = delta.metadata()
    found += [(key, word) for key, value in header.items() for word in private if word in value]
    assert not found
    assert header["base"] == "avatars" and json.loads(header["recipe"])["train_captions"] == "avatars-train.parquet"
    card = (out / "artifact" / "README.md").read_text()
    assert '"train_captions": "avatars-train.parquet"' in card


def test_a_recipe_says_names_only(tmp_path):
    shards = ["https://me:word@host.example/data/{000..099}.tar?token=x", "pipe:curl -H 'token: x' https://y"]
    common = {"pretrained_model_name_or_path": "owner/model", "output_dir": str(tmp_path)}
    for given, expected in (
        ({"train_data_dir": str(tmp_path / "pictures")}, "pictures"),
        ({"train_captions": "../own/captions.txt"}, "captions.txt"),
        ({"dataset_name": "owner/dataset"}, "owner/dataset"),
        ({"train_shards": shards}, ["https://host.example/data/{000..099}.tar", "pipe:..."]),
    ):
        said = recipe(TrainingConfig(**given, **common))
        assert [said[name] for name in given] == [expected]
        assert said["pretrained_model_name_or_path"] == "owner/model"
        assert "output_dir" not in said and str(tmp_path) not in json.dumps(said)
        assert {"learning_rate", "solver", "num_time_windows"} <= set(said)


def test_a_base_that_is_no_longer_at_its_path_is_named_only(tmp_path):
    """As in an export on another machine; a Hub id is the one name that says something to others."""
    for name, base_model, base in (
        (str(tmp_path / "gone" / "teacher"), None, "teacher"),
        ("runs/gone/teacher", None, "teacher"),
        ("owner/model", "owner/model", "owner/model"),
    ):
        config = TrainingConfig(pretrained_model_name_or_path=name, train_captions="captions.txt")
        said = header(config, miniature_folder() / "avatars")
        assert (said.get("base_model"), said["base"]) == (base_model, base)
        assert str(tmp_path) not in json.dumps(said)


def test_weights_in_memory_have_no_name_in_a_header(tmp_path):
    unet = load_miniature().unet
    tuned = {name: weight + 0.1 for name, weight in unet.state_dict().items()}
    delta = compute_delta(unet, tuned, tmp_path / "d.safetensors")
    assert not {"base", "tuned"} & set(delta.metadata)
    folder = miniature_folder() / "avatars" / "unet"
    assert compute_delta(folder, tuned, tmp_path / "e.safetensors").metadata["base"] == "unet"


def test_a_run_into_a_log_prints_lines_and_no_bars(run):
    out, done = run
    said = done.stdout + done.stderr
    assert "\r" not in said and "%|" not in said and "it/s" not in said
    for word in ("torchvision", "[transformers]", "Loading", "Generating", "Warning", "Traceback"):
        assert word not in said, said
    assert "step 1 of 2, loss " in said and "step 2 of 2, loss " in said
    picture = out / "validation" / "step-000002.png"
    assert f"Teacher and student side by side: {picture}" in said and picture.is_file()


def test_without_a_compiler_it_goes_on_with_a_sentence(tmp_path):
    code = (
        "import logging, torch; logging.basicConfig(format='%(message)s', level='INFO'); "
        "from perflow_training.compiling import can_compile; print(can_compile(torch.device('cpu')))"
    )
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "training")])
    environment = {**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout.strip() == "False" and len(done.stderr.splitlines()) == 1, done.stderr
    assert "`torch_compile=true` cannot be had here" in done.stderr and "/nowhere/g++" in done.stderr


def test_a_failing_backend_is_a_sentence_and_a_working_one_says_how_long(monkeypatch, caplog):
    import torch

    def broken(*words, **options):
        raise RuntimeError("no Triton\n" * 100)

    with caplog.at_level("INFO", logger="perflow_training.compiling"):
        monkeypatch.setattr(torch, "compile", broken)
        assert not can_compile(torch.device("cpu"))
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        assert can_compile(torch.device("cpu"))
    assert len(caplog.messages) == 2 and caplog.messages[0].count("no Triton") == 1
    assert "1 to 2 minutes" in caplog.messages[1]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("script", ["train_perflow.py", "export_perflow.py", "precompute.py"])
def test_ctrl_c_while_a_script_imports_is_one_line(script, tmp_path):
    """A torch in place of the real one is interrupted in its first line."""
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\nwhile True: pass\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src"), str(ROOT / "training")])
    words = [sys.executable, str(ROOT / "training" / script)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": path})
    assert done.stderr == "interrupted\n" and done.returncode in (-2, 130)
