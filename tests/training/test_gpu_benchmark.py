"""benchmarks/gpu/training_step.py runs, and counts the operations that there are."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu" / "training_step.py"


@pytest.fixture(scope="module")
def bench():
    specification = importlib.util.spec_from_file_location("training_step", FILE)
    module = importlib.util.module_from_spec(specification)
    sys.modules["training_step"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["training_step"]


def test_both_sizes_run_on_a_cpu(bench, tmp_path, capsys):
    results = bench.main(
        ["--tiny", "--batch", "2", "--repeats", "1", "--device", "cpu", "--peak-tflops", "1", "--out", str(tmp_path)]
    )
    assert [got.model for got in results] == ["sd15", "sdxl"]
    assert [line["batch"] for line in json.loads((tmp_path / "training_step.json").read_text())] == [2, 2]
    assert "| sd15, all weights" in capsys.readouterr().out
    for got in results:
        # a solve is 4 windows x 4 steps of one forward; learning is a forward and a backward of about twice its work
        forward = got.tflop["solve"] / 16
        assert 2.5 < got.tflop["student"] / forward < 3.2
        least = got.seconds["student"] + got.seconds["optimiser"] + got.seconds["ema"] + got.seconds["solve"] / 4
        assert got.samples_per_second["1"] == pytest.approx(2 / least)


def test_lora_and_checkpointing(bench):
    plain, small = (
        bench.main(["--tiny", "--model", "sd15", "--batch", "1", "--repeats", "1", "--device", "cpu", *more])[0]
        for more in ([], ["--lora-rank", "2", "--checkpointing"])
    )
    assert plain.parameters == small.parameters
    assert small.tflop["solve"] == plain.tflop["solve"]


def test_real_sizes_are_the_published_ones(bench):
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in bench.network_of(name, False)[0].parameters()) for name in bench.MODELS}
    assert counts == {"sd15": 859_520_964, "sdxl": 2_567_463_684}
