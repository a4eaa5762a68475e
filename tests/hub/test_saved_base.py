"""What an artefact is saved with: a difference, never a model, and the base's own weights, never merged ones."""

import pickle

import pytest
import torch
from hub_pipes import make_pipe
from safetensors.torch import save_file

from perflow_diffusers import load_perflow
from perflow_diffusers.hub import PeRFlowArtifact
from perflow_diffusers.hub.base import base_facts
from perflow_diffusers.weights import DeltaError, MergeError, content_hash, merge_delta, unmerge_delta

ORIGINAL = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize("backup", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_merged_base_is_taken_as_it_was_before(kind, backup, accelerators, bits, tmp_path):
    pipe, other = make_pipe(kind), {name: 0.1 * w for name, w in make_pipe(kind).unet.state_dict().items()}
    wanted, facts = content_hash(pipe), base_facts(pipe)
    merge_delta(pipe, accelerators[kind].delta, backup=backup)
    merge_delta(pipe, other, 0.5, backup=backup)
    merged = bits.copy(pipe.unet)
    assert content_hash(pipe) != wanted
    for base in (pipe, pipe.unet):
        found = base_facts(base)
        assert found["base_sample"] == facts["base_sample"] and found["network"] == facts["network"]
        saved = PeRFlowArtifact.from_header(accelerators[kind].delta)
        folder = tmp_path / type(base).__name__
        # The delta's own header has a hash; the hash of the base is taken where nothing was said.
        object.__setattr__(saved, "base_hash", None)
        assert saved.save(folder, base=base).base_hash == wanted
    assert bits.same(bits.copy(pipe.unet), merged)
    unmerge_delta(pipe)
    unmerge_delta(pipe)
    assert content_hash(pipe) == wanted


def test_the_pipeline_that_was_accelerated_is_a_base(accelerators, tmp_path):
    pipe, facts = make_pipe("sd"), base_facts(make_pipe("sd"))
    load_perflow(pipe, accelerators["sd"].delta)
    saved = PeRFlowArtifact.from_header(accelerators["sd"].delta).save(tmp_path / "a", base=pipe)
    assert saved.base_sample == facts["base_sample"]
    load_perflow(make_pipe("sd"), tmp_path / "a")


def test_a_base_that_forgot_its_weights_is_refused(accelerators, tmp_path):
    artifact = PeRFlowArtifact.from_header(accelerators["sd"].delta)
    lasting, pickled = make_pipe("sd"), make_pipe("sd")
    merge_delta(lasting, accelerators["sd"].delta, backup="none")
    merge_delta(pickled, accelerators["sd"].delta)
    for base in (lasting, pickle.loads(pickle.dumps(pickled.unet))):
        with pytest.raises(MergeError, match=r"delta\.safetensors is merged into this model.*Load the base again"):
            artifact.save(tmp_path / "a", base=base)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("form", ["weights", "header that lies", "original"])
def test_a_model_is_not_saved_for_a_delta(form, accelerators, tmp_path):
    unet = make_pipe("sd").unet
    model = tmp_path / "model.safetensors"
    header = {"perflow_format": "delta-1"} if form == "header that lies" else {"format": "pt"}
    save_file({ORIGINAL: torch.ones(1)} if form == "original" else unet.state_dict(), model, header)
    artifact = PeRFlowArtifact.from_header(accelerators["sd"].delta).with_files(delta=model)
    with pytest.raises(DeltaError, match=r"complete.*not a delta"):
        artifact.save(tmp_path / "a", base=make_pipe("sd"))
    assert not (tmp_path / "a").exists()
