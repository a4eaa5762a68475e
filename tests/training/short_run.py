"""A run of a few small steps of a small LoRA: the options that its tests share, and the run itself."""

from pathlib import Path

import train_perflow
from perflow_diffusers.miniature import miniature_folder
from perflow_training.config import load_config

CAPTIONS = Path(__file__).parents[2] / "training" / "miniature" / "data" / "thumbs-test.parquet"


def options(out, *more):
    """`name=value` words; later ones win."""
    return [
        f"pretrained_model_name_or_path={miniature_folder() / 'avatars'}", f"train_captions={CAPTIONS}",
        f"output_dir={out}", "solve_batch_size=2", "solver_steps=1", "train_batch_size=2", "buffer_size=16", "reuse=2",
        "logging_steps=1", "dataloader_num_workers=0", "lora_rank=2", "lora_target_modules=[to_q]",
        "max_train_steps=3", "product=[student, delta, lora]", *more,
    ]  # fmt: skip


def train(out, *more):
    """The run in this process; returns `out`."""
    train_perflow.run(load_config(None, options(out, *more)))
    return Path(out)
