"""Signals: remembered until a step is over, agreed on, and an end at once where nothing is to be saved."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from short_run import options

import train_perflow
from perflow_training import checkpoint, trainer
from perflow_training.run_folder import checkpoints
from perflow_training.stopping import SIGNALS, Stopped, Stopping
from perflow_training.validation import Validation

TRAINING = Path(train_perflow.__file__).parent
SLOW = """
import sys, time
import train_perflow
from perflow_training.trainer import Trainer
step = Trainer._step
def slow(self, log):
    print("STEP", self.step, flush=True)
    time.sleep(60 if self.step else 0)
    return step(self, log)
Trainer._step = slow
train_perflow.main()
"""


def tell(number):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """Tests that run in the background are told to ignore Ctrl-C, and so would be what they start."""
    usual = {number: signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL for number in SIGNALS}
    former = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture
def ends(monkeypatch, tmp_path):
    """Runs the command with `words` and returns its code."""

    def end(*words):
        monkeypatch.setattr(sys, "argv", ["train_perflow.py", *options(tmp_path / "out", *words)])
        with pytest.raises(SystemExit) as stop:
            train_perflow.main()
        return stop.value.code

    return end


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_wait_for_the_step_and_only_there(number):
    former = {one: signal.getsignal(one) for one in SIGNALS}
    with Stopping() as stopping:
        with stopping.after_the_step():
            assert not stopping.agreed()
            tell(number)
            assert stopping.agreed() == number
        with pytest.raises(Stopped) as stopped:
            tell(signal.SIGTERM)
        assert stopped.value.code == 143
    assert {one: signal.getsignal(one) for one in SIGNALS} == former


def test_what_the_process_ignores_stays_ignored():
    """nohup, and the shell's background jobs."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopping() as stopping:
            tell(signal.SIGHUP)
            assert not stopping.asked
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_the_message_names_the_time_that_the_launcher_gives(monkeypatch, capfd):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "45")
    with Stopping() as stopping, stopping.after_the_step():
        tell(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    said = capfd.readouterr().err
    assert "kill it after 45 s" in said
    assert "set TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in said
    assert "Ctrl-C once more ends it at once" in said


def test_a_signal_while_the_run_is_prepared_ends_it_at_once(ends, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trainer, "check_start", lambda *_: tell(signal.SIGTERM))
    assert ends() == 143
    assert "SIGTERM: the run has ended. Nothing is saved: no step had been taken." in caplog.text
    assert not (tmp_path / "out").exists() or not checkpoints(tmp_path / "out")


def test_ctrl_c_while_validation_draws_ends_it_with_a_checkpoint(ends, tmp_path, monkeypatch, caplog):
    draw = Validation._draw

    def told(self, pipe, steps, guidance):
        tell(signal.SIGINT)
        return draw(self, pipe, steps, guidance)

    monkeypatch.setattr(Validation, "_draw", told)
    code = ends("validation_steps=2", "validation_prompts=[a dog]", "validation_samplings=[[4, 4.5]]",
                "learning_rate=1e-2", "lr_warmup_steps=0", "ema_decay=0.9")  # fmt: skip
    assert code == 130
    out = tmp_path / "out"
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
    assert not (out / "validation").exists()
    assert "Saved: " in caplog.text
    student, ema = (load_file(out / "checkpoint-2" / name) for name in ("student.safetensors", "ema.safetensors"))
    assert any(not student[name].equal(ema[name]) for name in ema)  # the trained weights are back in their place


def test_a_signal_while_a_checkpoint_is_written_leaves_one_that_is_whole(ends, tmp_path, monkeypatch):
    write = checkpoint.write_manifest

    def told(*args):
        tell(signal.SIGUSR1)
        write(*args)

    monkeypatch.setattr(checkpoint, "write_manifest", told)
    assert ends("checkpointing_steps=2", "max_train_steps=4") == 128 + signal.SIGUSR1
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]


BRIEF = """
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
import train_perflow
from perflow_training.trainer import Trainer
step, reached = Trainer._step, open(sys.argv.pop(1), "w")
def slow(self, log):
    norm = step(self, log)
    print("step", self.step, file=reached, flush=True)
    time.sleep(0.3)
    return norm
Trainer._step = slow
train_perflow.main()
"""


def test_a_lost_terminal_ends_the_run_with_a_checkpoint(tmp_path):
    """A closed connection: after the signal, every word to the terminal is an error."""
    reached = tmp_path / "reached"
    reached.touch()
    words = [sys.executable, "-c", BRIEF, str(reached), *options(tmp_path / "out", "max_train_steps=1000")]
    environment = {**os.environ, "PYTHONPATH": str(TRAINING), "PYTHONWARNINGS": "ignore"}
    outside, inside = pty.openpty()
    running = subprocess.Popen(
        words, env=environment, stdin=inside, stdout=inside, stderr=inside, start_new_session=True
    )
    os.close(inside)
    try:
        while running.poll() is None and not reached.read_text():
            if select.select([outside], [], [], 0.1)[0]:
                os.read(outside, 1 << 16)
        os.close(outside)
        assert running.wait(timeout=60) == 128 + signal.SIGHUP
    finally:
        running.kill()
    assert len(checkpoints(tmp_path / "out")) == 1


def test_a_second_ctrl_c_ends_a_long_step_at_once(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(TRAINING), "PYTHONWARNINGS": "ignore"}
    running = subprocess.Popen(
        [sys.executable, "-c", SLOW, *options(tmp_path / "out")], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        for line in running.stdout:
            if line.startswith("STEP 1"):
                break
        running.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=20) == -signal.SIGINT
        assert "SIGINT: the run ends after this step" in running.stderr.read()
    finally:
        running.kill()
        running.communicate()
    assert not checkpoints(tmp_path / "out")
