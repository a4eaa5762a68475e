"""The help of every command, as it stands in a terminal of 80 columns; its examples, as a shell reads them."""

import re
import shlex
import subprocess

import pytest
import typer
from typer.testing import CliRunner

from perflow_diffusers.cli import app
from perflow_diffusers.cli.help import help_of
from perflow_diffusers.weights.make.extract import DEFAULT_RANK

COMMAND = typer.main.get_command(app)
NAMES = sorted(COMMAND.commands)


def help_text(*words):
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"}, prog_name="perflow")
    assert result.exit_code == 0, result.output
    return result.output


def examples(name):
    """The block below "Examples:", as it would be copied."""
    block = re.search(r"^  Examples?:\n\n(.*?)\n\n", help_text(name), re.M | re.S)
    assert block, f"{name} has no example"
    return block[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_example_can_be_copied_into_a_shell(name):
    """bash says which words each of them has, and the command's own parser takes them."""
    script = 'perflow() { printf "%q " "$@"; echo; }\n' + examples(name)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and done.stderr == ""
    calls = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(calls) == len(re.findall(r"^ *perflow ", examples(name), re.M)) >= 1
    for first, *words in calls:
        assert first == name
        COMMAND.commands[name].make_context(name, words)  # an error of usage if it does not fit


@pytest.mark.parametrize("name", ["", *NAMES])
def test_no_line_is_wider_than_the_terminal_and_no_name_is_cut(name):
    text = help_text(*filter(None, [name]))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text and "..." not in text.replace("]...", "").replace("}...", "")
    command = COMMAND.commands[name] if name else COMMAND
    for parameter in command.params:
        for option in parameter.opts if parameter.param_type_name == "option" else ():
            assert re.search(rf"(^|[ ,/]){re.escape(option)}([ ,]|$)", text, re.M), option


def test_what_stands_in_brackets_is_not_taken_for_markup():
    assert '"perflow-diffusers[app]"' in help_text("app")


def test_the_names_in_the_prose_are_those_of_the_usage_line():
    assert "diff [OPTIONS]" in help_text("diff")
    for name in ("diff", "merge", "convert", "extract-lora", "combine", "pull", "info"):
        usage, text = help_text(name).split("\n\n", 1)
        for word in re.findall(r"\b(?:BASE|TUNED|DELTA|OUT|SOURCE|SOURCES|FOLDER)\b", text):
            assert word in usage


def test_the_default_rank_is_the_librarys():
    assert f"default: {DEFAULT_RANK}" in " ".join(help_text("extract-lora").split())


def test_long_examples_are_broken_before_an_option_and_never_inside_quotes():
    def command():
        """Do.

        Prose that is
        wrapped.

        Examples:

            perflow x

            perflow x "a quoted argument that is rather long, and then some" --value 'of two words' --more and-more
        """

    assert help_of(command).split("\n\n") == [
        "Do.",
        "Prose that is\nwrapped.",
        "Examples:",
        "\b\n  perflow x\n"
        '  perflow x "a quoted argument that is rather long, and then some" \\\n'
        "      --value 'of two words' --more and-more",
    ]


def test_both_spellings_of_the_licence(tmp_path):
    for spelling in ("--licence", "--license"):
        context = COMMAND.commands["push"].make_context("push", ["folder", "me/x", spelling, "mit"])
        assert context.params["license"] == "mit"
