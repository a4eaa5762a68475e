"""Flow-matching bases of five families through the same command, none of which it knows."""

import json
from itertools import pairwise

import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from flow_teachers import ARGUMENTS, save_teacher
from run_log import logged
from safetensors.torch import load_file

from perflow_diffusers import FlowMatchPeRFlowScheduler, load_miniature, load_perflow, merge_delta, unload_perflow
from perflow_diffusers.flow import SigmaWindows
from perflow_diffusers.weights import open_weights
from perflow_training.config import ConfigError, TrainingConfig
from perflow_training.recipe import block_layers, completed, windowed
from perflow_training.teacher.load import load_pipeline
from perflow_training.teacher.observed import watch

STEPS = (
    "max_train_steps=50", "solver_steps=2", "solve_batch_size=4", "train_batch_size=8", "buffer_size=64", "reuse=8",
    "learning_rate=3e-3", "lr_warmup_steps=5", "logging_steps=5", "ema_decay=0.9",
)  # fmt: skip


def mean_loss(lines):
    return sum(sum(filter(None, line["loss"])) / 4 for line in lines) / len(lines)


@pytest.mark.parametrize(
    ("name", "rank", "rate"),
    [("sd3", 0, 3e-3), ("flux", 8, 3e-3), ("qwen", 8, 3e-3), ("z", 0, 1e-3), ("wan", 0, 3e-3)],
)
def test_fifty_steps_on_a_tiny_pipeline_are_merged_back_and_sampled(run, tmp_path, name, rank, rate):
    folder = save_teacher(name, tmp_path / "teacher")
    out = run(
        f"pretrained_model_name_or_path={folder}", f"pipeline_arguments={ARGUMENTS[name]}", "solve_guidance=3",
        f"lora_rank={rank}", "gradient_checkpointing=true", *STEPS, f"learning_rate={rate}",
    )  # fmt: skip
    lines = logged(out)
    assert mean_loss(lines[-3:]) < 0.9 * mean_loss(lines[:2])
    pipe = load_pipeline(TrainingConfig(pretrained_model_name_or_path=str(folder)))
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    file = out / "lora" / "pytorch_lora_weights.safetensors" if rank else out / "perflow.safetensors"
    said = open_weights(file).metadata
    boundaries, shift = json.loads(said["window_boundaries"]), float(said["window_shift"])
    assert said["prediction_type"] == "velocity"
    # guidance switched off, as each pipeline has it; that which a network is told stays as it was in training
    assert float(said["recommended_guidance_scale"]) == {"z": 0.0, "flux": 3.0}.get(name, 1.0)
    if rank:
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name="perflow")
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    else:
        merge_delta(pipe, file)
        student = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
        for key, value in pipe.transformer.state_dict().items():  # fp16 of the difference
            torch.testing.assert_close(value, student[key], rtol=0, atol=1e-4)
    changed = [key for key, value in pipe.transformer.state_dict().items() if not torch.equal(value, before[key])]
    assert changed
    # sampled as a user would: one Euler step of the merged network a window
    observed = watch(pipe, arguments(name), scale=None)
    noise = torch.randn(8, *observed.shape, generator=torch.Generator().manual_seed(9))
    captions = ["a dog", "a green hat"] * 4
    cond = observed.conditions(captions, 3.0 if name == "flux" else None)
    pipe.scheduler = FlowMatchPeRFlowScheduler.from_config(
        pipe.scheduler.config, window_boundaries=boundaries, window_shift=shift
    )
    given = {**arguments(name), **observed.guided.one_call(3.0 if name == "flux" else None), "output_type": "latent"}
    with torch.no_grad():
        four = pipe(captions, latents=noise, num_inference_steps=4, **given)[0]
    student, z = observed.backbone(), noise
    for start, end in pairwise(boundaries):
        with torch.no_grad():
            z = z + (end - start) * student(z, torch.full((8,), start, dtype=torch.float64), cond)
    torch.testing.assert_close(four, z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "rank"), [("flux", 2), ("qwen", 2), ("z", 2), ("wan", 2), ("wan", 0)])
def test_what_a_run_publishes_loads_into_its_pipeline_and_comes_out_again(run, tmp_path, name, rank):
    """Drawn as with diffusers' own LoRA loader, or with the merged weights; afterwards the base is what it was."""
    folder = save_teacher(name, tmp_path / "teacher")
    out = run(
        f"pretrained_model_name_or_path={folder}", f"pipeline_arguments={ARGUMENTS[name]}", "solve_guidance=3",
        f"lora_rank={rank}", *STEPS, "max_train_steps=2",
        "product=[student, lora, artifact]" if rank else "product=[student, artifact]",
    )  # fmt: skip

    def drawn(pipe):
        given = {**arguments(name), "output_type": "latent", "num_inference_steps": 4}
        given |= {"true_cfg_scale" if name == "qwen" else "guidance_scale": artifact.guidance_scale}
        with torch.no_grad():
            return pipe("a dog", generator=torch.Generator().manual_seed(0), **given)[0]

    pipe, plain = (load_pipeline(TrainingConfig(pretrained_model_name_or_path=str(folder))) for _ in range(2))
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    artifact = load_perflow(pipe, out / "artifact")
    plain.scheduler = FlowMatchPeRFlowScheduler.from_config(pipe.scheduler.config)
    plain.transformer.load_state_dict(load_file(out / "transformer" / "diffusion_pytorch_model.safetensors"))
    torch.testing.assert_close(drawn(pipe), drawn(plain), rtol=1e-2, atol=1e-3)  # fp16 of factors or difference
    unload_perflow(pipe)
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert all(torch.equal(value, before[key]) for key, value in pipe.transformer.state_dict().items())


