"""Trains and embeds everything: autoencoder, base pipeline, second checkpoint, accelerator, classifier.

python training/miniature/make_miniature.py              # all of it, about two hours on two cores
python training/miniature/make_miniature.py --only disco perflow
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNS = ROOT / "runs" / "miniature"

#: stage -> its commands, in order
STAGES = {
    "classifier": [[HERE / "attributes.py", "--epochs", 6]],
    "vae": [
        [HERE / "train_autoencoder.py", "--steps", 1900, "--out", RUNS / "vae-first"],
        [HERE / "train_autoencoder.py", "--steps", 1500, "--learning-rate", 1.5e-3, "--seed", 1,
         "--init", RUNS / "vae-first", "--out", RUNS / "vae"],
    ],
    "base": [
        [HERE / "train_base.py", "--vae", RUNS / "vae", "--steps", 10000, "--out", RUNS / "base"],
        [HERE / "export_assets.py", "--base", RUNS / "base"],
    ],
    "flow": [
        [HERE / "train_base.py", "--process", "flow", "--vae", RUNS / "vae", "--steps", 4500, "--out", RUNS / "flow"],
        [HERE / "export_assets.py", "--flow", RUNS / "flow"],
    ],
    "disco": [
        [HERE / "train_base.py", "--init", RUNS / "base", "--style", "disco", "--steps", 900,
         "--learning-rate", 3e-4, "--out", RUNS / "disco"],
        [HERE / "export_assets.py", "--disco", RUNS / "disco"],
    ],
    "perflow": [
        [ROOT / "training" / "train_perflow.py", "--config", ROOT / "training" / "configs" / "miniature.yaml"],
        [HERE / "export_assets.py", "--delta", RUNS / "perflow" / "perflow.safetensors"],
    ],
    "perflow-flow": [
        [HERE / "export_assets.py", "--whole-flow", RUNS / "flow-fp16"],
        [ROOT / "training" / "train_perflow.py", "--config", ROOT / "training" / "configs" / "miniature-flow.yaml"],
        [HERE / "export_assets.py", "--flow-delta", RUNS / "perflow-flow" / "perflow.safetensors"],
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=tuple(STAGES), help="run these stages, in the order of the recipe"
    )
    args = parser.parse_args()
    for stage, commands in STAGES.items():
        if args.only and stage not in args.only:
            continue
        if (
            stage.startswith("perflow") and (RUNS / stage).exists()
        ):  # its base has been trained anew: no run to go on with
            print(f"[{stage}] deletes the former run in {RUNS / stage}", flush=True)
            shutil.rmtree(RUNS / stage)
        began = time.time()
        for command in commands:
            print(f"[{stage}] {' '.join(Path(str(word)).name for word in command[:1])}", flush=True)
            subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)
        print(f"[{stage}] {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
