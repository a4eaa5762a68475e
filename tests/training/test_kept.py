"""What a run keeps when its end, its disk or its checkpoints fail."""

import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_log import logged
from safetensors.torch import load_file
from short_run import options, train

import export_perflow
import train_perflow
from perflow_training import checkpoint
from perflow_training.config import ConfigError, load_config
from perflow_training.run_folder import checkpoints
from perflow_training.trainer import Trainer

TRAINING = Path(train_perflow.__file__).parent


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run of four steps with a checkpoint after each; it ends on one."""
    return train(tmp_path_factory.mktemp("original") / "run", "max_train_steps=4", "checkpointing_steps=1")


@pytest.fixture
def finished(original, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(original, tmp_path / "out"))


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def names(out):
    return [path.name for path in checkpoints(out)]


def test_the_final_state_is_saved_once_with_checkpoints_and_without(original, tmp_path, monkeypatch):
    saves = []
    save = Trainer.save
    monkeypatch.setattr(Trainer, "save", lambda self: saves.append(self.step) or save(self))
    out = train(tmp_path / "plain", "max_train_steps=4")
    assert names(out) == ["checkpoint-4"]
    train(tmp_path / "often", "max_train_steps=4", "checkpointing_steps=2")
    assert saves == [4, 2, 4]
    assert same(weights(out), weights(original))
    for path in out.rglob("*"):  # the files of accelerate, safetensors and diffusers alike
        wanted = (out / "log.jsonl").stat().st_mode & 0o777
        assert path.is_dir() or path.stat().st_mode & 0o777 == wanted, path


def test_manifest_hashes_are_those_of_the_files(original):
    folder = original / "checkpoint-4"
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    there = {path.name: path for path in folder.iterdir() if path.name != "manifest.json"}
    assert {name: entry["sha256"] for name, entry in listed.items()} == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in there.items()
    }
    assert {"optimizer.bin", "ema.safetensors", "trainer_state.json", "random_states_0.pkl"} <= set(listed)


def test_an_export_that_fails_says_how_to_do_it_again_and_that_works(original, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(train_perflow, "write_products", full)
        patch.setattr(sys, "argv", ["train_perflow.py", *options(out, "max_train_steps=4")])
        with pytest.raises(SystemExit) as stop:
            train_perflow.main()
    said = str(stop.value.code)
    assert "No space left on device" in said
    assert not (out / "unet").exists()
    command = said[said.index("python ") :]
    assert command in caplog.text  # said before as well, for nothing is said at a kill
    assert shlex.split(command)[1].endswith("export_perflow.py")
    export_perflow.main(shlex.split(command)[2:])
    assert same(weights(out), weights(original))
    assert (out / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_a_signal_while_the_product_is_written_says_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(train_perflow, "write_products", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(sys, "argv", ["train_perflow.py", *options(tmp_path / "out", "max_train_steps=1")])
    with pytest.raises(SystemExit) as stop:
        train_perflow.main()
    assert stop.value.code == 143
    assert "SIGTERM: the run has ended. The training is done, its product is not written." in caplog.text
    assert "export_perflow.py" in caplog.text
    assert names(tmp_path / "out") == ["checkpoint-1"]


def test_a_run_that_was_killed_in_its_export_writes_the_product_when_it_is_started_again(finished, original, caplog):
    shutil.rmtree(finished / "unet")
    (finished / "finished.json").unlink()
    train(finished, "max_train_steps=4", "resume_from_checkpoint=latest")
    assert same(weights(finished), weights(original))
    assert len(logged(finished)) == 4


def test_a_finished_run_is_not_overwritten(finished, caplog):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="holds a finished run; nothing was done"):
        train(finished, "max_train_steps=4")
    with caplog.at_level("INFO"):
        train(finished, "max_train_steps=4", "resume_from_checkpoint=latest")
    assert "finished run; nothing was done" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_a_rewind_keeps_what_it_writes_and_sets_the_old_branch_aside(finished, original):
    """Seen at a limit of 2: the checkpoint resumed from and the one just written were deleted."""
    more = ("max_train_steps=4", "checkpointing_steps=1", "checkpoints_total_limit=2")
    train(finished, *more, "resume_from_checkpoint=checkpoint-2")
    assert names(finished) == ["checkpoint-3", "checkpoint-4"]
    aside = sorted(path.name for path in finished.glob("abandoned-*"))
    assert aside == ["abandoned-checkpoint-3", "abandoned-checkpoint-4"]
    assert same(weights(finished), weights(original))
    assert [(line["step"], line["loss"]) for line in logged(finished)] == [
        (line["step"], line["loss"]) for line in logged(original)
    ]


def test_a_flipped_bit_is_found_by_resume_and_export_which_take_the_one_before(finished, original, tmp_path, caplog):
    newest = finished / "checkpoint-4" / "ema.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 8
    newest.write_bytes(content)
    with pytest.raises(ConfigError, match=r"checkpoint-4 is damaged: ema\.safetensors .*before it is .*checkpoint-3"):
        export_perflow.export(finished / "checkpoint-4", tmp_path / "x", ["student"])
    paths = export_perflow.export(finished, tmp_path / "x", ["student"])
    assert "checkpoint-4 is damaged: ema.safetensors" in caplog.text
    third = export_perflow.export(original / "checkpoint-3", tmp_path / "y", ["student"])
    assert same(*(load_file(p["student"] / "diffusion_pytorch_model.safetensors") for p in (paths, third)))
    train(finished, "max_train_steps=4", "resume_from_checkpoint=latest")
    assert names(finished) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert same(weights(finished), weights(original))


def test_an_older_log_without_a_checkpoint_is_kept(tmp_path, caplog):
    out = tmp_path / "out"
    out.mkdir()
    (out / "log.jsonl").write_text('{"step": 1}\n')
    train(out, "max_train_steps=1")
    assert (out / "log-1.jsonl").read_text() == '{"step": 1}\n'
    assert [line["step"] for line in logged(out)] == [1]


def test_a_disk_that_takes_no_checkpoint_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    """No file may grow above 4 kB while the second checkpoint is written: the system itself refuses."""
    save = checkpoint.Accelerator.save_state

    def cramped(self, folder):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if folder.endswith("checkpoint-2.tmp"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            return save(self, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(checkpoint.Accelerator, "save_state", cramped)
    out = train(tmp_path / "out", "checkpointing_steps=1", "checkpoints_total_limit=1")
    assert re.search(r"checkpoint-2 could not be written \(.*\); its disk has [\d,.]+ MiB free", caplog.text)
    assert f"The last one is {out / 'checkpoint-1'}" in caplog.text
    assert names(out) == ["checkpoint-3"]
    assert len(logged(out)) == 3
    assert not list(out.glob(".*"))


def test_nothing_that_is_only_looked_at_ends_a_run(tmp_path, monkeypatch, caplog):
    """The log, the validation pictures, and trackers, which write when they are told to and when they are closed."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    step, out = Trainer._step, tmp_path / "out"

    def in_the_way(self, lines):
        (out / "log.jsonl").mkdir()
        (out / "validation").touch()
        return step(self, lines)

    monkeypatch.setattr(Trainer, "_step", in_the_way)
    monkeypatch.setattr(checkpoint.Accelerator, "log", full)
    monkeypatch.setattr(checkpoint.Accelerator, "end_training", full)
    train(out, "max_train_steps=1", "validation_steps=1", "validation_prompts=[a dog]",
          "validation_samplings=[[4, 4.5]]", "validation_teacher_steps=1")  # fmt: skip
    for said in ("log.jsonl cannot be written", "picture of step 1", "`report_to=none`", "The last lines of"):
        assert said in caplog.text
    assert (out / "finished.json").is_file()


