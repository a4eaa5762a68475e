"""Every option of a training run, with its default; read from YAML, overridden by `name=value` words."""

import difflib
import inspect
import math
import re
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import yaml
from diffusers.optimization import SchedulerType

from perflow_diffusers.flow import METHODS, Windows
from perflow_diffusers.words.shown import shown

from .data.options import SOURCES, DataError, DataOptions
from .data.text import read_text
from .places import url_problem


class ConfigError(ValueError):
    """An option that does not exist or a value that it cannot take."""


@shown
@dataclass(frozen=True)
class TrainingConfig(DataOptions):
    # what is accelerated, and where the result goes
    pretrained_model_name_or_path: str = ""  # folder or Hub id of the teacher, a diffusers pipeline
    revision: str | None = None  # of the teacher on the Hub
    variant: str | None = None  # of the teacher's files, for example fp16
    output_dir: str = "perflow-out"  # log, checkpoints, and the product: unet, perflow.safetensors, lora, artifact
    seed: int = 0
    # PeRFlow: windows, parameterisation, teacher
    prediction_type: str = "ddim_eps"  # ddim_eps, diff_eps or velocity
    num_time_windows: int = 4
    window_boundaries: list[int] | None = None  # explicit N = b0 > ... > bK = 0 instead of equal windows
    solver: str = "dpmpp_2m"  # ddim, dpmpp_2m, deis (nearer over whole trajectories with guidance) or heun
    solver_steps: int = 4  # per window
    solver_spacing: str = "log_snr"  # log_snr or time: equal steps of what (the paper: ddim, 8 steps of time)
    guidance_scale: float | list[float] | None = None  # null: CFG-sync; 7.5: guided solve; [5, 9]: drawn a trajectory
    caption_dropout: float = 0.1  # share of empty captions
    rescale_betas_zero_snr: bool = False  # the schedule rescaled to zero terminal SNR (velocity only)
    # starting points and training points
    data_starts: float = 0.0  # share of solves that start on noised pictures (the paper: 1); the rest on trajectories
    zero_snr: bool = False  # noised pictures in the first window are replaced by pure noise, as sampling starts
    solve_batch_size: int = 64  # trajectories that a process solves at once
    buffer_size: int = 4096  # solved windows that a process keeps
    reuse: int = 4  # times each solved window is trained on before it is replaced (1 = the paper)
    timestep_starts: float = 0.0  # share of training timesteps on window starts
    timestep_grid: float = 0.0  # share on the grid of 2 steps a window; the rest is uniform inside the window
    discrete_timesteps: int = 0  # puts the uniform ones on a grid of so many points over all windows; 0: all timesteps
    # loss
    loss: str = "l2"  # l2 or pseudo_huber
    huber_c: float = 0.03
    window_weights: str | list[float] = "equal"  # equal, measured, or one number a window, noisy end first
    reweighting_scheme: str = "none"  # none, reciprocal: 1 / max(1 - t, 0.1) / 2.3, rcp_win: window start / its mean
    # what is trained
    lora_rank: int = 0  # 0: all weights; otherwise a LoRA of this rank
    lora_alpha: float = 0.0  # 0: the rank
    lora_dropout: float = 0.0
    lora_target_modules: list[str] = field(
        default_factory=lambda: [
            "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
            "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
        ]
    )  # fmt: skip
    # optimisation; names as in diffusers' training scripts
    max_train_steps: int = 1000
    train_batch_size: int = 64  # training points that a process takes at once
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-4
    lr_warmup_steps: int = 100
    lr_scheduler: str = "cosine"  # a name of diffusers.optimization.get_scheduler
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    use_8bit_adam: bool = False  # optimiser state in 8 bits; needs bitsandbytes and a GPU
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    # speed and memory
    mixed_precision: str | None = None  # no, fp16, bf16 (teacher kept in it, student float32); null: launcher's
    allow_tf32: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool = False  # teacher and student; 1 to 2 minutes before the first step; also if the launcher asks
    # checkpoints
    checkpointing_steps: int = 0  # 0: only at the end, and when the run is told to stop
    checkpoints_total_limit: int | None = None  # those that were written before are deleted
    resume_from_checkpoint: str | None = None  # latest (the newest undamaged one), or the folder of a checkpoint
    # what is watched
    logging_steps: int = 50
    report_to: str = "none"  # none, tensorboard, wandb, or several with commas; output_dir/log.jsonl is always written
    tracker_project_name: str = "perflow"
    skip_nonfinite: int = 0  # steps with a loss or gradient that is no number, left out before the run ends
    divergence_steps: int = 500  # a loss above its start for so many steps ends the run; 0: never
    divergence_factor: float = 1.25  # how far above
    validation_steps: int = 0  # 0: no validation pictures
    validation_prompts: list[str] = field(default_factory=list)
    validation_samplings: list[list[float]] = field(
        default_factory=lambda: [[4.0, 4.5], [8.0, 7.5]]
    )  # pairs of steps and guidance; without guidance: 1
    validation_teacher_steps: int = 25
    # the product, and what travels with it
    product: list[str] | None = None  # student, delta, lora, artifact; null: lora with a LoRA, else student and delta
    recommended_steps: list[int] = field(default_factory=lambda: [4, 8])

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def solve_guidance(self) -> float | None:
        """Guidance of the teacher's solve, the middle of a range; None for CFG-sync."""
        scale = self.guidance_scale
        scale = sum(scale) / len(scale) if isinstance(scale, list) else scale
        return None if scale == 1.0 else scale

    @property
    def forms(self) -> tuple[str, ...]:
        """What a run writes at its end, of FORMS."""
        asked = self.product or (["lora"] if self.lora_rank else ["student", "delta"])
        return tuple(form for form in FORMS if form in asked)

    @property
    def window_count(self) -> int:
        """K."""
        return self.num_time_windows if self.window_boundaries is None else len(self.window_boundaries) - 1


