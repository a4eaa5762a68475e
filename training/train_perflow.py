"""Distils a diffusers pipeline with PeRFlow and writes the few-step student and its delta.

    python training/train_perflow.py --config training/configs/miniature.yaml max_train_steps=200 output_dir=out
    accelerate launch --config_file training/configs/accelerate/ddp.yaml training/train_perflow.py --config ...

Every option of training/configs/reference.yaml can stand in the YAML file or as name=value after it.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed

from perflow_training.backbone import teacher_of
from perflow_training.checkpoint import find_checkpoint, step_of
from perflow_training.config import ConfigError, TrainingConfig, load_config, reference, trackers
from perflow_training.data import DataError
from perflow_training.draws import Draws
from perflow_training.feed import CachedFeed, EncodedFeed, Feed
from perflow_training.product import load_pipeline, write_products
from perflow_training.student import DTYPES
from perflow_training.trainer import Trainer, append_log
from perflow_training.validation import Validation
from perflow_training.watch import TrainingStopped

STOPPED_BY_SIGNAL = 143  # 128 + SIGTERM: what launchers take for a preempted job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, help="YAML file of options, for example training/configs/miniature.yaml"
    )
    parser.add_argument("--reference", action="store_true", help="print every option, its default and its meaning")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="options that replace those of the file")
    args = parser.parse_args()
    if args.reference:
        print(reference(), end="")
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        config = load_config(args.config, args.overrides)
        if not run(config):
            sys.exit(STOPPED_BY_SIGNAL)
    except (ConfigError, DataError, OSError) as error:
        parser.error(str(error))
    except TrainingStopped as error:
        sys.exit(f"stopped: {error}")


def run(config: TrainingConfig) -> bool:
    """Everything from the options to the files; False if SIGTERM ended the run after saving a checkpoint.

    Raises ConfigError or DataError for what cannot be used, TrainingStopped for a run that cannot become good.
    """
    resumed = find_checkpoint(config)  # a wrong name is refused before anything is loaded
    accelerator = _accelerator(config)
    if not accelerator.is_main_process:
        logging.getLogger("perflow_training").setLevel(logging.WARNING)
    draws = Draws(config.seed, accelerator.process_index, accelerator.num_processes)
    set_seed(config.seed)  # for the LoRA's first factors, which are the same on every process
    trainer, feed = _trainer(config, accelerator, draws)
    set_seed(config.seed, device_specific=True)  # for dropout, which is not
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    on_log = None
    if accelerator.is_main_process:
        on_log = append_log(out / "log.jsonl", step_of(resumed) if resumed else 0)
    if trackers(config):
        flat = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.to_dict().items()}
        accelerator.init_trackers(config.tracker_project_name, config=flat)
    try:
        weights = trainer.train(on_log)
    finally:
        feed.close()
        accelerator.end_training()
    if weights is not None and accelerator.is_main_process:
        forms = ("student", "delta", "lora") if config.lora_rank else ("student", "delta")
        print("\n".join(f"{form}: {path}" for form, path in write_products(config, weights, out, forms).items()))
    return weights is not None


def _accelerator(config: TrainingConfig) -> Accelerator:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    available = {kind.value for kind in get_available_trackers()}
    for name in trackers(config):
        if name not in available:  # accelerate itself would leave it out without a word
            raise ConfigError(f"`report_to={config.report_to}` needs the package {name}: pip install {name}.")
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=trackers(config) or None,
            project_dir=config.output_dir,
        )
    except ValueError as error:  # fp16 on a CPU, for example
        raise ConfigError(f"`mixed_precision={config.mixed_precision}` is not possible here: {error}") from error
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("`mixed_precision=fp16` needs a GPU. Take bf16 or no on a CPU.")
    return accelerator


def _trainer(config: TrainingConfig, accelerator: Accelerator, draws: Draws) -> tuple[Trainer, Feed]:
    """The trainer with its material; from a cache, neither VAE nor text encoders are loaded."""
    cached = bool(config.train_cache_dir)
    if cached and config.validation_steps:
        raise ConfigError(
            "`validation_steps` needs the VAE and the text encoders, which `train_cache_dir` keeps out of memory. Set "
            "validation_steps=0, or train without the cache."
        )
    pipe = load_pipeline(config, encoders=not cached)
    teacher = teacher_of(pipe, config.rescale_betas_zero_snr)
    if cached:
        size = pipe.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        feed = CachedFeed((pipe.unet.config.in_channels, height, width), config, draws, accelerator.device)
    else:
        dtype = DTYPES[config.mixed_precision]
        for name, part in pipe.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to(accelerator.device, dtype).eval().requires_grad_(False)
        pipe.vae.to(accelerator.device).eval().requires_grad_(False)
        feed = EncodedFeed(pipe, config, draws, accelerator.device)
    trainer = Trainer(config, teacher, feed, accelerator, draws)
    if config.validation_steps:
        trainer.validate = Validation(pipe, config, trainer.windows, accelerator)
    return trainer, feed


if __name__ == "__main__":
    main()
