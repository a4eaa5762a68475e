"""Two processes are one process with the same global batch."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_log import logged
from safetensors.torch import load_file
from short_run import options

import train_perflow
from perflow_training.config import load_config
from perflow_training.manifest import read_manifest
from perflow_training.run_folder import checkpoints, choose_start, step_of

TRAINING = Path(train_perflow.__file__).parent
PARQUET = TRAINING / "miniature" / "data" / "thumbs-test.parquet"
# Little guidance: a strong one amplifies the rounding of a solve, which differs with the batch size and the processor.
OPTIONS = (
    f"train_captions={PARQUET}", "data_starts=0.5", "solve_guidance=[2, 3]", "reuse=2", "max_train_steps=5",
    "window_weights=measured", "lr_warmup_steps=2", "checkpointing_steps=5",
)  # fmt: skip


def launch(words, processes, tries=3, program=(str(TRAINING / "train_perflow.py"),), folders=None):
    """The command in several processes, as `accelerate launch` starts them; returns their last words and codes.

    Another program can take the port between the look and the start: then once more, with another one. `folders`:
    where each of them is.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        **os.environ, "PYTHONWARNINGS": "ignore", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join([str(TRAINING), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [sys.executable, *program, *words]
    running = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, cwd=folders[rank] if folders else None,
        )
        for rank in range(processes)
    ]  # fmt: skip
    ended = [(process.communicate(timeout=300)[0], process.returncode) for process in running]
    if tries > 1 and any(code and "EADDRINUSE" in text for text, code in ended):
        return launch(words, processes, tries - 1, program, folders)
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


CLAIMS = """
import sys
from pathlib import Path
from accelerate import Accelerator
from perflow_training import processes
processes.PATIENCE = 0.5
try:
    with processes.claimed(Accelerator(cpu=True), Path("out")):
        pass
except processes.ConfigError as error:
    sys.exit(str(error))
"""


def test_processes_that_do_not_see_one_folder_all_say_so(tmp_path):
    """As two machines without a common disk: here, one relative path in two places."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    for text, code in launch([], 2, program=("-c", CLAIMS), folders=folders):
        assert code == 1, text[-3000:]
        assert "Process 1 on " in text
        assert "does not see the folder `output_dir=out` of the main process" in text
    assert not any(list(folder.iterdir()) for folder in folders)


SLOW = """
import os, pathlib, signal, sys, time
import train_perflow
from perflow_training import checkpoint
from perflow_training.trainer import Trainer
step, save, here, rank = Trainer._step, checkpoint.write_safetensors, pathlib.Path(sys.argv.pop(1)), os.environ["RANK"]
if rank == "1":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
def slow(self, log):
    norm = step(self, log)
    (here / f"step-{self.step}-{rank}").touch()
    time.sleep(3)
    return norm
def full(path, *more, **options):
    if path.parent.name == ".checkpoint-1.tmp" and path.name == "windows-00001.safetensors":
        raise OSError(28, "No space left on device")
    save(path, *more, **options)
Trainer._step, checkpoint.write_safetensors = slow, full
try:
    train_perflow.main()
except SystemExit as end:
    (here / f"code-{end.code}-{rank}").touch()
    raise
"""


def test_one_process_without_space_and_one_that_is_told_to_end_are_heeded_by_all(tmp_path):
    """Under `accelerate launch`, whose SIGTERM reaches one of them between steps of seconds: nothing was saved within
    the launcher's 30 s when processes agreed at every tenth step."""
    (tmp_path / "slow.py").write_text(SLOW)
    environment = {
        **os.environ, "PYTHONWARNINGS": "ignore", "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join([str(TRAINING), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    words = options(tmp_path / "out", "max_train_steps=1000", "checkpointing_steps=1")
    with (tmp_path / "said").open("w+") as said:
        running = subprocess.Popen(
            [sys.executable, "-m", *command, str(tmp_path / "slow.py"), str(tmp_path), *words], env=environment,
            stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            while running.poll() is None and len(list(tmp_path.glob("step-2-*"))) < 2:
                time.sleep(0.1)
            running.send_signal(signal.SIGTERM)
            running.wait(timeout=60)
        finally:
            running.kill()
        said.seek(0)
        text = said.read()
    assert sorted(path.name for path in tmp_path.glob("code-*")) == ["code-143-0", "code-143-1"], text[-3000:]
    assert text.count("checkpoint-1 could not be written ([Errno 28] No space left on device)") == 1
    found = checkpoints(tmp_path / "out")
    last = step_of(found[-1])
    assert [path.name for path in found] == [f"checkpoint-{step}" for step in range(2, last + 1)]
    assert last < 5
    assert choose_start(load_config(None, [*words, "resume_from_checkpoint=latest"])).folder == found[-1]
    listed = read_manifest(found[-1])["files"]
    assert {"windows-00000.safetensors", "windows-00001.safetensors", "random_states_1.pkl"} <= set(listed)
    assert "kill it after 30 s" in text
    assert f"SIGTERM: the run has ended. Saved: {found[-1]}" in text