HUB = """
import os, sys
import train_perflow
write = train_perflow.open_base
def gone(*where):
    os.unlink(os.environ["HF_HUB_CACHE"] + "/models--some--teacher/refs/main")
    return write(*where)
train_perflow.open_base = gone
train_perflow.main()
"""


def test_the_export_does_not_ask_the_hub_for_what_was_loaded(tmp_path):
    """A teacher in the Hub's cache, of which the Hub says nothing any more when the product is written."""
    cached = tmp_path / "hub" / "models--some--teacher"
    teacher = options("")[0].partition("=")[2]
    shutil.copytree(teacher, cached / "snapshots" / "0123abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    environment = {
        **os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(TRAINING),
    }  # fmt: skip
    words = options(tmp_path / "out", "pretrained_model_name_or_path=some/teacher", "max_train_steps=1")
    ended = subprocess.run([sys.executable, "-c", HUB, *words], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert not (cached / "refs" / "main").exists()
    export_perflow.main([str(tmp_path / "out"), "--out", str(tmp_path / "again"), "--form", "student"])
    assert same(weights(tmp_path / "out"), weights(tmp_path / "again"))


def test_a_url_is_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for word in (
        "output_dir=s3://bucket/run", "output_dir=gs://bucket/run", "output_dir=hf://buckets/me/run",
        "output_dir=file:///data/run", "resume_from_checkpoint=https://host/checkpoint-2", "train_cache_dir=s3://b/c",
        "train_data_dir=s3://b/c", "train_captions=http://host/captions.txt",
    ):  # fmt: skip
        source = [] if word.startswith("train") else ["train_captions=b"]
        with pytest.raises(ConfigError) as refused:
            load_config(None, ["pretrained_model_name_or_path=a", *source, word])
        assert f"`{word}` is a URL" in str(refused.value)
    assert load_config(None, ["pretrained_model_name_or_path=a", "train_captions=b", "output_dir=C:/run"])
    for words in (["s3://bucket/run"], [str(tmp_path), "--out", "s3://bucket/x"], [str(tmp_path), "--base", "gs://b"]):
        with pytest.raises(SystemExit):
            export_perflow.main(words)
        assert "is a URL (" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
