"""Options: read, overridden, and refused by name."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from perflow_diffusers import load_miniature
from perflow_training.config import ConfigError, TrainingConfig, config_of, load_config, reference
from perflow_training.objective import windows_of

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
NEEDED = ["pretrained_model_name_or_path=a", "train_captions=b"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_config_is_valid(path):
    needed = NEEDED if path.stem == "reference" else []
    assert isinstance(load_config(path, needed), TrainingConfig)


def test_the_try_out_is_short_compiles_nothing_and_ends_with_a_picture():
    config = load_config(CONFIGS / "tryout.yaml", [])
    assert (config.max_train_steps, config.torch_compile, TrainingConfig().torch_compile) == (200, False, False)
    assert config.max_train_steps % config.validation_steps == 0 and config.validation_prompts
    readme = (CONFIGS.parent / "README.md").read_text()
    assert "--config training/configs/tryout.yaml" in readme and "validation/step-000200.png" in readme


def test_overrides_win_over_the_file_and_keep_their_types():
    config = load_config(
        CONFIGS / "miniature.yaml", ["max_train_steps=7", "learning_rate=1e-3", "solve_guidance=null"]
    )
    assert (config.max_train_steps, config.learning_rate, config.solve_guidance) == (7, 1e-3, None)
    assert config.window_weights == "measured"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("max_train_stepz=3", "Unknown option max_train_stepz. Did you mean max_train_steps"),
        ("max_train_steps", "not of the form name=value"),
        ("max_train_steps=lots", "must be of type int"),
        ("max_train_steps=0", "at least 1"),
        ("learning_rate=fast", "is not a number"),
        ("prediction_type=epsilon", "is not one of ddim_eps, diff_eps, velocity"),
        ("solver=euler", "is not one of ddim"),
        ("caption_dropout=1.5", "must lie in 0..1"),
        ("window_weights=[1, 2]", "must be 4 positive numbers"),
        ("window_weights=some", "is not equal, measured"),
        ("train_captions=''", "none of `train_captions`, `train_data_dir`"),
        ("pretrained_model_name_or_path=''", "`pretrained_model_name_or_path` is not set"),
        ("train_data_dir=pictures", "Examples come from one of them"),
        ("solve_guidance=[9, 5]", "two positive ones from low to high"),
        ("solve_guidance=0", "must be positive"),
        ("rescale_betas_zero_snr=true", "for `prediction_type=velocity` only"),
        ("report_to=mlflow", "mlflow is none of tensorboard, wandb"),
        ("validation_steps=10", "needs `validation_prompts`"),
        ("validation_samplings=[[4]]", "pairs of steps and guidance"),
        ("lora_rank=-1", "must not be negative"),
        ("torch_compile=1", "must be of type bool"),
        ("window_boundaries=[1000, half, 0]", "is not a number"),
        ("window_boundaries=[1000, 500, 700, 0]", "`window_boundaries`: "),
        ("window_boundaries=[1000, 500, 100]", "must end at 0"),
        ("window_boundaries=[]", "`window_boundaries`: "),
        ("validation_prompts=[a dog", "`validation_prompts=[a dog` is not valid YAML"),
        ("lr_scheduler=cosin", "`lr_scheduler='cosin'` is not one of linear, cosine"),
        ("learning_rate=nan", "must be a finite number"),
        ("learning_rate=1:30", "`learning_rate='1:30'` is not a number"),
        ("seed=1:30", "`seed='1:30'` must be of type int"),
        ("seed=yes", "`seed=True` must be of type int"),
        ("min_image_size=0", "`min_image_size=0` must be at least 1"),
        ("huber_c=0", "`huber_c=0.0` must be positive"),
        ("max_grad_norm=-1", "`max_grad_norm=-1.0` must be positive"),
        ("ema_decay=1", "`ema_decay=1.0` must be at least 0 and below 1"),
        ("adam_beta2=1.5", "`adam_beta2=1.5` must be at least 0 and below 1"),
        ("checkpoints_total_limit=-1", "`checkpoints_total_limit=-1` must be at least 1"),
        ("recommended_steps=[]", "`recommended_steps=[]` must be step counts"),
    ],
)
def test_wrong_options_are_refused_by_name(word, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(None, [*NEEDED, word])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("window_boundaries=[500, 250, 0]", "must begin at 1000, the teacher's noisiest timestep"),
        ("num_time_windows=2000", "`num_time_windows=2000`: the teacher has 1000 timesteps"),
    ],
)
def test_windows_that_the_teacher_does_not_have_are_refused(word, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        windows_of(load_config(None, [*NEEDED, word]), 1000)


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    (tmp_path / "my.yaml").write_text("seed: [1\nlora_rank: 4")
    with pytest.raises(ConfigError, match=r"my\.yaml is not valid YAML"):
        load_config(tmp_path / "my.yaml", NEEDED)


def test_shares_of_timesteps_make_one_whole():
    with pytest.raises(ConfigError, match="sum must be at most 1"):
        load_config(None, [*NEEDED, "timestep_starts=0.7", "timestep_grid=0.4"])


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("mixed_precision=no", "no"),
        ("train_captions=yes", "yes"),
        ("output_dir=0123", "0123"),
        ("dataset_revision=1e5", "1e5"),
        ("dataset_revision=2024-01-01", "2024-01-01"),
        ("revision=1234567", "1234567"),
        ("revision=null", None),
        ("revision='null'", "null"),
        ("revision=~", None),
        ("validation_prompts=[no, 5, 2024-01-01, a dog]", ["no", "5", "2024-01-01", "a dog"]),
        ("lora_target_modules=[on]", ["on"]),
        ("dataset_files=[1, no]", ["1", "no"]),
        ("solve_guidance=[5, 9]", [5.0, 9.0]),
        ("learning_rate=5e-4", 5e-4),
        ("center_crop=yes", True),
        ("seed=010", 10),
        ("seed=-3", -3),
        ("recommended_steps=[010, 4]", [10, 4]),
    ],
)
@pytest.mark.parametrize("place", ["command line", "file"])
def test_a_word_is_what_its_option_s_type_says(tmp_path, word, value, place):
    """YAML takes `no` for false, 010 for eight and 2024-01-01 for a day; an option that is a text takes the text."""
    name, _, written = word.partition("=")
    (tmp_path / "my.yaml").write_text(f"{name}: {written}\n")
    needed = [given for given in NEEDED if not given.startswith(name)]
    given = (tmp_path / "my.yaml", needed) if place == "file" else (None, [*needed, word])
    config = load_config(*given)
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)


def test_reference_file_is_what_the_classes_say():
    """configs/reference.yaml: every option, its default, and a meaning; written by --reference."""
    text = (CONFIGS / "reference.yaml").read_text()
    assert text == reference()
    values = yaml.safe_load(text)
    assert config_of(values) == TrainingConfig()
    assert set(values) == {option.name for option in fields(TrainingConfig)}


def test_an_empty_value_is_an_empty_text_or_null():
    config = load_config(None, [*NEEDED, "train_shards=", "revision="])
    assert (config.train_shards, config.revision) == ("", None)


def test_a_config_survives_json():
    config = load_config(CONFIGS / "miniature.yaml", ["solve_guidance=[5, 9]", "lora_rank=4"])
    assert config_of(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")],
)
def test_launch_configs_are_what_accelerate_reads(name, kind):
    launch = load_config_from_file(str(CONFIGS / "accelerate" / f"{name}.yaml"))
    assert (launch.distributed_type, launch.num_processes, launch.mixed_precision) == (kind, 8, "bf16")
    if name == "fsdp2":
        assert launch.fsdp_config["fsdp_version"] == 2
        blocks = set(launch.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(","))
        assert blocks <= {type(module).__name__ for module in load_miniature().unet.modules()}


def test_a_former_name_of_an_option_is_still_read():
    assert load_config(None, [*NEEDED, "guidance_scale=[5, 9]"]).solve_guidance == [5.0, 9.0]
    old = {**load_config(None, NEEDED).to_dict(), "guidance_scale": 7.5}
    del old["solve_guidance"]  # as a checkpoint of before has it
    assert config_of(old).solve_guidance == 7.5
    with pytest.raises(ConfigError, match="`guidance_scale` is the former name of `solve_guidance`, and both"):
        load_config(None, [*NEEDED, "guidance_scale=7.5", "solve_guidance=7.5"])
