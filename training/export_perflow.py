"""Writes the products of a run from one of its checkpoints: student, delta, LoRA, and the artefact to publish.

python training/export_perflow.py runs/miniature/perflow                       # its latest checkpoint
python training/export_perflow.py runs/miniature/perflow/checkpoint-2000 --out exported --form delta lora artifact
"""

import perflow_training.quiet  # isort: skip  # first: what follows takes seconds to import

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path

from perflow_training.checkpoint import CONFIG, EMA
from perflow_training.config import FORMS, ConfigError, TrainingConfig, config_of
from perflow_training.export import open_base, write_products
from perflow_training.lazy import read_afresh
from perflow_training.places import url_problem
from perflow_training.run_folder import STATE, checked, checkpoints, is_checkpoint, newest_good
from perflow_training.teacher.base import Base


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's folder, or the run's: then its newest good one")
    parser.add_argument("--out", type=Path, help="folder to write to (default: <checkpoint>/export)")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS), help="what to write (default: all)")
    parser.add_argument("--rank", type=int, default=64, help="of the extracted LoRA (default 64)")
    parser.add_argument("--base", help="the teacher's folder or Hub id, if it has moved since the training")
    parser.add_argument("--license", "--licence", help="for the artefact's card, for example cc-by-nc-4.0")
    args = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    perflow_training.quiet.calm()
    try:
        paths = export(args.checkpoint, args.out, args.form, rank=args.rank, base=args.base, license=args.license)
    except (ConfigError, OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(f"{form}: {path}" for form, path in paths.items()))


def export(
    checkpoint: Path,
    out: Path | None = None,
    forms: list[str] | tuple[str, ...] = FORMS,
    *,
    rank: int = 64,
    base: str | None = None,
    license: str | None = None,
) -> dict[str, Path]:
    """`write_products` from a checkpoint, or from a run's newest undamaged one.

    Raises ConfigError if there is none, for a damaged one, and for URLs.
    """
    problem = url_problem({"checkpoint": checkpoint, "--out": out, "--base": base})
    if problem:
        raise ConfigError(problem)
    if is_checkpoint(checkpoint):
        checkpoint = checked(checkpoint)
    else:
        found = checkpoints(checkpoint)
        if not found:
            raise ConfigError(f"{checkpoint} is no checkpoint and holds none. Give a folder checkpoint-N of a run.")
        good = newest_good(found)
        if good is None:
            raise ConfigError(f"All checkpoints in {checkpoint} are damaged: {', '.join(p.name for p in found)}.")
        checkpoint = good
    values = json.loads((checkpoint / CONFIG).read_text())
    config = config_of({**values, **({"pretrained_model_name_or_path": base} if base else {})})
    weights = read_afresh(checkpoint / EMA)
    teacher = open_base(config) if base else _teacher(config, checkpoint)
    return write_products(
        config, weights, out or checkpoint / "export", forms, lora_rank=rank, license=license, base=teacher
    )


def _teacher(config: TrainingConfig, checkpoint: Path) -> Base:
    """The one that was trained with: from the folder of then, else the same commit of the Hub."""
    folder = json.loads((checkpoint / STATE).read_text()).get("base_folder")
    if folder and Path(folder).parent.name == "snapshots" and not Path(config.pretrained_model_name_or_path).is_dir():
        config = replace(config, revision=Path(folder).name)
    return open_base(config, folder)


if __name__ == "__main__":
    main()
