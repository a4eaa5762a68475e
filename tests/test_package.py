"""The package's door: names on demand, and classes that diffusers finds whichever is imported first."""

import subprocess
import sys

import pytest

import perflow_diffusers


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
