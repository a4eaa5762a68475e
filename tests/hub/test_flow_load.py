"""Accelerators of flow-matching bases in and out of a real pipeline, held to what diffusers alone draws."""

import logging

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, WanPipeline
from flow_accelerator import BOUNDARIES, changed, draw, drawn_by_diffusers, flow_pipe, make_accelerator
from hub_pipes import make_pipe

from perflow_diffusers import FlowMatchPeRFlowScheduler, load_perflow, set_perflow_scale, set_scheduler, unload_perflow
from perflow_diffusers.errors import MergeError
from perflow_diffusers.hub import ArtifactError, PeRFlowArtifact

#: 2 u / (1 + u) at u = 1, 7/8, 3/4, 1/2, 1/4: the noisiest window gets the fifth step
FIVE = [1.0, 14 / 15, 6 / 7, 2 / 3, 2 / 5]


@pytest.fixture(scope="module")
def accelerator(tmp_path_factory):
    return make_accelerator(tmp_path_factory.mktemp("flow"), base_model="someone/flow")


@pytest.fixture(scope="module")
def expected():
    """{steps: pictures} of the changed weights by diffusers alone, and those of the base under None."""
    other = changed(flow_pipe())
    drawn = {4: drawn_by_diffusers(other, BOUNDARIES[:-1]), 5: drawn_by_diffusers(other, FIVE)}
    return {**drawn, "guided": drawn_by_diffusers(other, BOUNDARIES[:-1], 5.0), None: draw(flow_pipe())}


def test_a_delta_draws_what_diffusers_draws_with_its_weights_and_leaves_without_a_trace(accelerator, expected, bits):
    pipe = flow_pipe()
    before, scheduler = bits.copy(pipe.transformer), pipe.scheduler
    artifact = load_perflow(pipe, accelerator.folder)
    assert (artifact.steps, artifact.guidance_scale) == (4, 1.0)
    assert type(pipe.scheduler) is FlowMatchPeRFlowScheduler
    assert bits.same(pipe.transformer.state_dict(), changed(flow_pipe()).transformer.state_dict())
    assert np.abs(draw(pipe) - expected[4]).max() < 5e-6
    assert np.abs(draw(pipe, 5) - expected[5]).max() < 5e-6
    assert np.abs(draw(pipe, 4, 5.0) - expected["guided"]).max() < 5e-6
    assert np.abs(expected[4] - expected[None]).max() > 0.1
    unload_perflow(pipe)
    assert pipe.scheduler is scheduler and bits.same(before, pipe.transformer.state_dict())
    assert np.array_equal(draw(pipe), expected[None])


def test_a_lora_is_attached_by_the_pipelines_own_loader(accelerator, expected, bits):
    pipe = flow_pipe()
    before = bits.copy(pipe.transformer)
    load_perflow(pipe, accelerator.folder, "lora")
    assert list(pipe.transformer.peft_config) == ["perflow"]
    assert np.abs(draw(pipe) - expected[4]).max() < 2e-5
    set_perflow_scale(pipe, 0.5)
    half = draw(pipe)
    by_hand = flow_pipe()
    for one, other in zip(
        by_hand.transformer.parameters(), changed(flow_pipe()).transformer.parameters(), strict=True
    ):
        one.data.lerp_(other.data, 0.5)
    assert np.abs(half - drawn_by_diffusers(by_hand, BOUNDARIES[:-1])).max() < 2e-5
    unload_perflow(pipe)
    assert bits.same(before, pipe.transformer.state_dict()) and type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler


def test_the_loaders_lora_is_the_one_that_diffusers_loads(accelerator, expected):
    plain = flow_pipe()
    plain.load_lora_weights(accelerator.folder, weight_name="pytorch_lora_weights.safetensors", adapter_name="mine")
    assert np.abs(drawn_by_diffusers(plain, BOUNDARIES[:-1]) - expected[4]).max() < 2e-5


def test_the_scheduler_alone_for_weights_that_are_merged_by_hand(accelerator, expected):
    pipe = changed(flow_pipe())
    former = pipe.scheduler
    set_scheduler(pipe, accelerator.folder)
    assert np.abs(draw(pipe) - expected[4]).max() < 5e-6
    unload_perflow(pipe)
    assert pipe.scheduler is former
    with pytest.raises(ArtifactError, match="is in this UNet's weights already"):
        load_perflow(changed(flow_pipe()), accelerator.folder)


def test_another_shift_moves_no_window_and_is_said(accelerator, expected, records):
    for changed_shift in ({"shift": 3.0}, {"use_dynamic_shifting": True}):
        pipe = flow_pipe(**changed_shift)
        load_perflow(pipe, accelerator.folder)
        (text,) = [text for level, text in records if level == "WARNING" and "windows stay where" in text]
        key, value = next(iter(changed_shift.items()))
        assert f"pipeline's {key} is {value} instead of" in text and "(shift 2)" in text
        assert np.abs(draw(pipe) - expected[4]).max() < 5e-6
        records.clear()
    load_perflow(flow_pipe(), accelerator.folder)
    assert not any("windows stay" in text for _, text in records)


