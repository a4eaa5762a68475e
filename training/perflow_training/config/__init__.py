"""Every option of a training run: what it is, what it can be, and the files and words that set it."""

from perflow_training.config.checks import CHOICES, trackers
from perflow_training.config.data import SOURCES, DataOptions
from perflow_training.config.files import config_of, load_config, reference
from perflow_training.config.options import FORMS
from perflow_training.config.training import TrainingConfig
from perflow_training.errors import ConfigError, DataError

__all__ = [
    "CHOICES",
    "FORMS",
    "SOURCES",
    "ConfigError",
    "DataError",
    "DataOptions",
    "TrainingConfig",
    "config_of",
    "load_config",
    "reference",
    "trackers",
]
