"""An accelerator that acts already, in whatever form: it is not loaded on top of itself, and a merge says so."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig

import perflow_diffusers as pf
from perflow_diffusers.miniature import miniature_folder
from refusals import bits, refused

LORA = miniature_folder() / "lora" / "pytorch_lora_weights.safetensors"


@pytest.fixture
def pipe():
    pipe = pf.load_miniature()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_delta_that_was_merged_by_hand_is_not_loaded_on_top(pipe):
    for source in ("miniature", "miniature-lora"):
        with pf.merge_delta(pipe, source):
            for other in ("miniature", "miniature-lora"):
                words = ("already", "apply it twice", "`unmerge_delta(pipe)`", f"set_scheduler(pipe, '{other}')")
                refused(lambda other=other: pf.load_perflow(pipe, other), *words, pipe=pipe)
    pf.merge_delta(pipe, "miniature")
    pf.set_scheduler(pipe, "miniature")  # as the sentence says
    assert isinstance(pipe.scheduler, pf.PeRFlowScheduler)
    pf.unload_perflow(pipe)
    pf.unmerge_delta(pipe)
    pf.load_perflow(pipe, "miniature")


def test_one_that_is_switched_off_or_taken_out_is_no_hindrance(pipe):
    handle = pf.merge_delta(pipe, "miniature")
    handle.set_scale(0)
    pf.load_perflow(pipe, "miniature")
    pf.unload_perflow(pipe)
    handle.undo()
    pf.load_perflow(pipe, "miniature")


def test_weights_that_were_saved_or_fused_with_it_are_known_by_their_numbers(pipe, tmp_path):
    with pf.merge_delta(pipe, "miniature"):
        pipe.unet.save_pretrained(tmp_path)
    accelerated = pf.load_miniature()
    accelerated.unet = UNet2DConditionModel.from_pretrained(tmp_path)
    refused(lambda: pf.load_perflow(accelerated, "miniature"), "is in this UNet's weights already", pipe=accelerated)
    with pytest.warns(UserWarning, match="counts twice"):
        pf.load_perflow(accelerated, "miniature", strict=False)
    pipe.load_lora_weights(LORA)
    pipe.fuse_lora()
    refused(lambda: pf.load_perflow(pipe, "miniature"), "already", pipe=pipe)


def test_an_attached_one_is_not_loaded_on_top_and_one_that_is_switched_off_may_be(pipe):
    pipe.load_lora_weights(LORA, adapter_name="fast")
    for source in ("miniature", "miniature-lora"):
        refused(
            lambda source=source: pf.load_perflow(pipe, source),
            "is attached to this UNet as a LoRA already",
            "`pipe.unload_lora_weights()`",
            pipe=pipe,
        )
    pipe.set_adapters("fast", 0.2)  # less than half of it
    pf.load_perflow(pipe, "miniature")
    pf.unload_perflow(pipe)
    pipe.set_adapters("fast", 1.0)
    pipe.disable_lora()
    pf.load_perflow(pipe, "miniature")
    pf.unload_perflow(pipe)
    pipe.unload_lora_weights()
    pf.load_perflow(pipe, "miniature")


def test_another_lora_that_acts_is_no_hindrance(pipe):
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")
    pf.load_perflow(pipe, "miniature")


@pytest.mark.parametrize("how", ["saved", "fused", "attached"])
@pytest.mark.parametrize("source", ["miniature", "miniature-lora"])
def test_a_merge_beside_itself_says_so(how, source, pipe, tmp_path):
    if how == "saved":
        with pf.merge_delta(pipe, "miniature"):
            pipe.unet.save_pretrained(tmp_path)
        pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path)
    else:
        pipe.load_lora_weights(LORA)
        if how == "fused":
            pipe.fuse_lora()
    before = bits(pipe)
    with pytest.warns(UserWarning, match="acts in this model already.*counts twice.*`set_scheduler") as said:
        handle = pf.merge_delta(pipe, source)
    assert len(said) == 1 and said[0].filename == __file__
    handle.undo()
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.unet.state_dict().items())


def test_fine_tunes_do_not_look_accelerated(pipe):
    for tuned in (pf.load_miniature("disco"), pipe):
        pf.load_perflow(tuned, "miniature")
        pf.unload_perflow(tuned)
    generator = torch.Generator().manual_seed(0)
    for size in (0.05, 0.3):
        noisy = pf.load_miniature()
        for weight in noisy.unet.parameters():
            weight.data += size * weight.data.std() * torch.randn(weight.shape, generator=generator)
        pf.load_perflow(noisy, "miniature")


def test_what_is_loaded_is_not_loaded_again(pipe):
    pf.load_perflow(pipe, "miniature")
    for source in ("miniature", "miniature-lora"):
        words = ("miniature is loaded", "`unload_perflow(pipe)`", "`set_perflow_scale(pipe")
        refused(lambda source=source: pf.load_perflow(pipe, source), *words, pipe=pipe)
    with pytest.raises(UserWarning, match=r"counts twice.*`set_perflow_scale` if `load_perflow` put it in"):
        pf.merge_delta(pipe, "miniature")


def test_an_exported_pipeline_is_given_its_scheduler_and_no_accelerator(pipe, tmp_path):
    pf.load_perflow(pipe, "miniature")
    pf.export_pipeline(pipe, tmp_path / "exported")
    exported = StableDiffusionPipeline.from_pretrained(tmp_path / "exported")
    refused(lambda: pf.load_perflow(exported, "miniature"), "already", "`set_scheduler(pipe)`", pipe=exported)
    exported.register_to_config(_name_or_path="someone/whose-files-cannot-be-seen")
    refused(lambda: pf.load_perflow(exported, "miniature"), "already", pipe=exported)
    exported.register_to_config(_name_or_path=str(tmp_path / "exported"))
    pf.set_scheduler(exported)
    words = ("own weights", "`set_scheduler` gave it", "nothing to load")
    refused(lambda: pf.load_perflow(exported, "miniature"), *words, pipe=exported)
    pf.unload_perflow(exported)
    for target in (pf.load_miniature(), exported):
        said = "whole pipeline"
        refused(lambda target=target: pf.load_perflow(target, tmp_path / "exported"), said, "`set_scheduler(pipe)`")
