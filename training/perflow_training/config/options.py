"""The options of a training run, each with its default and what is to be said of it."""

from dataclasses import asdict, dataclass

from perflow_diffusers.words.shown import shown
from perflow_training.config.data import DataOptions
from perflow_training.config.option import option

FORMS = ("student", "delta", "lora", "artifact")  # of a product


@shown
@dataclass(frozen=True)
class TrainingOptions(DataOptions):
    """What a run is told, unchecked; `TrainingConfig` is checked."""

    pretrained_model_name_or_path: str = option(
        "",
        "folder or Hub id of the teacher, a diffusers pipeline",
        section="what is accelerated, and where the result goes",
    )
    revision: str | None = option(None, "of the teacher on the Hub")
    variant: str | None = option(None, "of the teacher's files, for example fp16")
    output_dir: str = option(
        "perflow-out", "log, checkpoints, and the product: unet, perflow.safetensors, lora, artifact"
    )
    seed: int = option(0, "of every random number")
    prediction_type: str | None = option(
        None,
        "ddim_eps, diff_eps or velocity; null: ddim_eps, on a flow-matching base velocity",
        section="PeRFlow: windows, parameterisation, teacher",
    )
    num_time_windows: int = option(4, "K")
    window_boundaries: list[float] | None = option(
        None,
        "explicit N = b0 > ... > bK = 0 instead of equal windows; of a flow-matching base noise levels from 1 to 0",
    )
    window_shift: float | None = option(
        None, "of a flow-matching base: the shift of time in which windows are equal; null: the pipeline's own"
    )
    pipeline_arguments: str = option(
        "", "what else the pipeline of a flow-matching base is called with, as YAML: '{num_frames: 17}'"
    )
    solver: str = option("dpmpp_2m", "ddim, dpmpp_2m, deis (nearer over whole trajectories with guidance) or heun")
    solver_steps: int = option(4, "per window; of a flow-matching base Euler's, of the pipeline itself")
    solver_spacing: str = option("log_snr", "log_snr or time: equal steps of what (the paper: ddim, 8 steps of time)")
    solve_guidance: float | list[float] | None = option(
        None,
        "of the teacher; null: CFG-sync (a flow-matching pipeline's own); 7.5: guided solve; [5, 9]: drawn for each",
    )
    caption_dropout: float = option(0.1, "share of empty captions")
    rescale_betas_zero_snr: bool = option(False, "the schedule rescaled to zero terminal SNR (velocity only)")
    data_starts: float = option(
        0.0,
        "share of solves that start on noised pictures (the paper: 1); the rest on trajectories",
        section="starting points and training points",
    )
    zero_snr: bool = option(
        False, "noised pictures in the first window are replaced by pure noise, as sampling starts"
    )
    solve_batch_size: int = option(64, "trajectories that a process solves at once")
    buffer_size: int = option(4096, "solved windows that a process keeps")
    reuse: int = option(4, "times each solved window is trained on before it is replaced (1 = the paper)")
    timestep_starts: float = option(0.0, "share of training timesteps on window starts")
    timestep_grid: float = option(0.0, "share on the grid of 2 steps a window; the rest is uniform inside the window")
    discrete_timesteps: int = option(
        0, "puts the uniform ones on a grid of so many points over all windows; 0: all timesteps"
    )
    loss: str = option("l2", "l2 or pseudo_huber", section="loss")
    huber_c: float = option(0.03, "of pseudo_huber: where it turns from square to straight")
    window_weights: str | list[float] = option("equal", "equal, measured, or one number a window, noisy end first")
    reweighting_scheme: str = option(
        "none", "none, reciprocal: 1 / max(1 - t, 0.1) / 2.3, rcp_win: window start / its mean"
    )
    lora_rank: int = option(0, "0: all weights; otherwise a LoRA of this rank", section="what is trained")
    lora_alpha: float = option(0.0, "0: the rank")
    lora_dropout: float = option(0.0, "share of what goes into a LoRA that is left out")
    lora_target_modules: list[str] | None = option(
        None, "layers that have one, by the ends of their names; null: attention, feed-forward, and a UNet's others"
    )
    max_train_steps: int = option(
        1000, "of the optimiser", section="optimisation; names as in diffusers' training scripts"
    )
    train_batch_size: int = option(64, "training points that a process takes at once")
    gradient_accumulation_steps: int = option(1, "batches an optimiser step")
    learning_rate: float = option(0.0005, "at its highest, after the warm-up")
    lr_warmup_steps: int = option(100, "from 0 up to the learning rate")
    lr_scheduler: str = option("cosine", "a name of diffusers.optimization.get_scheduler")
    adam_beta1: float = option(0.9, "")
    adam_beta2: float = option(0.99, "")
    adam_weight_decay: float = option(0.0, "")
    adam_epsilon: float = option(1e-08, "")
    use_8bit_adam: bool = option(False, "optimiser state in 8 bits; needs bitsandbytes and a GPU")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    ema_decay: float = option(0.999, "of the average of the weights that becomes the product")
    mixed_precision: str | None = option(
        None, "no, fp16, bf16 (teacher kept in it, student float32); null: launcher's", section="speed and memory"
    )
    allow_tf32: bool = option(False, "faster float32 products on recent GPUs")
    gradient_checkpointing: bool = option(False, "activations are computed twice, for less memory")
    torch_compile: bool = option(
        False, "teacher and student; 1 to 2 minutes before the first step; also if the launcher asks"
    )
    checkpointing_steps: int = option(0, "0: only at the end, and when the run is told to stop", section="checkpoints")
    checkpoints_total_limit: int | None = option(None, "those that were written before are deleted")
    resume_from_checkpoint: str | None = option(
        None, "latest (the newest undamaged one), or the folder of a checkpoint"
    )
    logging_steps: int = option(50, "steps between two lines of the log", section="what is watched")
    report_to: str = option(
        "none", "none, tensorboard, wandb, or several with commas; output_dir/log.jsonl is always written"
    )
    tracker_project_name: str = option("perflow", "")
    skip_nonfinite: int = option(0, "steps with a loss or gradient that is no number, left out before the run ends")
    divergence_steps: int = option(500, "a loss above its start for so many steps ends the run; 0: never")
    divergence_factor: float = option(1.25, "how far above")
    validation_steps: int = option(0, "0: no validation pictures")
    validation_prompts: list[str] = option([], "captions, one a row of pictures")
    validation_samplings: list[list[float]] = option(
        [[4.0, 4.5], [8.0, 7.5]], "pairs of steps and guidance; without guidance: 1"
    )
    validation_teacher_steps: int = option(25, "of the pictures beside")
    product: list[str] | None = option(
        None,
        "student, delta, lora, artifact; null: lora with a LoRA, else student and delta",
        section="the product, and what travels with it",
    )
    recommended_steps: list[int] = option([4, 8], "what the card and the header say")
    recommended_guidance_scale: float | None = option(
        None,
        "the same; null: 1 after a guided solve, of a flow-matching pipeline what switches guidance off or is told",
    )

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def parameterisation(self) -> str:
        """`prediction_type`, where it is left to the default of a diffusion, too."""
        return self.prediction_type or "ddim_eps"

    @property
    def flow(self) -> bool:
        """Whether windows lie between noise levels, as those of a flow-matching base do."""
        return bool(self.window_boundaries) and max(self.window_boundaries or [2]) <= 1

    @property
    def mean_guidance(self) -> float | None:
        """Guidance of the teacher's solve, the middle of a range; None for CFG-sync."""
        scale = self.solve_guidance
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
