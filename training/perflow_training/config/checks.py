"""What options cannot be, one by one and together."""

from diffusers.optimization import SchedulerType

from perflow_diffusers.flow import METHODS, PREDICTION_TYPES, SigmaWindows, Windows
from perflow_diffusers.flow.solver import SPACINGS
from perflow_training.config.options import FORMS, TrainingOptions
from perflow_training.errors import ConfigError

CHOICES = {
    "prediction_type": (None, *PREDICTION_TYPES),
    "solver": tuple(METHODS),
    "solver_spacing": tuple(SPACINGS),
    "loss": ("l2", "pseudo_huber"),
    "reweighting_scheme": ("none", "reciprocal", "rcp_win"),
    # piecewise_constant needs rules that have no option
    "lr_scheduler": tuple(kind.value for kind in SchedulerType if kind.value != "piecewise_constant"),
    "mixed_precision": (None, "no", "fp16", "bf16"),
}
SHARES = ("caption_dropout", "data_starts", "timestep_starts", "timestep_grid", "lora_dropout")
AT_LEAST_ONE = (
    "num_time_windows", "solver_steps", "solve_batch_size", "buffer_size", "reuse", "max_train_steps",
    "train_batch_size", "gradient_accumulation_steps", "logging_steps", "validation_teacher_steps",
)  # fmt: skip
NOT_NEGATIVE = (
    "learning_rate", "lr_warmup_steps", "lora_rank", "lora_alpha", "discrete_timesteps", "checkpointing_steps",
    "divergence_steps", "skip_nonfinite", "validation_steps", "adam_weight_decay",
)  # fmt: skip
POSITIVE = ("huber_c", "adam_epsilon", "max_grad_norm", "divergence_factor")
DECAYS = ("adam_beta1", "adam_beta2", "ema_decay")
TRACKERS = ("tensorboard", "wandb")


def check(config: TrainingOptions) -> None:
    """ConfigError naming the first option that cannot work."""
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            known = ", ".join(choice for choice in choices if choice is not None)
            raise ConfigError(f"`{name}={getattr(config, name)!r}` is not one of {known}.")
    for name in SHARES:
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"`{name}={getattr(config, name)}` is a share and must lie in 0..1.")
    for name in AT_LEAST_ONE:
        if getattr(config, name) < 1:
            raise ConfigError(f"`{name}={getattr(config, name)}` must be at least 1.")
    for name in NOT_NEGATIVE:
        if getattr(config, name) < 0:
            raise ConfigError(f"`{name}={getattr(config, name)}` must not be negative.")
    for name in POSITIVE:
        if getattr(config, name) <= 0:
            raise ConfigError(f"`{name}={getattr(config, name)}` must be positive.")
    for name in DECAYS:
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"`{name}={getattr(config, name)}` must be at least 0 and below 1.")
    if config.checkpoints_total_limit is not None and config.checkpoints_total_limit < 1:
        raise ConfigError(
            f"`checkpoints_total_limit={config.checkpoints_total_limit}` must be at least 1; null keeps all."
        )
    if config.timestep_starts + config.timestep_grid > 1:
        raise ConfigError(
            "`timestep_starts` and `timestep_grid` are shares of one whole: their sum must be at most 1."
        )
    if config.rescale_betas_zero_snr and not PREDICTION_TYPES[config.parameterisation].zero_snr:
        defined = " or ".join(name for name, row in PREDICTION_TYPES.items() if row.zero_snr)
        raise ConfigError(f"`rescale_betas_zero_snr` is defined for `prediction_type={defined}` only.")
    if config.product is not None and (not config.product or set(config.product) - set(FORMS)):
        raise ConfigError(f"`product={config.product}` must name some of {', '.join(FORMS)}; null: what was trained.")
    _check_guidance(config)
    _check_watch(config)
    _check_windows(config)


def _check_windows(config: TrainingOptions) -> None:
    if config.window_boundaries is not None:
        try:
            kind = SigmaWindows if config.flow else Windows
            last = kind(tuple(config.window_boundaries)).boundaries[-1]  # type: ignore[arg-type]  # whole ones, or not
        except ValueError as error:
            raise ConfigError(f"`window_boundaries`: {error}") from error
        if last:
            raise ConfigError(f"`window_boundaries={config.window_boundaries}` must end at 0, the data.")
    weights, windows = config.window_weights, config.window_count
    if isinstance(weights, str) and weights not in ("equal", "measured"):
        raise ConfigError(f"`window_weights={weights!r}` is not equal, measured or a list of {windows} numbers.")
    if isinstance(weights, list) and (len(weights) != windows or min(weights) <= 0):
        raise ConfigError(
            f"`window_weights={weights}` must be {windows} positive numbers, one a window, noisy end first."
        )


def _check_guidance(config: TrainingOptions) -> None:
    scale = config.solve_guidance
    if isinstance(scale, list) and (len(scale) != 2 or not 0 < scale[0] <= scale[1]):
        raise ConfigError(f"`solve_guidance={scale}` must be a number, null, or two positive ones from low to high.")
    if isinstance(scale, float) and scale <= 0:
        raise ConfigError(f"`solve_guidance={scale}` must be positive; null (or 1) solves without guidance.")


def _check_watch(config: TrainingOptions) -> None:
    unknown = [name for name in trackers(config) if name not in TRACKERS]
    if unknown:
        raise ConfigError(f"`report_to={config.report_to!r}`: {', '.join(unknown)} is none of {', '.join(TRACKERS)}.")
    if config.validation_steps and not config.validation_prompts:
        raise ConfigError("`validation_steps` needs `validation_prompts`, a list of captions.")
    if config.validation_steps and not config.validation_samplings:
        raise ConfigError("`validation_steps` needs `validation_samplings`, pairs of steps and guidance.")
    if not config.recommended_steps or min(config.recommended_steps) < 1:
        raise ConfigError(f"`recommended_steps={config.recommended_steps}` must be step counts of at least 1.")
    for pair in config.validation_samplings:
        if len(pair) != 2 or pair[0] < 1 or pair[0] != int(pair[0]):
            raise ConfigError(
                f"`validation_samplings` has {pair}; expected pairs of steps and guidance such as [4, 7.5]."
            )


def trackers(config: TrainingOptions) -> list[str]:
    """Names of the trackers that `report_to` asks for."""
    return [name.strip() for name in config.report_to.split(",") if name.strip() not in ("", "none")]
