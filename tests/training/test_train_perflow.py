"""The whole run on the embedded miniature: options in, student and delta out."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

import train_perflow
from perflow_diffusers import PeRFlowScheduler, load_miniature, merge_delta
from perflow_diffusers.demo import perflow_scheduler
from perflow_diffusers.hub import ArtifactError, load_perflow
from perflow_diffusers.weights import open_weights
from perflow_training.config import load_config
from perflow_training.export import header
from perflow_training.run_folder import checkpoints
from perflow_training.trainer import Trainer


def test_student_delta_and_log_come_out(run):
    out = run(
        "max_train_steps=3", "solve_guidance=7.5", "ema_decay=0.0", "lr_warmup_steps=0", "window_weights=measured"
    )
    student = UNet2DConditionModel.from_pretrained(out / "unet").state_dict()
    delta = open_weights(out / "perflow.safetensors")
    assert delta.metadata["prediction_type"] == "ddim_eps"
    assert (delta.metadata["num_time_windows"], json.loads(delta.metadata["recommended_steps"])) == ("4", [4, 8])
    assert json.loads(delta.metadata["solve_guidance"]) == 7.5
    pipe = load_miniature()
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    moved = max(float((student[name] - before[name]).abs().max()) for name in student)
    assert moved > 1e-5
    merge_delta(pipe, out / "perflow.safetensors")
    for name, tensor in pipe.unet.state_dict().items():
        rounding = (student[name] - before[name]).abs() * 2**-11 + 2**-24
        assert ((tensor - student[name]).abs() <= rounding + 1e-7 * student[name].abs()).all(), name
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(len(step["loss"]) == 4 for step in steps)


def test_a_student_that_does_not_move_is_the_teacher(run):
    """With learning_rate 0 the delta is zero, and sampling is the untouched network under PeRFlow's rule."""
    out = run("max_train_steps=2", "learning_rate=0.0")
    student = UNet2DConditionModel.from_pretrained(out / "unet").state_dict()
    assert all(torch.equal(student[name], tensor) for name, tensor in load_miniature().unet.state_dict().items())


def test_training_lowers_the_loss_it_reports(run):
    """More steps on one caption's windows, all kept: the student learns them."""
    out = run("max_train_steps=30", "reuse=1000", "timestep_starts=1.0", "learning_rate=1e-3", "lr_warmup_steps=0",
              "lr_scheduler=constant", "caption_dropout=0.0", "train_batch_size=16", "solve_guidance=7.5")  # fmt: skip
    losses = [sum(filter(None, json.loads(line)["loss"])) for line in (out / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_noised_data_as_starting_points(run, tmp_path):
    parquet = Path(train_perflow.__file__).parent / "miniature" / "data" / "thumbs-test.parquet"
    out = run("max_train_steps=1", f"train_captions={parquet}", "data_starts=1.0")
    assert (
        json.loads((out / "log.jsonl").read_text())["solved"] == 2
    )  # one window a sample (trajectories would have 8)


@pytest.mark.parametrize(
    "wrong",
    [
        "max_train_steps=0",
        "nonsense=1",
        "train_captions=/no/such/file",
        "mixed_precision=fp16",
        "pretrained_model_name_or_path=/no/such/folder",
    ],
)
def test_wrong_options_end_with_a_message_and_code_2(run, wrong, capsys):
    if wrong.endswith("fp16") and torch.cuda.is_available():
        pytest.skip("fp16 can be had here")
    with pytest.raises(SystemExit) as stop:
        run(wrong)
    assert stop.value.code == 2
    assert wrong.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("lora", [False, True], ids=["delta", "lora"])
def test_what_comes_out_knows_its_base(run, lora):
    """The header alone tells a pipeline of another noise schedule, prediction or origin from the teacher's."""
    out = run("max_train_steps=1", *(["lora_rank=4"] if lora else []))
    weights = out / ("lora/pytorch_lora_weights.safetensors" if lora else "perflow.safetensors")
    for other in ({"beta_schedule": "linear"}, {"prediction_type": "v_prediction"}):
        pipe = load_miniature()
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **other)
        with pytest.raises(ArtifactError, match=f"{next(iter(other.values()))}"):
            load_perflow(pipe, weights)
    pipe = load_miniature()
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config)
    with pytest.raises(ArtifactError, match="nothing in common"):
        load_perflow(pipe, weights)
    load_perflow(load_miniature(), weights)


