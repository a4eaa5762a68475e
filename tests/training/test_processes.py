"""One folder, one run: claims of live and dead runs, and a promised number of processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

import train_perflow
from perflow_training.config import ConfigError
from perflow_training.processes import LOCK, FailedSomewhere, check_number, claimed, on_all

TRAINING = Path(train_perflow.__file__).parent
CLAIMS = """
import sys
from pathlib import Path
from accelerate import Accelerator
from perflow_training.processes import claimed
with claimed(Accelerator(cpu=True), Path(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def alone():
    return Accelerator(cpu=True)


def test_a_folder_belongs_to_a_run_while_it_lives_and_no_longer(alone, tmp_path):
    out = tmp_path / "new" / "out"
    environment = {**os.environ, "PYTHONPATH": str(TRAINING), "PYTHONWARNINGS": "ignore"}
    other = subprocess.Popen(
        [sys.executable, "-c", CLAIMS, str(out)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"claimed\n"
        said = f"{out} belongs to a run that is still alive \\(process {other.pid} on .*, since 20.*choose another"
        with pytest.raises(ConfigError, match=said), claimed(alone, out):
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert (out / LOCK).is_file()
    with claimed(alone, out):
        (out / "log.jsonl").touch()
    assert [path.name for path in out.iterdir()] == ["log.jsonl"]


def test_a_run_that_writes_nothing_leaves_no_folder(alone, tmp_path):
    with pytest.raises(ConfigError, match="wrong option"), claimed(alone, tmp_path / "out"):
        raise ConfigError("wrong option")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with claimed(alone, tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_a_folder_that_cannot_be_made_is_named(alone, tmp_path):
    (tmp_path / "file").touch()
    said = r"`output_dir=.*/file/out` cannot be written to"
    with pytest.raises(ConfigError, match=said), claimed(alone, tmp_path / "file" / "out"):
        pass


def test_a_number_of_processes_that_did_not_find_each_other_is_refused(alone, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_number(alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2 is set.*overwrite.*accelerate launch.*unset WORLD_SIZE"):
        check_number(alone)


def test_what_fails_keeps_its_message(alone):
    def full():
        raise RuntimeError("file write failed")

    assert on_all(alone, lambda: 3) == 3
    with pytest.raises(FailedSomewhere, match="file write failed"):
        on_all(alone, full)
