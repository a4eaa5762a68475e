"""Whole pipelines load by id, in a fresh process, wherever this package is imported; their code is carried along."""

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
from loopback import TOKEN, LoopbackHub

from perflow_diffusers.findable import make_findable
from perflow_diffusers.schedulers import scheduling_perflow

HERE = Path(__file__).parent
SCHEDULER = "<class 'perflow_diffusers.schedulers.scheduling_perflow.PeRFlowScheduler'>"


def run(server, work, step):
    """One step in a fresh process with a fresh cache; its pictures and texts."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(work / f"home-{step}"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("HF_TOKEN", None)
    command = [sys.executable, str(HERE / "by_id_scenario.py"), step, str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return dict(np.load(work / f"{step}.npz")), json.loads((work / f"{step}.json").read_text())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(server, folder, pictures of the pipelines before they were pushed)."""
    work = tmp_path_factory.mktemp("by-id")
    (work / "token").write_text(TOKEN)
    with LoopbackHub() as server:
        yield server, work, run(server, work, "make")[0]


def same(drawn, wanted):
    # Not to the last bit: weights that are read from a file lie at other addresses, which kernels depend on.
    return np.abs(drawn - wanted).max() < 1e-5


def test_a_pipeline_pushed_in_any_way_loads_by_id(hub):
    server, work, wanted = hub
    pictures, texts = run(server, work, "load")
    assert texts["early"] == ""  # importing this package imports no pipeline
    assert texts["auto"] == SCHEDULER
    assert set(pictures) == {"pushed", "saved", "perflow-push", "without-card"}
    for name, drawn in pictures.items():
        assert same(drawn, wanted["one"]), name
        assert texts[name] == SCHEDULER
    index = json.loads((work / "saved" / "model_index.json").read_text())
    assert index["scheduler"] == ["perflow_diffusers.schedulers.scheduling_perflow", "PeRFlowScheduler"]  # frozen


def test_wonder3d_loads_by_id_through_the_general_class_whatever_is_imported_first(hub):
    server, work, wanted = hub
    pictures, texts = run(server, work, "views")
    assert same(pictures["hub"], wanted["views"]) and same(pictures["local"], wanted["views"])
    assert texts["pipe"] == "<class 'perflow_diffusers.pipelines.wonder3d.pipeline.Wonder3DPipeline'>"
    assert texts["unet"] == "<class 'perflow_diffusers.pipelines.wonder3d.unet.UNetMV2DConditionModel'>"
    assert texts["scheduler"] == SCHEDULER


def test_code_that_is_saved_again_is_carried_along_for_ever(hub):
    server, work, wanted = hub
    pictures, texts = run(server, work, "code_alone")
    assert same(pictures["one"], wanted["one"]) and texts["copied"] == "True"
    assert "trust_remote_code" in texts["untrusted"]
    # Where this package is not, diffusers names what is missing and loads nothing.
    for key in ("hub", "trusted", "local"):
        assert "perflow_diffusers.schedulers.scheduling_perflow" in texts[key], texts[key]
        assert texts[key].startswith("ValueError")
    pictures, texts = run(server, work, "again_alone")
    assert same(pictures["local"], wanted["one"]) and same(pictures["hub"], wanted["one"])
    assert "trust_remote_code" in texts["untrusted"]
    for name in ("scheduler/perflow_scheduler.py", "scheduler/scheduler_config.json", "model_index.json"):
        first, third = ((work / folder / name).read_bytes() for folder in ("code", "third"))
        if name == "model_index.json":
            first, third = (json.loads(text)["scheduler"] for text in (first, third))
            assert first == ["perflow_scheduler", "PeRFlowScheduler"]
        assert first == third, name


def test_registering_adds_four_attributes_once_and_leaves_others_alone():
    pipelines, kinds = diffusers.pipelines, (type(diffusers), type(diffusers.pipelines))
    make_findable()
    assert (type(diffusers), type(pipelines)) == kinds
    assert getattr(pipelines, scheduling_perflow.__name__) is scheduling_perflow
    assert diffusers.Wonder3DPipeline.__name__ == "Wonder3DPipeline"
    assert diffusers.PeRFlowScheduler is scheduling_perflow.PeRFlowScheduler
    assert not hasattr(pipelines, "perflow_diffusers")
