"""The guidance that an accelerator is made for is said, and one that is far from it noticed once."""

import copy

import numpy as np
import pytest
from diffusers import AutoPipelineForImage2Image

from perflow_diffusers import load_miniature, load_perflow, set_scheduler, unload_perflow
from perflow_diffusers.hub.guidance import is_far

FAR = "Drawing with guidance_scale="


@pytest.fixture
def pipe():
    pipe = load_miniature()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def notices(records):
    return [text for level, text in records if level == "WARNING" and text.startswith(FAR)]


def test_loading_says_steps_and_guidance_in_one_line(pipe, records):
    artifact = load_perflow(pipe, "miniature")
    said = [text for level, text in records if level == "WARNING"]
    assert len(said) == 1 and (artifact.guidance_scale, artifact.recommended_steps) == (1.0, (4, 8))
    assert "sample with num_inference_steps=4 or 8, guidance_scale=1 " in said[0]


def test_the_pipelines_default_is_noticed_once_a_loading(pipe, records):
    load_perflow(pipe, "miniature")
    for _ in range(2):
        pipe("a person", num_inference_steps=4, output_type="latent")
    assert len(notices(records)) == 1
    assert "guidance_scale=7.5" in notices(records)[0] and "guidance_scale=1." in notices(records)[0]
    unload_perflow(pipe)
    pipe("a person", num_inference_steps=4, output_type="latent")  # the base, at its own guidance
    assert len(notices(records)) == 1
    load_perflow(pipe, "miniature")
    pipe("a person", num_inference_steps=4, output_type="latent")
    assert len(notices(records)) == 2


def test_what_is_recommended_or_near_is_not_noticed(pipe, records):
    pipe("a person", num_inference_steps=2, output_type="latent")  # leaves 7.5 on the pipeline
    load_perflow(pipe, "miniature")
    twin = AutoPipelineForImage2Image.from_pipe(pipe)
    twin.set_progress_bar_config(disable=True)
    image = load_miniature().image_processor.numpy_to_pil(np.zeros((1, 32, 32, 3)))
    for guidance in (0.0, 1.0, 2.0):
        pipe("a person", num_inference_steps=4, guidance_scale=guidance, output_type="latent")
    twin("a person", image=image, strength=1.0, num_inference_steps=4, guidance_scale=1.0, output_type="latent")
    assert not notices(records)
    twin("a person", image=image, strength=1.0, num_inference_steps=4, output_type="latent")
    assert len(notices(records)) == 1  # the pipeline that shares the scheduler, by its own call


def test_copies_and_published_pipelines_notice_too(pipe, records):
    load_perflow(pipe, "miniature")
    copy.deepcopy(pipe)("a person", num_inference_steps=4, output_type="latent")
    assert len(notices(records)) == 1
    other = load_miniature()
    other.set_progress_bar_config(disable=True)
    set_scheduler(other, "miniature")
    other("a person", num_inference_steps=4, output_type="latent")
    assert len(notices(records)) == 2


def test_a_scheduler_called_by_hand_notices_nothing(pipe, records):
    load_perflow(pipe, "miniature")
    pipe.scheduler.set_timesteps(4)
    assert not notices(records)


@pytest.mark.parametrize(
    ("given", "recommended", "far"),
    [
        (7.5, 1, True),
        (2, 1, False),
        (0, 1, False),
        (1, 4.5, True),
        (7.5, 4.5, False),
        (9.5, 4.5, True),
        (0, 2.1, True),
    ],
)
def test_far_is_twice_or_half_and_no_guidance_is_one(given, recommended, far):
    assert is_far(given, recommended) == far
