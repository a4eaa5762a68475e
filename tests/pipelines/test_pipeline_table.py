"""docs/pipelines.md and the suite name the same pipelines, uses and errors."""

import re
from pathlib import Path

import test_pipeline_features
import test_refiner
from cases import CASES, PART, WHOLE
from test_refused_pipelines import REFUSED

TEXT = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()


def rows(heading, page=TEXT):
    """The cells of the rows of all tables under a heading, without the heads."""
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_case_of_the_suite_is_a_row_and_every_row_a_case():
    table = rows("Pipelines that were called")
    assert [row[:2] for row in table] == [[f"`{case.name}`", f"`{case.pipeline}`"] for case in CASES]
    assert {row[2] for row in table} == {"works"}


def test_no_two_rows_have_a_name_in_common():
    names = [case.name for case in CASES] + [refused.name for refused in REFUSED]
    assert len(set(names)) == len(names)


def test_every_use_that_is_tested_is_a_row_and_every_row_is_tested():
    tested = {f"`{n}`" for module in (test_pipeline_features, test_refiner) for n in vars(module) if n[:5] == "test_"}
    listed = [row[-1] for row in rows("Uses that were tried")]
    assert sorted(listed) == sorted(tested)


def test_every_error_is_a_row_and_every_row_an_error():
    table = rows("Pipelines that do not work")
    assert [row[:2] for row in table] == [[f"`{r.name}`", f"`{r.pipeline}`"] for r in REFUSED]
    for row, refused in zip(table, REFUSED, strict=True):
        assert f"`{refused.error.__name__}`" in row[2] or row[2] == "the same"


def test_the_timesteps_in_the_text_are_those_of_the_suite():
    section = TEXT.split("and no others:")[1].split("##")[0]
    for line in section.splitlines()[4:]:
        if line:
            steps, whole, part = (re.findall(r"\b\d{1,4}\b(?![.\d])", cell) for cell in line.strip("|").split("|"))
            n = int(steps[0])
            assert [int(t) for t in whole] == WHOLE[n]
            assert not PART[n] or [int(t) for t in part] == PART[n]