def arguments(name):
    return yaml.safe_load(ARGUMENTS[name])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prediction_type": "ddim_eps"}, "whose network predicts the velocity"),
        ({"data_starts": 0.5}, "`data_starts=0.5`, and the base is one of flow matching"),
        ({"discrete_timesteps": 20}, "`discrete_timesteps=20`"),
        ({"window_weights": "measured"}, "`window_weights=measured` needs a teacher that goes on from the middle"),
    ],
)
def test_options_of_a_diffusion_are_refused_for_a_flow(options, words):
    with pytest.raises(ConfigError, match=words):
        completed(TrainingConfig(**options), load_miniature("flow"))


@pytest.mark.parametrize("options", [{"window_shift": 2.0}, {"window_boundaries": [1.0, 0.5, 0.0]}])
def test_options_of_a_flow_are_refused_for_a_diffusion(options):
    with pytest.raises(ConfigError, match="are for flow-matching bases, and StableDiffusionPipeline's is a diffusion"):
        completed(TrainingConfig(**options), load_miniature())


def test_windows_and_layers_are_spelt_out():
    """Equal windows in the pipeline's shifted time, sigma = 2 u / (1 + u); LoRAs on attention and feed-forward."""
    pipe = load_miniature("flow")
    config, windows = windowed(completed(TrainingConfig(lora_rank=2, num_time_windows=2), pipe), watch(pipe))
    assert windows.boundaries == (1.0, 2 / 3, 0.0) and config.window_shift == 2.0
    assert config.lora_target_modules == block_layers(pipe.transformer)
    assert {"attn.to_q", "attn.add_k_proj", "attn.to_out.0", "ff.net.0.proj", "ff_context.net.2"} <= {
        *config.lora_target_modules
    }
    assert not [name for name in config.lora_target_modules if "norm" in name]


def test_windows_that_do_not_begin_at_noise_are_refused():
    pipe = load_miniature("flow")
    with pytest.raises(ConfigError, match="must begin at 1: sampling starts there"):
        windowed(completed(TrainingConfig(window_boundaries=[0.9, 0.0]), pipe), watch(pipe))


def test_a_run_that_goes_on_ends_where_one_in_one_piece_ends(run, tmp_path):
    """Conditions, windows and their draws come out of the checkpoint as they were."""
    folder = save_teacher("qwen", tmp_path / "teacher")
    words = [
        f"pretrained_model_name_or_path={folder}", f"pipeline_arguments={ARGUMENTS['qwen']}", "lora_rank=2", *STEPS,
        "max_train_steps=6", "buffer_size=16", "lr_scheduler=constant",
    ]  # fmt: skip
    whole = load_file(run(*words, f"output_dir={tmp_path / 'whole'}") and tmp_path / "whole" / "lora" / LORA)
    run(*words, f"output_dir={tmp_path / 'parts'}", "max_train_steps=3")
    run(*words, f"output_dir={tmp_path / 'parts'}", "resume_from_checkpoint=latest")
    parts = load_file(tmp_path / "parts" / "lora" / LORA)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_a_base_that_is_not_guided_is_said_to_be_perhaps_distilled(run, tmp_path, caplog):
    """As one whose pipeline, wherever it is asked, says that it does without."""
    load_miniature("flow").save_pretrained(tmp_path / "teacher")
    words = (f"pretrained_model_name_or_path={tmp_path / 'teacher'}", *STEPS, "max_train_steps=1")
    run(*words)
    assert "distilled" not in caplog.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusion3Pipeline, "do_classifier_free_guidance", False)
        run(*words, f"output_dir={tmp_path / 'other'}")
    assert "StableDiffusion3Pipeline is neither guided nor told a guidance scale" in caplog.text


def test_the_artefact_of_a_run_makes_a_pipeline_of_few_steps(run, tmp_path):
    """Weights as merged by hand, scheduler and guidance as trained."""
    load_miniature("flow").save_pretrained(tmp_path / "teacher")
    out = run(
        f"pretrained_model_name_or_path={tmp_path / 'teacher'}", *STEPS, "max_train_steps=3", "solve_guidance=5",
        "product=[student, delta, artifact]",
    )  # fmt: skip
    pipe = load_miniature("flow")
    artifact = load_perflow(pipe, out / "artifact")
    assert (artifact.steps, artifact.guidance_scale) == (4, 1.0)
    assert pipe.scheduler.windows == SigmaWindows.uniform(4, 2.0)
    student = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    for key, value in pipe.transformer.state_dict().items():  # fp16 of the difference
        torch.testing.assert_close(value, student[key], rtol=0, atol=1e-4)


LORA = "pytorch_lora_weights.safetensors"
