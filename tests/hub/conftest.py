"""The miniature's artefact, and tiny random pipelines of both shapes with an accelerator each."""

import contextlib
import io
import logging
from types import SimpleNamespace

import pytest
import torch
from hub_pipes import make_pipe, make_unet

from make_artifact import miniature_artifact
from perflow_diffusers.weights import compute_delta
from perflow_diffusers.weights.make.extract import extract_lora


@pytest.fixture(scope="session")
def artifact_folder(tmp_path_factory):
    """The miniature's own artefact: delta, LoRA in both layouts, card, one picture."""
    folder = tmp_path_factory.mktemp("artifact") / "miniature-perflow"
    with contextlib.redirect_stderr(io.StringIO()):
        miniature_artifact(folder, samples=1)
    return folder


@pytest.fixture(scope="session")
def accelerators(tmp_path_factory):
    """{kind: (folder of an artefact with delta and LoRA for `make_pipe(kind)`, delta file)}."""
    from perflow_diffusers.hub import PeRFlowArtifact

    made = {}
    for kind in ("sd", "sdxl"):
        folder = tmp_path_factory.mktemp(kind)
        base = make_pipe(kind)
        tuned = make_unet(kind)
        torch.manual_seed(5)
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        metadata = {
            "prediction_type": "ddim_eps",
            "num_time_windows": 4,
            "recommended_steps": [4],
            "guidance_scale": 0,
        }
        metadata.update(recommended_guidance_scale=2.0, licence="mit", base_model=f"someone/{kind}")
        delta = folder / "delta.safetensors"
        compute_delta(base.unet, tuned, delta, metadata=metadata)
        extract_lora(delta, folder / "lora.safetensors", rank=64, dtype=torch.float32)
        artifact = PeRFlowArtifact.from_header(delta).with_files(lora=folder / "lora.safetensors")
        artifact.save(folder / "artifact", base=base)
        made[kind] = SimpleNamespace(folder=folder / "artifact", delta=delta, lora=folder / "lora.safetensors")
    return made


@pytest.fixture
def bits():
    """Copies of all weights of a UNet, and a comparison of every bit."""

    def copy(unet):
        return {name: weight.detach().clone() for name, weight in unet.state_dict().items()}

    def same(first, second):
        return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)

    return SimpleNamespace(copy=copy, same=same)


@pytest.fixture
def records():
    """(level, text) of what is logged below diffusers' own logger."""
    found, handler = [], logging.Handler()
    handler.emit = lambda record: found.append((record.levelname, record.getMessage()))
    logger = logging.getLogger("diffusers.perflow")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
