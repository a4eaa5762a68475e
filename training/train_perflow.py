"""Distils a diffusers pipeline with PeRFlow and writes the few-step student and its delta.

    python training/train_perflow.py --config training/configs/miniature.yaml max_train_steps=200 output_dir=out

Every option of training/perflow_training/config.py can stand in the YAML file or as name=value after it.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline

from perflow_diffusers.weights.delta import compute_delta
from perflow_training.backbone import teacher_of
from perflow_training.config import ConfigError, TrainingConfig, load_config
from perflow_training.data import condition_sampler, latent_sampler, load_captions
from perflow_training.trainer import Trainer


def export(config: TrainingConfig, pipe, network, out: Path) -> Path:
    """Writes the student to `out/unet` and its difference to the teacher to `out/perflow.safetensors` (fp16)."""
    network.save_pretrained(out / "unet")
    windows = len(config.window_boundaries) - 1 if config.window_boundaries else config.num_time_windows
    metadata = {
        "prediction_type": config.prediction_type,
        "num_time_windows": windows,
        "recommended_steps": config.recommended_steps,
        "guidance_scale": config.guidance_scale if config.guidance_scale is not None else 0.0,
        "recommended_guidance_scale": 1.0 if config.guidance_scale is not None else None,
        "recipe": config.to_dict(),
    }
    if config.window_boundaries is not None:
        metadata["window_boundaries"] = config.window_boundaries
    delta = out / "perflow.safetensors"
    compute_delta(
        pipe.unet.state_dict(),
        network.state_dict(),
        delta,
        dtype=torch.float16,
        metadata={name: value for name, value in metadata.items() if value is not None},
        overwrite=True,  # as the student beside it: a run must not fail at its end for an older run's file
    )
    return delta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, help="YAML file of options, for example training/configs/miniature.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="options that replace those of the file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        config = load_config(args.config, args.overrides)
        run(config)
    except (ConfigError, OSError) as error:
        parser.error(str(error))


def run(config: TrainingConfig) -> None:
    """Everything from the options to the files. Raises ConfigError for data that cannot be used."""
    captions = load_captions(config.train_captions)
    set_seed(config.seed)
    pipe = DiffusionPipeline.from_pretrained(config.pretrained_model_name_or_path, dtype=torch.float32)
    conditions, embeddings, uncond = condition_sampler(pipe, config, captions)
    latents = latent_sampler(pipe, config, embeddings, uncond)
    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    trainer = Trainer(config, teacher_of(pipe), (channels, size, size), conditions, uncond, latents)
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.jsonl").open("w") as log:

        def on_log(step: int, values: dict) -> None:
            log.write(json.dumps({"step": step, **values}) + "\n")
            log.flush()

        network = trainer.train(on_log)
    print(f"delta: {export(config, pipe, network, out)}")


if __name__ == "__main__":
    main()