CHOICES = {
    "prediction_type": ("ddim_eps", "diff_eps", "velocity"),
    "solver": tuple(METHODS),
    "solver_spacing": ("log_snr", "time"),
    "loss": ("l2", "pseudo_huber"),
    "reweighting_scheme": ("none", "reciprocal", "rcp_win"),
    # piecewise_constant needs rules that have no option
    "lr_scheduler": tuple(kind.value for kind in SchedulerType if kind.value != "piecewise_constant"),
    "mixed_precision": (None, "no", "fp16", "bf16"),
}
FORMS = ("student", "delta", "lora", "artifact")  # of a product
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
PATHS = ("output_dir", "resume_from_checkpoint", "train_cache_dir", "train_data_dir", "train_captions")


def load_config(path: str | Path | None, overrides: typing.Sequence[str] = ()) -> TrainingConfig:
    """The options of a YAML file, then `name=value` overrides (values in YAML), all checked.

    Raises ConfigError naming the option, its value and what it can be.
    """
    values: dict = {}
    if path is not None:
        try:
            text = read_text(Path(path))
        except DataError as error:
            raise ConfigError(str(error)) from error
        values = _yaml(text, f"{path}") or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds no mapping of options. Write one `name: value` a line.")
    for word in overrides:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"Override {word!r} is not of the form name=value, for example max_train_steps=200.")
        values[name] = _yaml(value, f"`{name}={value}`")
    return ready(config_of(values))


@dataclass(frozen=True)
class _Plain:
    """A word of YAML without quotes: what was `written`, and the `value` that YAML takes it for (`no` for false)."""

    written: str
    value: object


class _Loader(yaml.SafeLoader):
    """Keeps both readings of plain words, for an option's type decides which is meant."""

    def construct_object(self, node: yaml.Node, deep: bool = False):
        value = super().construct_object(node, deep)
        plain = isinstance(node, yaml.ScalarNode) and node.style is None and not isinstance(value, str)
        return _Plain(node.value, value) if plain else value


def _yaml(text: str, what: str):
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        said = str(error).splitlines()[0]
        raise ConfigError(f"{what} is not valid YAML: {said}. Texts with : # [ or {{ need quotes.") from error


def config_of(values: dict) -> TrainingConfig:
    """A config of plain values, for example those of a checkpoint's config.json. Raises ConfigError."""
    known = {option.name: option for option in fields(TrainingConfig)}
    unknown = sorted(set(values) - set(known), key=str)
    if unknown:
        near = [match for name in unknown for match in difflib.get_close_matches(str(name), known, 2)]
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"Unknown option {', '.join(map(str, unknown))}.{hint} The options are: {', '.join(known)}.")
    hints = typing.get_type_hints(TrainingConfig)
    try:
        return TrainingConfig(**{name: _cast(name, value, hints[name]) for name, value in values.items()})
    except DataError as error:
        raise ConfigError(str(error)) from error


def ready(config: TrainingConfig) -> TrainingConfig:
    """The config itself, or ConfigError for an option that a run cannot do without."""
    if not config.pretrained_model_name_or_path:
        raise ConfigError(
            "`pretrained_model_name_or_path` is not set. Give it in the YAML file or as "
            "pretrained_model_name_or_path=... on the command line."
        )
    if not any(getattr(config, name) for name in (*SOURCES, "train_cache_dir")):
        raise ConfigError(
            "No captions: none of `train_captions`, `train_data_dir`, `dataset_name`, `train_shards` and "
            "`train_cache_dir` is set. A text file with one caption a line is enough: train_captions=captions.txt."
        )
    # not for the options of a checkpoint, which can be of a run that has moved since
    problem = url_problem({name: getattr(config, name) for name in PATHS})
    if problem:
        raise ConfigError(problem)
    if not config.output_dir:
        raise ConfigError("`output_dir` is empty. Give the folder to write to, for example output_dir=runs/first.")
    return config


