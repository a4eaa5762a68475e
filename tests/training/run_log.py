"""Reads what a training run logged."""

import json


def logged(out):
    """The lines of a run's log that hold losses."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]
