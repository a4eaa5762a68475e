"""Pipelines built once a session, without progress bars, and their runs remembered."""

import pytest
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@pytest.fixture(scope="session", autouse=True)
def no_progress_bars():
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
    yield
    for logging in (diffusers_logging, transformers_logging):
        logging.enable_progress_bar()


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """`built(case)`: the pipeline of a case, the same one every time it is asked for, and a folder of its own."""
    pipes = {}

    def build(case):
        if case.name not in pipes:
            folder = tmp_path_factory.mktemp(case.name)
            pipes[case.name] = case.build(folder), folder
        return pipes[case.name]

    return build


@pytest.fixture(scope="session")
def drawn(built):
    """`drawn(case, n)`: the latents of the plain run of n steps, drawn once a session."""
    runs = {}

    def draw(case, n):
        if (case.name, n) not in runs:
            runs[case.name, n] = case.draw(built(case)[0], n)
        return runs[case.name, n]

    return draw
