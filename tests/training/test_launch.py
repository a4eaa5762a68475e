"""What a launch file says and what the options say."""

import argparse
import logging
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

import train_perflow
from perflow_training.config import ConfigError, TrainingConfig
from perflow_training.launch import make_accelerator, with_launcher

LAUNCH = Path(train_perflow.__file__).parent / "configs" / "accelerate"


def said_by(tmp_path, text, *words) -> dict[str, str]:
    """The environment that `accelerate launch` makes of a launch file."""
    path = tmp_path / "launch.yaml"
    path.write_text(text)
    args: argparse.Namespace = launch_command_parser().parse_args(["--config_file", str(path), *words, "script.py"])
    return prepare_multi_gpu_env(_validate_launch_command(args)[0])


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("option", "words", "taken", "warned"),
    [
        (None, (), "bf16", False),
        (None, ("--mixed_precision", "fp16"), "fp16", False),
        (None, ("--mixed_precision", "no"), "no", False),
        ("bf16", (), "bf16", False),
        ("no", (), "no", True),
        ("bf16", ("--mixed_precision", "no"), "bf16", False),  # what accelerate says where it is told nothing
    ],
)
def test_precision_is_the_launch_file_s_unless_the_options_say_another(
    tmp_path, caplog, name, option, words, taken, warned
):
    environment = said_by(tmp_path, (LAUNCH / f"{name}.yaml").read_text(), *words)
    with caplog.at_level(logging.WARNING):
        assert with_launcher(TrainingConfig(mixed_precision=option), environment).mixed_precision == taken
    assert bool(caplog.records) == warned


def test_without_a_launcher_nothing_is_mixed():
    assert with_launcher(TrainingConfig(), {}).mixed_precision == "no"


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({"fsdp_version: 2": "fsdp_version: 1"}, (), "Set `fsdp_version: 2`"),
        ({"distributed_type: FSDP": "distributed_type: MEGATRON_LM"}, (), "Megatron-LM, which .*fsdp2.yaml"),
        ({}, ("--dynamo_backend", "eager"), "`dynamo_backend: eager`.*torch_compile=true"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_way_out(tmp_path, change, words, message):
    text = (LAUNCH / "fsdp2.yaml").read_text()
    for old, new in change.items():
        text = text.replace(old, new)
    environment = said_by(tmp_path, text, *words)
    with pytest.raises(ConfigError, match=message):
        with_launcher(TrainingConfig(), environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which .*fsdp2.yaml"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "`mixed_precision: fp8`, which is not one of no, fp16, bf16"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "splits samples .*TP"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "Set `gradient_accumulation_steps=4`"),
    ],
)
def test_other_words_of_a_launcher_are_not_overruled_in_silence(environment, message):
    with pytest.raises(ConfigError, match=message):
        with_launcher(TrainingConfig(), environment)


def test_a_launcher_that_compiles_has_teacher_and_student_compiled(tmp_path, monkeypatch):
    """And accelerate does not compile the student once more."""
    environment = said_by(tmp_path, (LAUNCH / "ddp.yaml").read_text(), "--dynamo_backend", "inductor")
    config = with_launcher(TrainingConfig(), environment)
    assert config.torch_compile
    assert not with_launcher(TrainingConfig(), said_by(tmp_path, (LAUNCH / "ddp.yaml").read_text())).torch_compile
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert make_accelerator(with_launcher(config)).state.dynamo_plugin.backend.value == "NO"


def test_steps_are_accumulated_as_the_options_say(monkeypatch):
    """Accelerate lets a variable of the environment replace the number that it is given."""
    config = with_launcher(TrainingConfig(gradient_accumulation_steps=2, mixed_precision="no"))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    assert make_accelerator(config).gradient_accumulation_steps == 2
