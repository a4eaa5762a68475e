"""How long it takes to begin: the command line, and importing the package beside importing diffusers.

    python benchmarks/start.py --out benchmarks/results/start.md

Each line is the median of fresh processes, one after the other in turns, so that a busy machine slows all alike.
"""

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

PYTHON = sys.executable
RUN = "; from perflow_diffusers.cli import main; main()"
COMPLETION = {"_PERFLOW_COMPLETE": "complete_bash", "COMP_WORDS": "perflow ext", "COMP_CWORD": "1"}
PIPELINES = "from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline"
CASES = {
    "python alone": ("pass", {}),
    "`perflow --help`": ("import sys; sys.argv = ['perflow', '--help']" + RUN, {}),
    "completion of `perflow ext`": ("import sys; sys.argv = ['perflow']" + RUN, COMPLETION),
    "`import perflow_diffusers`": ("import perflow_diffusers", {}),
    "`import diffusers`": ("import diffusers", {}),
    "diffusers and its SD and SDXL pipelines": (f"import diffusers; {PIPELINES}", {}),
    "the same, and all that this package has": (
        f"import diffusers; {PIPELINES}; import perflow_diffusers as pf; [getattr(pf, n) for n in pf.__all__]", {}
    ),
}  # fmt: skip


def seconds(code: str, variables: dict[str, str]) -> float:
    began = time.perf_counter()
    environment = {**os.environ, **variables}
    subprocess.run([PYTHON, "-W", "ignore", "-c", code], env=environment, capture_output=True, check=False)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="processes a line, after one more (default 5)")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    taken: dict[str, list[float]] = {name: [] for name in CASES}
    for run in range(args.runs + 1):
        for name, case in CASES.items():
            spent = seconds(*case)
            if run:  # the first fills the file system's cache
                taken[name].append(spent)
    rows = [f"| {name} | {statistics.median(all_):.2f} | {min(all_):.2f} |" for name, all_ in taken.items()]
    date = datetime.date.today().isoformat()
    text = "\n".join(
        [
            "# How long it takes to begin",
            "",
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {date}: "
            f"`python benchmarks/start.py`, {args.runs} processes a line, in turns.",
            "",
            "| | median s | least s |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
    print(text)
    if args.out is not None:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
