"""What stands in a folder while something is written to it, and after it failed at any of its renames."""

import os
from pathlib import Path

import pytest

from perflow_diffusers.io.atomic import put_together, staging, sync, whole, write_whole


class Killed(BaseException):
    """Stands for a kill at a rename."""


def kill_at(patch, number):
    """Let the `number`-th rename from now on fail."""
    real, left = os.replace, [number]

    def replace(source, target):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        real(source, target)

    patch.setattr(os, "replace", replace)


def content(folder):
    """All files below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_file_appears_complete_or_not_at_all(tmp_path):
    target = write_whole(tmp_path / "a.txt", "é")
    assert target.read_bytes() == "é".encode()
    with pytest.raises(Killed), whole(target) as temporary:
        temporary.write_text("half")
        assert content(tmp_path)["a.txt"] == "é"
        raise Killed
    assert content(tmp_path) == {"a.txt": "é"}
    write_whole(target, b"new", synced=True)
    assert content(tmp_path) == {"a.txt": "new"}


@pytest.mark.parametrize("number", [1, 2])
def test_a_folder_takes_the_place_of_another_or_leaves_it(number, tmp_path, monkeypatch):
    target = tmp_path / "model"
    (target / "old").mkdir(parents=True)
    (target / "old" / "x").write_text("1")

    def write():
        with whole(target, synced=True) as temporary:
            temporary.mkdir()
            (temporary / "y").write_text("2")

    with monkeypatch.context() as patch:
        kill_at(patch, number)
        with pytest.raises(Killed):
            write()
    assert content(tmp_path) == {"model/old/x": "1"}
    write()
    assert content(tmp_path) == {"model/y": "2"}


def test_files_that_belong_together_get_their_names_last(tmp_path):
    write_whole(tmp_path / "b", "old"), write_whole(tmp_path / "c", "old")
    with pytest.raises(Killed), staging(tmp_path) as staged:
        write_whole(staged / "b", "new")
        raise Killed
    assert content(tmp_path) == {"b": "old", "c": "old"}
    with staging(tmp_path) as staged:
        write_whole(staged / "a", "new"), write_whole(staged / "b", "new")
        put_together(staged, tmp_path, ["a", "b"], former=["b", "c"])
    assert content(tmp_path) == {"a": "new", "b": "new"}


def test_everything_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    names = [write_whole(folder / name, name) for name in ("a", "b")]
    synced = []

    def fsync(number):
        synced.append(Path(os.readlink(f"/proc/self/fd/{number}")))

    monkeypatch.setattr(os, "fsync", fsync)
    sync(folder)
    assert set(synced) == {*names, folder}
