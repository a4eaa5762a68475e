"""The options of a training run, checked."""

from dataclasses import dataclass

from perflow_diffusers.words.shown import shown
from perflow_training.config.checks import check
from perflow_training.config.options import TrainingOptions


@shown
@dataclass(frozen=True)
class TrainingConfig(TrainingOptions):
    """Every option of a run (`python training/train_perflow.py --reference` explains each), checked when it is made.

    Raises ConfigError or DataError, which name the option, its value and what it can be.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self)
