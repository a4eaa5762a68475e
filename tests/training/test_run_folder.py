"""What stands in output_dir after damage, rewinds, kills and deletions."""

import hashlib
import json
import logging
import os
import shutil

import pytest

from perflow_training.config import ConfigError, load_config
from perflow_training.manifest import MANIFEST, entries, files_of, write_manifest
from perflow_training.run_folder import (
    STATE,
    begin_branch,
    checkpoints,
    choose_start,
    find_checkpoint,
    keep_newest,
    mark_finished,
    put_in_place,
    step_of,
    tidy,
    write_time,
)


def write(folder, step, written=None):
    """A checkpoint of two small files."""
    folder.mkdir(parents=True)
    (folder / "ema.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "shards").mkdir()
    (folder / "shards" / "0.distcp").write_bytes(b"shard")
    (folder / STATE).write_text(json.dumps({"step": step, "manifest": True}))
    write_manifest(folder, entries(folder, files_of(folder)), written or write_time(folder.parent))
    return folder


def config(out, resume="latest", *more):
    words = [f"output_dir={out}", "pretrained_model_name_or_path=a", "train_captions=b", *more]
    return load_config(None, [*words, f"resume_from_checkpoint={resume}"])


def names(out):
    return [path.name for path in checkpoints(out)]


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = [
    (lambda folder: truncate(folder / "ema.safetensors"), "ema.safetensors has 2,047 bytes, not 2,048"),
    (lambda folder: os.truncate(folder / "ema.safetensors", 0), "ema.safetensors has 0 bytes"),
    (lambda folder: flip(folder / "ema.safetensors"), "ema.safetensors has other contents"),
    (lambda folder: (folder / "ema.safetensors").unlink(), "ema.safetensors is missing"),
    (lambda folder: flip(folder / "shards" / "0.distcp"), "shards/0.distcp has other contents"),
    (lambda folder: (folder / STATE).unlink(), f"{STATE} is missing"),
    (lambda folder: os.truncate(folder / STATE, 0), f"{STATE} has 0 bytes"),
    (lambda folder: (folder / MANIFEST).unlink(), f"{MANIFEST} is missing"),
    (lambda folder: os.truncate(folder / MANIFEST, 0), f"{MANIFEST} is missing or damaged"),
    (lambda folder: truncate(folder / MANIFEST), f"{MANIFEST} is missing or damaged"),
    (lambda folder: flip(folder / MANIFEST), f"{MANIFEST} is missing or damaged"),
]


def test_the_manifest_holds_the_sha_256_of_every_file(tmp_path):
    folder = write(tmp_path / "checkpoint-1", 1)
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    there = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    del there[MANIFEST]
    wanted = {name: {"bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for name, b in there.items()}
    assert listed == wanted


@pytest.mark.parametrize(("harm", "said"), DAMAGE)
def test_damage_is_named_with_the_good_one_before_and_latest_falls_back(tmp_path, caplog, harm, said):
    for step in (2, 4, 6):
        write(tmp_path / f"checkpoint-{step}", step)
    harm(tmp_path / "checkpoint-6")
    with pytest.raises(ConfigError) as refused:
        choose_start(config(tmp_path, "checkpoint-6"))
    assert said in str(refused.value)
    assert f"before it is {tmp_path / 'checkpoint-4'}" in str(refused.value)
    with caplog.at_level(logging.WARNING):
        assert choose_start(config(tmp_path)).folder.name == "checkpoint-4"
    assert said in caplog.text
    assert choose_start(config(tmp_path, "checkpoint-2")).folder.name == "checkpoint-2"


def test_nothing_is_taken_when_all_are_damaged(tmp_path):
    for step in (1, 2):
        truncate(write(tmp_path / f"checkpoint-{step}", step) / "ema.safetensors")
    with pytest.raises(ConfigError, match=r"All checkpoints .* are damaged \(checkpoint-1, checkpoint-2\)"):
        choose_start(config(tmp_path))


def test_checkpoints_of_before_manifests_are_still_taken(tmp_path):
    old = tmp_path / "checkpoint-3"
    old.mkdir()
    (old / STATE).write_text(json.dumps({"step": 3}))
    assert choose_start(config(tmp_path)).folder == old
    write(tmp_path / "checkpoint-1", 1)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-1"]


def test_order_and_limit_go_by_the_time_of_writing(tmp_path):
    """As a folder is that was rewound before rewinding moved anything: 6 is of the abandoned branch."""
    for step in (2, 6, 4):
        write(tmp_path / f"checkpoint-{step}", step)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6", "checkpoint-4"]
    assert choose_start(config(tmp_path)).folder.name == "checkpoint-4"
    keep_newest(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-4"]
    write(tmp_path / "checkpoint-9", 9, written=1e12)  # by a machine whose clock is wrong
    write(tmp_path / "checkpoint-10", 10)
    assert names(tmp_path)[-1] == "checkpoint-10"


def test_a_rewind_moves_later_checkpoints_aside_and_says_so(tmp_path, caplog):
    for step in (2, 4, 6):
        write(tmp_path / f"checkpoint-{step}", step)
    mark_finished(tmp_path, 6)
    begin_branch(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-2"]
    assert f"{tmp_path / 'checkpoint-6'} is of a later step than 2" in caplog.text
    write(tmp_path / "checkpoint-4", 4)
    begin_branch(tmp_path, 2)
    aside = sorted(path.name for path in tmp_path.glob("abandoned-*"))
    assert aside == ["abandoned-checkpoint-4", "abandoned-checkpoint-4-2", "abandoned-checkpoint-6"]
    assert choose_start(config(tmp_path, "abandoned-checkpoint-6")).folder.name == "abandoned-checkpoint-6"
    assert not (tmp_path / "finished.json").exists()


class Killed(BaseException):
    """In the place of SIGKILL: nothing catches it, nothing is tidied."""


def kill_at(monkeypatch, module, name, number, before=False):
    """The `number`-th call of module.name is the last thing that happens."""
    real, calls = getattr(module, name), []

    def call(*args, **options):
        calls.append(args)
        if len(calls) == number and before:
            raise Killed
        result = real(*args, **options)
        if len(calls) == number:
            raise Killed
        return result

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("before", [True, False])
def test_replacing_a_checkpoint_hides_both_copies_at_no_time(tmp_path, number, before):
    write(tmp_path / "checkpoint-2", 2)
    new = write(tmp_path / ".checkpoint-2.tmp", 2)
    (new / "new").touch()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, os, "replace", number, before)
        put_in_place(new, tmp_path / "checkpoint-2")
    visible = [path for path in tmp_path.iterdir() if not path.name.startswith(".") and (path / STATE).is_file()]
    assert visible
    tidy(tmp_path)
    assert names(tmp_path) == ["checkpoint-2"]
    assert choose_start(config(tmp_path)).folder.name == "checkpoint-2"
    assert not list(tmp_path.glob(".*"))


def test_a_half_deleted_checkpoint_does_not_count(tmp_path):
    for step in (1, 2):
        write(tmp_path / f"checkpoint-{step}", step)

    def dies_within(folder, **_):
        if folder.is_dir():
            (folder / "ema.safetensors").unlink()
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", dies_within)
        keep_newest(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-2"]
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]


def test_a_checkpoint_that_cannot_be_deleted_ends_nothing(tmp_path, caplog, monkeypatch):
    for step in (1, 2):
        write(tmp_path / f"checkpoint-{step}", step)

    def refuses(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuses)
    keep_newest(tmp_path, 1)
    assert "could not be deleted" in caplog.text


def test_what_a_kill_left_is_cleaned_and_what_it_completed_is_kept(tmp_path):
    write(tmp_path / "checkpoint-2", 2)
    write(tmp_path / ".checkpoint-4.tmp", 4)  # killed before the last rename
    half = write(tmp_path / ".checkpoint-6.tmp", 6)
    (half / MANIFEST).unlink()
    damaged = write(tmp_path / ".checkpoint-8.tmp", 8)
    truncate(damaged / "ema.safetensors")
    write(tmp_path / ".checkpoint-1.old.tmp", 1)  # an earlier version, killed between its two renames
    (tmp_path / ".perflow-0a1b.tmp").touch()
    (tmp_path / ".somebody.tmp").touch()
    tidy(tmp_path)
    assert sorted(names(tmp_path)) == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".somebody.tmp"]


def test_a_new_run_among_the_files_of_an_old_one_is_refused(tmp_path):
    """Of every kind that it would overwrite; the teacher's own folder has a `unet`, too."""
    for name, said in (("unet", "holds `unet`"), ("perflow.safetensors", "holds `perflow.safetensors`")):
        out = tmp_path / name
        (out / name).mkdir(parents=True)
        with pytest.raises(ConfigError, match=said):
            find_checkpoint(config(out, "null"))
    write(tmp_path / "run" / "checkpoint-2", 2)
    with pytest.raises(ConfigError, match=r"holds checkpoint-2 of an earlier run\. Go on with resume_from_checkpoint"):
        find_checkpoint(config(tmp_path / "run", "null"))
    mark_finished(tmp_path / "run", 2)
    with pytest.raises(ConfigError, match=r"finished run; nothing was done.*export_perflow\.py .*/run\. Train it"):
        find_checkpoint(config(tmp_path / "run", "null"))
    done = choose_start(config(tmp_path / "run", "latest", "max_train_steps=2"))
    assert done.finished
    longer = choose_start(config(tmp_path / "run", "latest", "max_train_steps=3"))
    assert not longer.finished
    assert step_of(longer.folder) == 2
