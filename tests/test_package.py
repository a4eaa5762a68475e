"""The package's door: names on demand, and classes that diffusers finds whichever is imported first."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import perflow_diffusers
from perflow_diffusers.hub.card import INSTALL_NOTE

ROOT = Path(__file__).parents[1]


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_every_public_name_is_there():
    for name in perflow_diffusers.__all__:
        assert getattr(perflow_diffusers, name) is not None and name in dir(perflow_diffusers)
    assert sorted(perflow_diffusers._ROOM_OF) == sorted({*perflow_diffusers.__all__} - {"__version__"})
    with pytest.raises(AttributeError, match="no attribute 'load_perflov'"):
        _ = perflow_diffusers.load_perflov
    assert perflow_diffusers.weights.merge_delta is perflow_diffusers.merge_delta


@pytest.mark.parametrize("first", ["perflow_diffusers", "diffusers"])
def test_diffusers_finds_the_classes_whichever_is_imported_first(first):
    second = {"perflow_diffusers": "diffusers", "diffusers": "perflow_diffusers"}[first]
    code = f"""
import importlib.util, sys
import {first}
assert importlib.util.find_spec("diffusers").name == "diffusers"
before = "torch" in sys.modules
import {second}
import diffusers, diffusers.pipelines
print(diffusers.PeRFlowScheduler.__module__, diffusers.Wonder3DPipeline.__module__, before)
print(type(diffusers.__spec__.loader).__name__)
print(diffusers.pipelines.__getattribute__("perflow_diffusers.schedulers.scheduling_perflow").__name__)
print(sum("AfterDiffusers" in str(finder) for finder in sys.meta_path))
"""
    scheduler = "perflow_diffusers.schedulers.scheduling_perflow"
    said = run(code)
    assert said[0] == scheduler and said[1].startswith("perflow_diffusers.pipelines.wonder3d")
    assert said[3:] == ["SourceFileLoader", scheduler, "0"]
    assert said[2] == "False" or first == "diffusers"


def test_a_place_without_diffusers_says_so():
    """The finder hands on what the others find: nothing."""
    code = """
import sys, importlib.util
import perflow_diffusers
sys.path[:] = [entry for entry in sys.path if "site-packages" not in entry]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(f).lower()]
sys.path_importer_cache.clear()
print(importlib.util.find_spec("diffusers"))
"""
    assert run(code) == ["None"]


def test_the_oldest_python_is_the_same_everywhere():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    oldest = setup["options"]["python_requires"].removeprefix(">=")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    used = next(step["with"] for step in ci["jobs"]["test"]["steps"] if "setup-python" in step.get("uses", ""))
    named = sorted(re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"]))
    readme = re.findall(r"Python (3[\d., \nor]+\d)", (ROOT / "README.md").read_text())
    assert oldest == project["tool"]["mypy"]["python_version"] == used["python-version"] == named[0]
    assert [re.findall(r"3\.\d+", text) for text in readme] == [named]
    major, minor = oldest.split(".")
    assert f"sys.version_info < ({major}, {minor})" in (ROOT / "Makefile").read_text()
    for text in (INSTALL_NOTE, (ROOT / "CONTRIBUTING.md").read_text()):
        assert f"Python {oldest} or newer" in text


def test_no_extra_is_for_what_a_wheel_does_not_hold():
    """Each package of an extra is imported in the package itself."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    code = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    for needed in setup["options.extras_require"].values():
        for line in needed.split():
            name = re.match(r"\w+", line)[0]
            assert re.search(rf"^\s*(import|from) {name}\b", code, re.M), name


def make(folder, *words):
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("target", ["demo", "app", "test"])
def test_a_python_that_is_too_old_is_said_before_anything_is_made(target, tmp_path):
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo Python 3.10.14;; *) exit 1;; esac\n')
    old.chmod(0o755)
    for python, said in (("./old-python", "is Python 3.10.14"), ("./no-python", "is not found")):
        done = make(tmp_path, target, f"PYTHON={python}")
        assert done.returncode != 0 and f"make {target} PYTHON=python3" in done.stderr
        assert "needs Python 3.11 or newer" in done.stderr and said in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_an_environment_whose_installation_was_cut_off_is_made_anew(tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 0\n")  # new enough, and with pip
    python.chmod(0o755)
    (tmp_path / ".venv" / "pyvenv.cfg").touch()
    anew = "-m venv --clear .venv"
    assert anew not in make(tmp_path, "-n", "demo", f"PYTHON={sys.executable}").stdout
    (tmp_path / ".venv" / ".installing").touch()
    assert anew in make(tmp_path, "-n", "demo", f"PYTHON={sys.executable}").stdout
