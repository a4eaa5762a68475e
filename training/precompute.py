"""Encodes captions and pictures once, so that training needs no text encoder and no autoencoder in memory.

    python training/precompute.py --config training/configs/miniature.yaml train_cache_dir=cache

It reads the options of a training run: the teacher (`pretrained_model_name_or_path`), the source of examples and what
is done to its pictures, `seed`, and `train_cache_dir`, the folder that is written. Training with the same options then
reads from that folder. A run that was killed goes on where it stopped when it is started again.
"""

import perflow_training.quiet  # isort: skip  # first: what follows takes seconds to import

import argparse
import logging
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from perflow_training.config import ConfigError, TrainingConfig, load_config
from perflow_training.data import DataError
from perflow_training.data.cache_writer import write_cache
from perflow_training.data.identity import model_identity
from perflow_training.teacher.encode import picture_size, pipeline_encoders
from perflow_training.teacher.load import hub_options, network_config

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file of options, the one that training is given")
    parser.add_argument("--prompts-only", action="store_true", help="encode no pictures: for data-free training")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of what is stored (default float16)")
    parser.add_argument("--shard-size", type=int, default=512, help="records a file (default 512)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures encoded at once (default 8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="options that replace those of the file")
    args = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    perflow_training.quiet.calm()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        run(load_config(args.config, args.overrides), args)
    except (ConfigError, DataError, OSError) as error:
        parser.error(str(error))


def run(config: TrainingConfig, args: argparse.Namespace) -> None:
    """Everything from the options to the cache. Raises ConfigError or DataError for what cannot be used."""
    if not config.train_cache_dir:
        raise ConfigError("`train_cache_dir` is not set. Give the folder to write, e.g. train_cache_dir=cache.")
    if args.shard_size < 1 or args.batch_size < 1:
        raise ConfigError(f"--shard-size {args.shard_size} and --batch-size {args.batch_size} must be at least 1.")
    name = config.pretrained_model_name_or_path
    try:
        where = hub_options(name, config.revision)
    except ValueError as error:
        raise ConfigError(f"`pretrained_model_name_or_path`: {error}") from error
    part, network = network_config(name, where)  # of the network no more is needed
    pipe = DiffusionPipeline.from_pretrained(
        name, dtype=torch.float32, variant=config.variant, **where, **{part: None}
    )
    options = config.sized(min(picture_size(pipe, network)))
    pipe.to(args.device)
    with tqdm(unit=" examples", disable=None) as bar:

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        manifest = write_cache(
            config.train_cache_dir,
            options,
            pipeline_encoders(pipe, model_identity(name, config.revision), args.device),
            seed=config.seed,
            with_images=not args.prompts_only,
            shard_size=args.shard_size,
            batch_size=args.batch_size,
            dtype=DTYPES[args.dtype],
            progress=progress,
        )
    skipped = ", ".join(f"{count} {kind}" for kind, count in manifest["skipped"].items()) or "none"
    print(f"{config.train_cache_dir}: {manifest['count']} of {manifest['records']} examples, left out: {skipped}")


if __name__ == "__main__":
    main()