def _cast(name: str, value, hint):
    """The value as the option's type wants it: YAML reads 5e-4 as text, 1 as an integer and `no` as false."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, _Plain):
        value = _meant(value, kinds)
    if value is None and (type(None) in kinds or str in kinds):
        return None if type(None) in kinds else ""  # `name=` is an empty text
    if isinstance(value, list):
        wanted = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is list]
        if wanted:
            return [_cast(name, item, wanted[0]) for item in value]
    if float in kinds and not isinstance(value, (bool, list, dict)) and value is not None:
        try:
            number = float(value)
        except ValueError as error:
            if str not in kinds:
                raise ConfigError(f"`{name}={value!r}` is not a number.") from error
        else:
            if not math.isfinite(number):
                raise ConfigError(f"`{name}={value!r}` must be a finite number.")
            return number
    plain = tuple(kind for kind in kinds if kind in (bool, int, str))
    if type(value) in plain:
        return value
    expected = " or ".join("null" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ConfigError(f"`{name}={value!r}` must be of type {expected}.")


def _meant(word: _Plain, kinds: tuple):
    """A plain word as options of these types read it; `null` and nothing at all stay what they are."""
    if word.value is None:
        return None
    if str in kinds:
        return word.written
    if ":" in word.written:  # YAML: 1:30 is ninety
        return word.written
    return int(word.written) if int in kinds and word.written.isdecimal() else word.value  # YAML: 010 is eight


def _check(config: TrainingConfig) -> None:
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
    if config.rescale_betas_zero_snr and config.prediction_type != "velocity":
        raise ConfigError("`rescale_betas_zero_snr` is defined for `prediction_type=velocity` only.")
    if config.product is not None and (not config.product or set(config.product) - set(FORMS)):
        raise ConfigError(f"`product={config.product}` must name some of {', '.join(FORMS)}; null: what was trained.")
    _check_guidance(config)
    _check_watch(config)
    _check_windows(config)


def _check_windows(config: TrainingConfig) -> None:
    if config.window_boundaries is not None:
        try:
            last = Windows(tuple(config.window_boundaries)).boundaries[-1]
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


def _check_guidance(config: TrainingConfig) -> None:
    scale = config.guidance_scale
    if isinstance(scale, list) and (len(scale) != 2 or not 0 < scale[0] <= scale[1]):
        raise ConfigError(f"`guidance_scale={scale}` must be a number, null, or two positive ones from low to high.")
    if isinstance(scale, float) and scale <= 0:
        raise ConfigError(f"`guidance_scale={scale}` must be positive; null (or 1) solves without guidance.")


def _check_watch(config: TrainingConfig) -> None:
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


def trackers(config: TrainingConfig) -> list[str]:
    """Names of the trackers that `report_to` asks for."""
    return [name.strip() for name in config.report_to.split(",") if name.strip() not in ("", "none")]


def reference() -> str:
    """configs/reference.yaml: every option with its default and meaning, as the classes' own lines say it."""
    parts = ["# Every option, its default and its meaning. Written by: python training/train_perflow.py --reference"]
    for title, owner in (("captions and pictures", DataOptions), ("", TrainingConfig)):
        own = {option.name: option for option in fields(owner) if option.name in owner.__annotations__}
        comments = _comments(owner, own)
        if title:
            parts.append(f"\n# {title}")
        for name, option in own.items():
            heading, meaning = comments[name]
            parts += [f"\n# {heading}"] * bool(heading)
            default = option.default if option.default is not MISSING else option.default_factory()
            text = yaml.safe_dump(default, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
            parts.append(f"{name}: {text}  # {meaning}" if meaning else f"{name}: {text}")
    return "\n".join(parts) + "\n"


def _comments(owner: type, names: typing.Iterable[str]) -> dict[str, tuple[str, str]]:
    """(heading above, comment behind) of each field in a class's source."""
    found: dict[str, tuple[str, str]] = dict.fromkeys(names, ("", ""))
    heading, current = "", ""
    for line in inspect.getsource(owner).splitlines():
        field_line = re.match(r"    (\w+): ", line)
        if line.startswith("    # "):
            heading = line.strip("# ")
        elif field_line and field_line[1] in found:
            current = field_line[1]
            found[current] = (heading, _behind(line))
            heading = ""
        elif line.startswith("    def "):
            break
        elif current and _behind(line):
            found[current] = (found[current][0], _behind(line))
    return found


def _behind(line: str) -> str:
    comment = line.split("  # ", 1)[1] if "  # " in line else ""
    return "" if comment.startswith("fmt:") else comment
