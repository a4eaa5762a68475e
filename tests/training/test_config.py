"""Options: read, overridden, and refused by name."""

from pathlib import Path

import pytest

from perflow_training.config import ConfigError, TrainingConfig, load_config

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
NEEDED = ["pretrained_model_name_or_path=a", "train_captions=b"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_config_is_valid(path):
    assert isinstance(load_config(path), TrainingConfig)


def test_overrides_win_over_the_file_and_keep_their_types():
    config = load_config(
        CONFIGS / "miniature.yaml", ["max_train_steps=7", "learning_rate=1e-3", "guidance_scale=null"]
    )
    assert (config.max_train_steps, config.learning_rate, config.guidance_scale) == (7, 1e-3, None)
    assert config.window_weights == "measured"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("max_train_stepz=3", "Unknown option max_train_stepz"),
        ("max_train_steps", "not of the form name=value"),
        ("max_train_steps=lots", "must be of type int"),
        ("max_train_steps=0", "at least 1"),
        ("learning_rate=fast", "is not a number"),
        ("prediction_type=epsilon", "is not one of ddim_eps, diff_eps, velocity"),
        ("solver=euler", "is not one of ddim"),
        ("caption_dropout=1.5", "must lie in 0..1"),
        ("window_weights=[1, 2]", "must be 4 positive numbers"),
        ("window_weights=some", "is not equal, measured"),
        ("data_starts=0.5", "needs pictures"),
        ("train_captions=''", "`train_captions` is not set"),
    ],
)
def test_wrong_options_are_refused_by_name(word, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        load_config(None, [*NEEDED, word])


def test_shares_of_timesteps_make_one_whole():
    with pytest.raises(ConfigError, match="sum must be at most 1"):
        load_config(None, [*NEEDED, "timestep_starts=0.7", "timestep_grid=0.4"])
