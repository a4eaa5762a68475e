"""Two processes are one process with the same global batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_log import logged
from safetensors.torch import load_file

import train_perflow

TRAINING = Path(train_perflow.__file__).parent
PARQUET = TRAINING / "miniature" / "data" / "thumbs-test.parquet"
# Little guidance: a strong one amplifies the rounding of a solve, which differs with the batch size and the processor.
OPTIONS = (
    f"train_captions={PARQUET}", "data_starts=0.5", "guidance_scale=[2, 3]", "reuse=2", "max_train_steps=5",
    "window_weights=measured", "lr_warmup_steps=2", "checkpointing_steps=5",
)  # fmt: skip


def launch(words, processes, tries=3):
    """The command in several processes, as `accelerate launch` starts them; returns their last words and codes.

    Another program can take the port between the look and the start: then once more, with another one.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        **os.environ, "PYTHONWARNINGS": "ignore", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    command = [sys.executable, str(TRAINING / "train_perflow.py"), *words]
    running = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    ended = [(process.communicate(timeout=300)[0], process.returncode) for process in running]
    if tries > 1 and any(code and "EADDRINUSE" in text for text, code in ended):
        return launch(words, processes, tries - 1)
    return ended


def test_two_processes_have_the_losses_of_one_with_their_global_batch(run, words, tmp_path):
    one = run(*OPTIONS, "train_batch_size=4", "solve_batch_size=4", f"output_dir={tmp_path / 'one'}")
    one = tmp_path / "one"
    two = tmp_path / "out"
    for text, code in launch(words(*OPTIONS, "train_batch_size=2", "solve_batch_size=2"), 2):
        assert code == 0, text[-3000:]
    assert len(logged(one)) == 5
    for alone, together in zip(logged(one), logged(two), strict=True):
        for one_loss, two_loss in zip(alone["loss"], together["loss"], strict=True):
            # None: a window without samples
            assert one_loss == (two_loss and pytest.approx(two_loss, rel=1e-5, abs=1e-5))
        assert alone["grad_norm"] == pytest.approx(together["grad_norm"], rel=1e-4)
        assert alone["learning_rate"] == together["learning_rate"]
    first, second = (load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (one, two))
    for name, tensor in first.items():
        # Adam divides a gradient near zero by its own size: there, rounding shows in the weights
        torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=5e-6)
    files = {path.name for path in (two / "checkpoint-5").iterdir()}
    assert {"windows-00000.safetensors", "windows-00001.safetensors", "random_states_1.pkl"} <= files
