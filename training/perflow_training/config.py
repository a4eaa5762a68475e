"""Every option of a training run, with its default; read from YAML, overridden by `name=value` words."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml


class ConfigError(ValueError):
    """An option that does not exist or a value that it cannot take."""


@dataclass(frozen=True)
class TrainingConfig:
    # what is accelerated, and where the result goes
    pretrained_model_name_or_path: str = ""  # folder or Hub id of the teacher, a diffusers pipeline
    output_dir: str = "perflow-out"  # EMA student in output_dir/unet, delta in output_dir/perflow.safetensors
    seed: int = 0
    # captions and pictures
    train_captions: str = ""  # text file, one caption a line, or parquet with a `caption` column
    train_images: bool = False  # the parquet's `image` column feeds starting points from noised data
    caption_dropout: float = 0.1  # share of empty captions
    # PeRFlow: windows, parameterisation, teacher
    prediction_type: str = "ddim_eps"  # ddim_eps, diff_eps or velocity
    num_time_windows: int = 4
    window_boundaries: list[int] | None = None  # explicit N = b0 > ... > bK = 0 instead of equal windows
    solver: str = "dpmpp_2m"  # ddim, dpmpp_2m or heun
    solver_steps: int = 6  # per window
    guidance_scale: float | None = None  # None: CFG-sync (unguided solve, guidance at sampling); 7.5: guided solve
    # starting points and training points
    data_starts: float = 0.0  # share of solved windows that start on noised data; the rest on teacher trajectories
    solve_batch_size: int = 64  # trajectories solved at once
    buffer_size: int = 4096  # solved windows kept
    reuse: int = 4  # times each solved window is trained on before it is replaced (1 = the paper)
    timestep_starts: float = 0.0  # share of training timesteps on window starts
    timestep_grid: float = 0.0  # share on the grid of 2 steps a window; the rest is uniform inside the window
    # loss
    loss: str = "l2"  # l2 or pseudo_huber
    huber_c: float = 0.03
    window_weights: str | list[float] = "equal"  # equal, measured, or one number a window
    # optimisation; names as in diffusers' training scripts
    max_train_steps: int = 1000
    train_batch_size: int = 64
    learning_rate: float = 5e-4
    lr_warmup_steps: int = 100
    lr_scheduler: str = "cosine"
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "no"
    torch_compile: bool = False
    # what travels with the weights
    recommended_steps: list[int] = field(default_factory=lambda: [4, 8])
    logging_steps: int = 50

    def to_dict(self) -> dict:
        return asdict(self)


CHOICES = {
    "prediction_type": ("ddim_eps", "diff_eps", "velocity"),
    "solver": ("ddim", "dpmpp_2m", "heun"),
    "loss": ("l2", "pseudo_huber"),
    "mixed_precision": ("no", "fp16", "bf16"),
}
SHARES = ("caption_dropout", "data_starts", "timestep_starts", "timestep_grid")
AT_LEAST_ONE = (
    "num_time_windows",
    "solver_steps",
    "solve_batch_size",
    "buffer_size",
    "reuse",
    "max_train_steps",
    "train_batch_size",
)


def load_config(path: str | Path | None, overrides: list[str] = ()) -> TrainingConfig:
    """The options of a YAML file, then `name=value` overrides (values in YAML), all checked.

    Raises ConfigError naming the option, its value and what it can be.
    """
    values = {}
    if path is not None:
        values = yaml.safe_load(Path(path).read_text()) or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds no mapping of options. Write one `name: value` a line.")
    for word in overrides:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"Override {word!r} is not of the form name=value, for example max_train_steps=200.")
        values[name] = yaml.safe_load(value)
    known = {option.name: option for option in fields(TrainingConfig)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"Unknown option {', '.join(unknown)}. The options are: {', '.join(known)}.")
    return check(TrainingConfig(**{name: _cast(name, value) for name, value in values.items()}))


def _cast(name: str, value):
    """YAML reads 5e-4 as text and 1 as an integer: floats are made floats here."""
    default = getattr(TrainingConfig, name, None)
    if isinstance(default, float) and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError as error:
            raise ConfigError(f"`{name}={value!r}` is not a number.") from error
    if isinstance(default, (bool, int)) and type(value) is not type(default):
        raise ConfigError(f"`{name}={value!r}` must be of type {type(default).__name__}.")
    return value


def check(config: TrainingConfig) -> TrainingConfig:
    """The config itself, or ConfigError naming the first option that cannot work."""
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ConfigError(f"`{name}={getattr(config, name)!r}` is not one of {', '.join(choices)}.")
    for name in SHARES:
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"`{name}={getattr(config, name)}` is a share and must lie in 0..1.")
    for name in AT_LEAST_ONE:
        if getattr(config, name) < 1:
            raise ConfigError(f"`{name}={getattr(config, name)}` must be at least 1.")
    if config.timestep_starts + config.timestep_grid > 1:
        raise ConfigError(
            "`timestep_starts` and `timestep_grid` are shares of one whole: their sum must be at most 1."
        )
    if config.data_starts and not config.train_images:
        raise ConfigError(f"`data_starts={config.data_starts}` needs pictures: set `train_images=true`.")
    for name in ("pretrained_model_name_or_path", "train_captions"):
        if not getattr(config, name):
            raise ConfigError(f"`{name}` is not set. Give it in the YAML file or as {name}=... on the command line.")
    windows = config.num_time_windows if config.window_boundaries is None else len(config.window_boundaries) - 1
    weights = config.window_weights
    if isinstance(weights, str) and weights not in ("equal", "measured"):
        raise ConfigError(f"`window_weights={weights!r}` is not equal, measured or a list of {windows} numbers.")
    if isinstance(weights, list) and (len(weights) != windows or min(weights) <= 0):
        raise ConfigError(
            f"`window_weights={weights}` must be {windows} positive numbers, one a window, noisy end first."
        )
    return config
