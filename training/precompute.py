"""Encodes captions and pictures once, so that training needs no text encoder and no autoencoder in memory.

    python training/precompute.py --config training/configs/miniature.yaml train_cache_dir=cache
    python training/precompute.py --config training/configs/miniature-flow.yaml train_cache_dir=cache --trajectories 64

It reads the options of a training run: the teacher (`pretrained_model_name_or_path`), the source of examples and what
is done to its pictures, `seed`, and `train_cache_dir`, the folder that is written. Training with the same options then
reads from that folder. A run that was killed goes on where it stopped when it is started again.
"""

import perflow_training.quiet  # isort: skip  # first: what follows takes seconds to import

import argparse
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from perflow_training.config import ConfigError, TrainingConfig, load_config
from perflow_training.data import DataError
from perflow_training.data.cache_writer import write_cache
from perflow_training.data.identity import model_identity
from perflow_training.recipe import completed, watched
from perflow_training.rng import Draws
from perflow_training.solves import PipelineSolves
from perflow_training.student import DTYPES as PRECISIONS
from perflow_training.teacher.encode import picture_size, pipeline_encoders
from perflow_training.teacher.load import hub_options, load_pipeline, network_config
from perflow_training.teacher.observed import is_flow
from perflow_training.trajectories import write_trajectories

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file of options, the one that training is given")
    parser.add_argument("--prompts-only", action="store_true", help="encode no pictures: for data-free training")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of what is stored (default float16)")
    parser.add_argument(
        "--trajectories", type=int, metavar="N",
        help="of a flow-matching base: N batches of its own trajectories instead, for training without a teacher",
    )  # fmt: skip
    parser.add_argument("--part", default="0/1", help="with --trajectories: i/n, one of n processes (default 0/1)")
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
    if args.trajectories is not None:
        return trajectories(config, args)
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


def trajectories(config: TrainingConfig, args: argparse.Namespace) -> None:
    """The teacher's trajectories instead: the same, whichever part of them which process makes."""
    match = re.fullmatch(r"(\d+)/(\d+)", args.part)
    part = (int(match[1]), int(match[2])) if match else (1, 0)
    if args.trajectories < 1 or not part[0] < part[1]:
        raise ConfigError(
            f"--trajectories {args.trajectories} must be at least 1, and --part {args.part} be i/n, i < n."
        )
    pipe: Any = load_pipeline(replace(config, train_cache_dir=""))
    config = completed(config, pipe)
    if not is_flow(pipe):
        raise ConfigError(
            f"--trajectories is for flow-matching bases, and {type(pipe).__name__}'s is a diffusion: leave it out to "
            "cache captions and pictures."
        )
    pipe.to(args.device, PRECISIONS[config.mixed_precision or "no"])
    config, observed, windows = watched(config, pipe)
    solves = PipelineSolves(observed, config, windows, Draws(config.seed), torch.device(args.device))
    try:
        with tqdm(total=args.trajectories, unit=" batches", disable=None) as bar:
            count = write_trajectories(
                Path(config.train_cache_dir), solves, config, args.trajectories, part, DTYPES[args.dtype],
                lambda done: bar.update(done - bar.n),
            )  # fmt: skip
    finally:
        solves.close()
    print(
        f"{config.train_cache_dir}: {count} of {args.trajectories} batches of {config.solve_batch_size} trajectories"
    )


if __name__ == "__main__":
    main()
