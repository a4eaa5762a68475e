"""Modular pipelines of diffusers with this package's schedulers: the same levels and results as the classic ones."""

import builders
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from flow_builders import FLOW
from test_flow_pipelines import STEPS, OnGrid, levels, scheduler_for

from perflow_diffusers import PeRFlowScheduler


def modular(blocks, **components):
    pipe = blocks.init_pipeline()
    pipe.update_components(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_flux_of_blocks_sees_the_windows_and_steps_as_stock_euler():
    name = "flux-text-to-image"
    built = FLOW[name](None)
    given = {key: value for key, value in built.arguments.items() if key != "output_type"}
    stock = OnGrid(shift=1.0)
    stock.levels = levels(STEPS)[:-1].tolist()
    told, results = [], []
    built.pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(float(kwargs["timestep"].max())), with_kwargs=True
    )
    for scheduler in (scheduler_for(name), stock):
        pipe = modular(FluxCoreDenoiseStep(), scheduler=scheduler, transformer=built.pipe.transformer)
        assert pipe.scheduler is scheduler
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            results.append(pipe(**given, num_inference_steps=STEPS, generator=generator, output="latents"))
    assert told == pytest.approx(2 * levels(STEPS)[:-1].tolist(), rel=1e-6)
    assert torch.equal(*results)


def test_sdxl_of_blocks_draws_what_the_classic_pipeline_draws():
    parts = builders.xl()
    parts["scheduler"] = PeRFlowScheduler.from_config(parts["scheduler"].config, perflow_type="ddim_eps")
    call = {"prompt": "a red hat", "negative_prompt": "grey", "num_inference_steps": 5, "height": 32, "width": 32}
    classic = StableDiffusionXLPipeline(**parts)
    classic.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    wanted = classic(**call, guidance_scale=7.5, generator=generator, output_type="latent").images

    told = []
    hook = parts["unet"].register_forward_pre_hook(lambda _, args: told.append(int(args[1].max())))
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    pipe = modular(StableDiffusionXLAutoBlocks(), **{name: parts[name] for name in names})
    latents = pipe(**call, generator=torch.Generator().manual_seed(3), output="latents")
    hook.remove()
    assert sorted(set(told), reverse=True) == [1000, 875, 750, 500, 250]
    # Guidance of 7.5 magnifies the rounding of two calls of one picture against one call of two.
    torch.testing.assert_close(latents, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
