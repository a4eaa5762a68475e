"""Writes the products of a run from one of its checkpoints: student, delta, LoRA, and the artefact to publish.

python training/export_perflow.py runs/miniature/perflow                       # its latest checkpoint
python training/export_perflow.py runs/miniature/perflow/checkpoint-2000 --out exported --form delta lora artifact
"""

import argparse
import json
import logging
from pathlib import Path

from safetensors.torch import load_file

from perflow_training.checkpoint import CONFIG, EMA, STATE, checkpoints
from perflow_training.config import ConfigError, config_of
from perflow_training.product import FORMS, write_products


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's folder, or the run's: then its latest one")
    parser.add_argument("--out", type=Path, help="folder to write to (default: <checkpoint>/export)")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS), help="what to write (default: all)")
    parser.add_argument("--rank", type=int, default=64, help="of the extracted LoRA (default 64)")
    parser.add_argument("--base", help="the teacher's folder or Hub id, if it has moved since the training")
    parser.add_argument("--licence", help="for the artefact's card, for example cc-by-nc-4.0")
    args = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        paths = export(args.checkpoint, args.out, args.form, rank=args.rank, base=args.base, licence=args.licence)
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
    licence: str | None = None,
) -> dict[str, Path]:
    """`write_products` from a checkpoint. Raises ConfigError if there is none."""
    if not (checkpoint / STATE).is_file():
        found = checkpoints(checkpoint)
        if not found:
            raise ConfigError(f"{checkpoint} is no checkpoint and holds none. Give a folder checkpoint-N of a run.")
        checkpoint = found[-1]
    values = json.loads((checkpoint / CONFIG).read_text())
    config = config_of({**values, **({"pretrained_model_name_or_path": base} if base else {})})
    weights = load_file(checkpoint / EMA)
    return write_products(config, weights, out or checkpoint / "export", forms, lora_rank=rank, licence=licence)


if __name__ == "__main__":
    main()
