"""What people do with a pipeline besides calling it, with a PeRFlowScheduler in it; listed in docs/pipelines.md."""

import copy
from itertools import pairwise

import builders
import diffusers
import pytest
import torch
from cases import CASES, GUIDANCE, WHOLE, Case, image, motion
from diffusers.models.attention_processor import AttnProcessor
from replay import BOUNDARIES, close, guided, on_the_chord, recorded, replayed, step_numbers

from perflow_diffusers import PeRFlowScheduler

BY_NAME = {case.name: case for case in CASES}
SD = BY_NAME["sd15-text-to-image"]
XL = BY_NAME["sdxl-text-to-image"]
IMG2IMG = BY_NAME["sd15-img2img"]
FAMILIES = pytest.mark.parametrize("case", [SD, XL], ids=["sd15", "sdxl"])
WITH_CALLBACKS = pytest.mark.parametrize(
    "case",
    [SD, XL, IMG2IMG, BY_NAME["sd15-animatediff"], BY_NAME["sdxl-inpaint"]],
    ids=lambda case: case.name,
)


def guide(chunks):
    return guided(chunks, GUIDANCE)


def by_hand(seen, points, case=SD):
    return replayed(seen, case.perflow_type, points, guide, 2, case.kept())


@WITH_CALLBACKS
def test_a_callback_sees_every_step(case, built, drawn):
    pipe, _ = built(case)
    seen = []

    def watch(pipe, i, t, tensors):
        seen.append((i, int(t), pipe.scheduler.step_index, tensors["latents"].clone()))
        return tensors

    images = case.call(pipe, 8, callback_on_step_end=watch)
    timesteps = case.timesteps(8)
    done = 8 - len(timesteps)
    assert [s[:3] for s in seen] == [(i, t, done + i + 1) for i, t in enumerate(timesteps)]
    assert torch.equal(seen[-1][3], images) and torch.equal(images, drawn(case, 8))


@WITH_CALLBACKS
def test_a_callback_may_replace_the_latents(case, built, drawn):
    pipe, _ = built(case)
    other = []
    case.call(pipe, 4, prompt=["a ninja"] * 2, callback_on_step_end=lambda p, i, t, k: other.append(k["latents"]) or k)

    def swap(pipe, i, t, tensors):
        return {"latents": other[-1]} if i == len(other) - 1 else tensors

    assert torch.equal(case.call(pipe, 4, callback_on_step_end=swap), other[-1])
    assert not torch.equal(other[-1], drawn(case, 4))


@WITH_CALLBACKS
def test_interrupting_stops_the_network_and_leaves_the_next_run_alone(case, built, drawn):
    pipe, _ = built(case)
    states = []

    def stop(pipe, i, t, tensors):
        states.append(tensors["latents"])
        pipe._interrupt = i == 1
        return tensors

    with recorded(pipe.unet) as seen:
        images = case.call(pipe, 8, callback_on_step_end=stop)
    assert seen.timesteps == case.timesteps(8)[:2] and pipe.scheduler.step_index == 8 - len(case.timesteps(8)) + 2
    assert torch.equal(images, states[-1])
    assert torch.equal(case.call(pipe, 8, scheduler=pipe.scheduler), drawn(case, 8))


@FAMILIES
def test_explicit_timesteps_are_followed(case, built):
    pipe, _ = built(case)
    with recorded(pipe.unet) as seen:
        images = case.call(pipe, None, timesteps=[1000, 600, 250])
    assert seen.timesteps == [1000, 600, 250]
    # The step from 600 to 250 crosses no window but two of them, which it follows as one.
    assert close(images, by_hand(seen, [1000, 600, 250, 0]))


@FAMILIES
def test_sigmas_are_refused(case, built):
    with pytest.raises(ValueError, match=r"PeRFlowScheduler.*does not support custom sigmas"):
        case.call(built(case)[0], None, sigmas=[1.0, 0.5])


@FAMILIES
def test_eta_has_no_effect_because_the_sampler_is_deterministic(case, built, drawn):
    assert torch.equal(case.call(built(case)[0], 4, eta=1.0), drawn(case, 4))


@FAMILIES
def test_guidance_rescale_acts_on_the_guided_output(case, built, drawn):
    pipe, _ = built(case)
    with recorded(pipe.unet) as seen:
        images = case.call(pipe, 4, guidance_rescale=0.7)

    def rescaled(chunks):
        out, told = guided(chunks, GUIDANCE), chunks[1]
        spread = [x.flatten(1).std(1).reshape(-1, 1, 1, 1) for x in (told, out)]
        return 0.7 * out * spread[0] / spread[1] + 0.3 * out

    assert close(images, replayed(seen, "ddim_eps", [*WHOLE[4], 0], rescaled, 2, case.kept()))
    assert not close(images, drawn(case, 4), 1e-3)