def test_a_schedule_that_training_rescaled_is_asked_of_the_pipeline(words):
    config = load_config(None, words("prediction_type=velocity", "rescale_betas_zero_snr=true"))
    noise = header(config, load_miniature())["noise"]
    assert noise["rescale_betas_zero_snr"] is True and noise["beta_schedule"] == "scaled_linear"


def test_scheduler_of_the_trained_type_comes_from_the_header(run):
    out = run("max_train_steps=1", "prediction_type=velocity", "num_time_windows=2")
    header = open_weights(out / "perflow.safetensors").metadata
    scheduler = PeRFlowScheduler.from_config(
        load_miniature().scheduler.config,
        prediction_type=header["prediction_type"],
        num_time_windows=int(header["num_time_windows"]),
    )
    assert (scheduler.config.perflow_type, scheduler.config.num_time_windows) == ("velocity", 2)


def test_uneven_windows_given_weights_and_mixed_starts(run):
    """The header carries the boundaries, and the scheduler that it describes walks them."""
    parquet = Path(train_perflow.__file__).parent / "miniature" / "data" / "thumbs-test.parquet"
    out = run("max_train_steps=4", "window_boundaries=[1000, 600, 0]", "window_weights=[3, 1]", "reuse=1",
              f"train_captions={parquet}", "data_starts=0.5")  # fmt: skip
    header = open_weights(out / "perflow.safetensors").metadata
    assert (header["num_time_windows"], json.loads(header["window_boundaries"])) == ("2", [1000, 600, 0])
    scheduler = perflow_scheduler(load_miniature().scheduler.config, header)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1000, 800, 600, 300]
    solved = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["solved"]
    assert 16 <= solved < 24  # four batches of four, solved by two (from data) or eight (trajectories) at a time


def test_a_window_without_samples_has_no_loss_and_half_a_log_line_is_left_out_at_resume(run):
    """Four samples of one noised picture: one window is trained on, the others are null and not zero."""
    parquet = Path(train_perflow.__file__).parent / "miniature" / "data" / "thumbs-test.parquet"
    options = ("data_starts=1.0", "solve_batch_size=1", "reuse=4", f"train_captions={parquet}",
               "checkpointing_steps=1", "buffer_size=1")  # fmt: skip
    out = run("max_train_steps=1", *options)
    first = json.loads((out / "log.jsonl").read_text())["loss"]
    assert sorted(value is None for value in first) == [False, True, True, True]
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    run("max_train_steps=2", *options, "resume_from_checkpoint=latest")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] == first


def test_broken_weights_are_not_saved_over_good_ones(run, tmp_path, monkeypatch):
    step = Trainer._step

    def breaks(self, log):
        norm = step(self, log)
        if self.step == 3:
            log.sums[0] += float("nan")
        return norm

    monkeypatch.setattr(Trainer, "_step", breaks)
    with pytest.raises(SystemExit, match="The loss is not finite at step 3, first in window 1 of 4"):
        run("max_train_steps=5", "logging_steps=100", "checkpointing_steps=1", "checkpoints_total_limit=1")
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]


@pytest.mark.parametrize("loss", ["l2", "pseudo_huber"])
def test_logged_losses_are_in_the_units_of_the_untrained_student_s(run, caplog, loss):
    """A student that does not move, on the windows that were looked at: weights of windows change no number."""
    with caplog.at_level("INFO"):
        out = run("max_train_steps=1", "learning_rate=0", "window_weights=[9, 3, 2, 1]", f"loss={loss}",
                  "solve_batch_size=4", "train_batch_size=256", "reuse=100", "timestep_starts=1.0")  # fmt: skip
    said = next(line for line in caplog.text.splitlines() if "untrained student" in line)
    printed = [float(word) for word in said.rsplit(":", 1)[1].split()]
    assert json.loads((out / "log.jsonl").read_text())["loss"] == pytest.approx(printed, rel=0.3)
