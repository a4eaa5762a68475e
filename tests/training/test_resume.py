"""A run that was killed or told to end, and resumed, is the run that was not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_log import logged
from safetensors.torch import load_file

import train_perflow
from perflow_training.manifest import entries, files_of, write_manifest
from perflow_training.run_folder import checkpoints
from perflow_training.trainer import Trainer

TRAINING = Path(train_perflow.__file__).parent
PARQUET = TRAINING / "miniature" / "data" / "thumbs-test.parquet"
KILLED = """
import os, signal, sys
import train_perflow
from perflow_training.trainer import Trainer
step = Trainer._step
def killed(self, log):
    if self.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, log)
Trainer._step = killed
train_perflow.main()
"""
#: noised pictures and trajectories, windows used twice, a schedule, an EMA: everything that has a state
OPTIONS = (
    f"train_captions={PARQUET}", "data_starts=0.5", "reuse=2", "buffer_size=16", "max_train_steps=6",
    "checkpointing_steps=2", "checkpoints_total_limit=2", "lr_warmup_steps=2", "gradient_accumulation_steps=2",
    "train_batch_size=2",
)  # fmt: skip


def weights(out):
    return load_file(out / "unet" / "diffusion_pytorch_model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(run, words, tmp_path):
    whole = run(*OPTIONS, f"output_dir={tmp_path / 'whole'}") and tmp_path / "whole"
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(TRAINING), "PYTHONWARNINGS": "ignore"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *words(*OPTIONS)], env=environment, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-4"]
    assert not (out / "unet").exists()
    assert [line["step"] for line in logged(out)] == [1, 2, 3, 4, 5]
    run(*OPTIONS, "resume_from_checkpoint=latest")
    assert same(weights(out), weights(whole))
    mine, theirs = (load_file(checkpoints(folder)[-1] / "student.safetensors") for folder in (out, whole))
    assert same(mine, theirs)
    assert [(line["step"], line["loss"]) for line in logged(out)] == [
        (line["step"], line["loss"]) for line in logged(whole)
    ]
    assert [path.name for path in checkpoints(out)] == ["checkpoint-4", "checkpoint-6"]


def test_sigterm_saves_and_the_resumed_lora_is_the_same(run, tmp_path, monkeypatch):
    """With dropout in the LoRA, the random number generators of torch count, too."""
    options = ("lora_rank=2", "lora_dropout=0.3", "max_train_steps=4", "lora_target_modules=[to_q, conv1]",
               "product=[student]")  # fmt: skip
    whole = run(*options, f"output_dir={tmp_path / 'whole'}") and tmp_path / "whole"
    step = Trainer._step

    def told_to_end(self, log):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, log)

    monkeypatch.setattr(Trainer, "_step", told_to_end)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    out = tmp_path / "out"
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
    monkeypatch.setattr(Trainer, "_step", step)
    run(*options, "resume_from_checkpoint=checkpoint-2")
    assert same(weights(out), weights(whole))
    small = sum(value.numel() for value in load_file(out / "checkpoint-2" / "student.safetensors").values())
    assert small < 20000  # the LoRA alone


def test_an_unfinished_checkpoint_is_none(tmp_path, run):
    out = tmp_path / "out"
    (out / "checkpoint-7").mkdir(parents=True)
    (out / ".checkpoint-9.tmp").mkdir()
    assert checkpoints(out) == []
    run("max_train_steps=1", "resume_from_checkpoint=latest")  # a fresh start
    assert [path.name for path in checkpoints(out)] == ["checkpoint-1"]
    assert not list(out.glob(".*"))


def test_a_fresh_start_among_old_checkpoints_is_refused(run, capsys):
    out = run("max_train_steps=1", "checkpointing_steps=1")
    for said in ("holds a finished run; nothing was done", "holds checkpoint-1 of an earlier run"):
        with pytest.raises(SystemExit):
            run("max_train_steps=1")
        assert said in capsys.readouterr().err
        (out / "finished.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"processes": 2}, "was written by 2 processes and there are 1 now"),
        ({}, "is no checkpoint. In"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(run, tmp_path, capsys, change, message):
    out = run("max_train_steps=1", "checkpointing_steps=1")
    state = out / "checkpoint-1" / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), **change}))
    write_manifest(state.parent, entries(state.parent, files_of(state.parent)), 0.0)
    with pytest.raises(SystemExit):
        run("max_train_steps=2", f"resume_from_checkpoint=checkpoint-{1 if change else 3}")
    assert message in capsys.readouterr().err


def test_another_lora_rank_is_refused(run, capsys):
    run("max_train_steps=1", "checkpointing_steps=1", "lora_rank=2")
    with pytest.raises(SystemExit):
        run("max_train_steps=2", "resume_from_checkpoint=latest", "lora_rank=3")
    assert "are not those of this network" in capsys.readouterr().err