@FAMILIES
def test_without_guidance_the_network_sees_each_image_once(case, built):
    pipe, _ = built(case)
    with recorded(pipe.unet) as seen:
        images = case.call(pipe, 4, guidance_scale=1.0)
    assert [len(z) for z in seen.inputs] == [2] * 4
    expected = replayed(seen, "ddim_eps", [*WHOLE[4], 0], lambda chunks: chunks[0], 2, case.kept())
    assert close(images, expected)


@pytest.mark.parametrize(("name", "n"), [("sd15-img2img", 4), ("sdxl-img2img", 5)])
def test_full_strength_starts_at_the_first_timestep(name, n, built):
    case = BY_NAME[name]
    pipe, _ = built(case)
    with recorded(pipe.unet) as seen:
        images = case.call(pipe, n, strength=1.0)
    assert seen.timesteps == WHOLE[n]
    x0, noise, _ = seen.noised[0]
    assert close(seen.inputs[0][:2], on_the_chord(x0, noise, *WHOLE[n][:2]))
    assert close(images, by_hand(seen, [*WHOLE[n], 0]))


def test_image_to_image_may_start_inside_a_window(built):
    pipe, _ = built(IMG2IMG)
    with recorded(pipe.unet) as seen:
        images = IMG2IMG.call(pipe, 8, strength=0.4)
    assert seen.timesteps == [375, 250, 125] and 375 not in BOUNDARIES
    x0, noise, _ = seen.noised[0]
    start = on_the_chord(x0, noise, 375, 250)
    assert close(seen.inputs[0][:2], start)
    # The place that the published scheduler starts from instead is elsewhere.
    stock = builders.stock_scheduler()
    assert not close(stock.add_noise(x0, noise, torch.tensor([374])), start, 1e-3)
    assert close(images, by_hand(seen, [375, 250, 125, 0]))


def test_default_strength_of_sdxl_inpainting_loses_a_step(built):
    case = BY_NAME["sdxl-inpaint"]
    pipe, _ = built(case)
    with recorded(pipe.unet) as seen:
        case.call(pipe, 4, strength=0.9999)
        case.call(pipe, 4, strength=1.0)
    assert seen.timesteps == [750, 500, 250, 1000, 750, 500, 250]


def test_several_images_a_prompt_equal_single_ones(built):
    pipe, _ = built(IMG2IMG)
    seeds = [torch.Generator().manual_seed(i) for i in (5, 6)]
    together = IMG2IMG.call(pipe, 4, rows=[0], num_images_per_prompt=2, generator=seeds)
    assert together.shape == (2, *IMG2IMG.latent_shape)
    for i, seed in enumerate((5, 6)):
        alone = IMG2IMG.call(pipe, 4, rows=[0], generator=torch.Generator().manual_seed(seed))
        assert close(alone, together[i : i + 1], 1e-4)


@pytest.mark.parametrize("family", [SD, XL], ids=["sd15", "sdxl"])
def test_auto_pipelines_carry_the_scheduler_over(family, built, drawn):
    pipe, _ = built(family)
    pipe.scheduler = family.scheduler(pipe)
    inpaint = diffusers.AutoPipelineForInpainting.from_pipe(pipe)
    over = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    back = diffusers.AutoPipelineForText2Image.from_pipe(over)
    assert type(over).__name__ == family.pipeline.replace("Pipeline", "Img2ImgPipeline")
    assert over.scheduler is inpaint.scheduler is back.scheduler is pipe.scheduler
    over.set_progress_bar_config(disable=True)
    back.set_progress_bar_config(disable=True)
    with recorded(over.unet) as seen:
        family.call(over, 4, scheduler=pipe.scheduler, strength=0.6, **image(range(2), 0))
    assert seen.timesteps == [500, 250]
    assert torch.equal(family.call(back, 4, scheduler=pipe.scheduler), drawn(family, 4))


@pytest.mark.parametrize("name", ["sd15-text-to-image", "sd15-text-to-image-diff-eps", "sd21-velocity"])
def test_going_back_to_another_scheduler_gives_its_own_pictures(name, built):
    case = BY_NAME[name]
    pipe, _ = built(case)
    stock = builders.stock_scheduler(case.base_type)
    for cls in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler):
        expected = case.call(pipe, 4, scheduler=cls.from_config(stock.config))
        pipe.scheduler = PeRFlowScheduler.from_config(stock.config, perflow_type=case.perflow_type)
        assert torch.equal(case.call(pipe, 4, scheduler=cls.from_config(pipe.scheduler.config)), expected)