def refused(pipe, source, error, message, bits, **options):
    network = getattr(pipe, "unet", None) or pipe.transformer
    before, scheduler = bits.copy(network), pipe.scheduler
    with pytest.raises(error, match=message):
        load_perflow(pipe, source, **options)
    assert pipe.scheduler is scheduler and bits.same(before, network.state_dict())
    assert not getattr(network, "peft_config", None)


def test_a_network_or_process_of_another_kind_is_refused(accelerator, accelerators, bits):
    for form in ("delta", "lora"):
        message = "is for a flow-matching base, and this pipeline's is another"
        refused(make_pipe("sd"), accelerator.folder, ArtifactError, message, bits, weights=form)
        message = r"is for a `unet` of someone/sd, and StableDiffusion3Pipeline denoises with a `transformer`"
        refused(flow_pipe(), accelerators["sd"].folder, ArtifactError, message, bits, weights=form)
    flowing = make_pipe("sd", scheduler=FlowMatchEulerDiscreteScheduler())
    message = r"is for a `transformer` of someone/flow, and StableDiffusionPipeline denoises with a `unet`"
    refused(flowing, accelerator.folder, ArtifactError, message, bits)
    pipe = flow_pipe()
    pipe.scheduler = DDIMScheduler()
    message = r"is for a flow-matching base.*discrete betas.*put back.*FlowMatchEulerDiscreteScheduler\.from_pre"
    refused(pipe, accelerator.folder, ArtifactError, message, bits)
    refused(pipe, accelerator.folder, ArtifactError, message, bits, strict=False)
    with pytest.raises(ArtifactError, match="is for a flow-matching base"):
        set_scheduler(pipe, accelerator.folder)
    with pytest.raises(ValueError, match="belongs to flow matching"):
        set_scheduler(flow_pipe(), accelerators["sd"].folder)


def test_facts_of_the_network_must_agree(accelerator, bits, records):
    pipe = flow_pipe(num_train_timesteps=500)
    refused(pipe, accelerator.folder, ArtifactError, "num_train_timesteps is 500 instead of 1000", bits)
    refused(flow_pipe(invert_sigmas=True), accelerator.folder, ArtifactError, "invert_sigmas is True", bits)
    load_perflow(pipe, accelerator.folder, strict=False)
    assert any("may not fit this pipeline: num_train_timesteps is 500" in text for _, text in records)
    other = flow_pipe()
    for weight in other.transformer.state_dict().values():
        weight.copy_(torch.randn_like(weight))
    refused(other, accelerator.folder, ArtifactError, "weights have nothing in common with it", bits)
    small = flow_pipe()
    small.transformer.register_to_config(num_layers=4)
    refused(small, accelerator.folder, ArtifactError, "network differs from this pipeline's: num_layers 5 for 4", bits)


def test_a_pipeline_without_or_with_two_transformers_is_refused(accelerator):
    pipe = flow_pipe()
    pipe.transformer = None
    with pytest.raises(MergeError, match=r"StableDiffusion3Pipeline has no UNet \(its `transformer` is"):
        load_perflow(pipe, accelerator.folder)
    network, scheduler = flow_pipe().transformer, FlowMatchEulerDiscreteScheduler()
    two = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=network, transformer_2=network
    )
    with pytest.raises(ArtifactError, match=r"several networks \(`transformer`, `transformer_2`\).*merge_delta\(pipe"):
        load_perflow(two, accelerator.folder)
    assert two.scheduler is scheduler
    with pytest.raises(ArtifactError, match="is a part of a pipeline"):
        load_perflow(network, accelerator.folder)


def test_loading_twice_is_refused(accelerator):
    pipe = flow_pipe()
    load_perflow(pipe, PeRFlowArtifact.from_pretrained(accelerator.folder))
    with pytest.raises(ArtifactError, match="is loaded into this pipeline"):
        load_perflow(pipe, accelerator.folder)
    again = flow_pipe()
    again.scheduler = FlowMatchPeRFlowScheduler.from_config(again.scheduler.config, num_time_windows=4)
    with pytest.raises(ArtifactError, match="PeRFlow is in this pipeline's weights already"):
        load_perflow(again, accelerator.folder)


def test_a_run_without_its_weights_is_warned_of(accelerator, caplog):
    caplog.set_level(logging.ERROR)
    pipe = flow_pipe()
    load_perflow(pipe, accelerator.folder)
    set_perflow_scale(pipe, 0.0)
    with pytest.warns(UserWarning, match="their strength is 0"):
        draw(pipe)