class EditedAttention(AttnProcessor):
    """Prompt-to-prompt in small: keeps the maps of the cross attention and may weigh a word of them anew."""

    def __init__(self, maps, weight=1.0):
        super().__init__()
        self.maps, self.weight = maps, weight

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **options):
        if encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, **options)
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        scores = attn.get_attention_scores(query, key)
        self.maps.append(scores.clone())
        scores[..., 2] *= self.weight
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(scores @ value)))


@FAMILIES
def test_custom_attention_processors_see_every_step(case, built, drawn):
    pipe, _ = built(case)
    original = pipe.unet.attn_processors
    layers = sum("attn2" in name for name in original)
    results = {}
    try:
        for weight in (1.0, 4.0):
            maps = []
            pipe.unet.set_attn_processor(EditedAttention(maps, weight))
            results[weight] = case.call(pipe, 5)
            assert len(maps) == 5 * layers
            assert all(close(m.sum(-1), torch.ones(())) for m in maps)
    finally:
        pipe.unet.set_attn_processor(original)
    assert close(results[1.0], drawn(case, 5), 1e-4)
    assert not close(results[4.0], drawn(case, 5), 1e-3)


def copied(components):
    """Components whose networks may be changed."""
    return {k: copy.deepcopy(v) if isinstance(v, torch.nn.Module) else v for k, v in components.items()}


@pytest.mark.parametrize("case", [SD, XL, IMG2IMG, BY_NAME["sd15-controlnet"]], ids=lambda case: case.name)
def test_model_offloading_moves_networks_and_changes_no_bit(case, drawn):
    """Hooks are set on the CPU: this proves the order of the networks' moves, not the memory that they save."""
    pipe = case.cls(**copied(case.components()))
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_model_cpu_offload(device="cpu")
    assert {hook.model for hook in pipe._all_hooks} >= {pipe.unet, pipe.vae, pipe.text_encoder}
    for _ in range(2):
        assert torch.equal(case.call(pipe, 4), drawn(case, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_model_offloading_on_a_gpu_gives_the_pictures_of_the_cpu(drawn):
    pipe = SD.cls(**copied(SD.components()))
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_model_cpu_offload()
    assert close(SD.call(pipe, 4).cpu(), drawn(SD, 4), 1e-2)


@pytest.mark.parametrize("case", [SD, IMG2IMG, XL, BY_NAME["sdxl-inpaint"]], ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore::UserWarning:diffusers")
def test_half_precision_stays_half_and_near_the_full_one(case, drawn):
    pipe = case.cls(**copied(case.components())).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    with recorded(pipe.unet) as seen:
        images = case.call(pipe, 4)
    assert images.dtype == torch.bfloat16
    assert {z.dtype for z in seen.inputs} == {torch.bfloat16}
    assert close(images, drawn(case, 4), 0.05)


def test_panoramas_step_every_view_on_its_own(monkeypatch):
    """MultiDiffusion keeps a copy of the scheduler's state for every view."""
    cls = diffusers.StableDiffusionPanoramaPipeline
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    case = Case("panorama", "StableDiffusionPanoramaPipeline", lambda: builders.sd(vae=vae))
    views = cls.get_views
    monkeypatch.setattr(
        cls, "get_views", lambda self, h, w, circular_padding: views(self, h, w, 4, 2, circular_padding)
    )
    pipe = cls(**case.components())
    pipe.set_progress_bar_config(disable=True)
    with recorded(pipe.unet) as seen:
        images = case.call(pipe, 5, rows=[0], height=32, width=64)
    assert seen.timesteps == [t for t in WHOLE[5] for _ in range(3)]
    z = torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(20)).double()
    outputs = iter(seen.outputs)
    points = [*WHOLE[5], 0]
    for step in pairwise(points):
        a, b = step_numbers("ddim_eps", *step)
        total, count = torch.zeros_like(z), torch.zeros_like(z)
        for left in (0, 2, 4):
            out = guide(next(outputs).double().split(1))
            total[..., left : left + 4] += a * z[..., left : left + 4] + b * out
            count[..., left : left + 4] += 1
        z = total / count
    assert close(images, z)


def test_free_init_repeats_the_whole_run():
    case = BY_NAME["sd15-animatediff"]
    pipe = diffusers.AnimateDiffPipeline(**motion())
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_free_init(num_iters=2)
    with recorded(pipe.unet) as seen:
        case.call(pipe, 4, rows=[0], generator=torch.Generator().manual_seed(0))
    assert seen.timesteps == WHOLE[4] * 2
    # Between the runs FreeInit noises the result at timestep 999, which lies on the first window's line.
    assert [t for _, _, t in seen.noised] == [999.0]
