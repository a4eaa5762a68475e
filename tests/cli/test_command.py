"""The command itself: quick to answer, and quiet when it is interrupted while it imports."""

import signal
import subprocess
import sys

import pytest

from perflow_diffusers.cli import app

HEAVY = ("torch", "diffusers", "transformers", "huggingface_hub", "safetensors", "numpy", "PIL")


def run(code, folder):
    words = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {code}"]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=folder)


def test_help_and_completion_import_nothing_heavy(tmp_path):
    code = f"""
import perflow_diffusers, perflow_diffusers.cli
from typer.testing import CliRunner
for words in (["--help"], ["--version"], *([name, "--help"] for name in {[c.name for c in app.registered_commands]})):
    assert CliRunner().invoke(perflow_diffusers.cli.app, words).exit_code == 0, words
print([name for name in {HEAVY} if name in sys.modules])
"""
    done = run(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("perflow ext", ["extract-lora"]),
        ("perflow draw --acc", ["--accelerator"]),
        ("perflow p", ["pull", "push"]),
    ],
)
def test_what_was_begun_is_completed(typed, offered, tmp_path, monkeypatch):
    """As bash asks for it, by the variables that it sets."""
    monkeypatch.setenv("_PERFLOW_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    done = run("sys.argv = ['perflow']; from perflow_diffusers.cli import main; main()", tmp_path)
    assert sorted(done.stdout.split()) == offered and done.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("words", [["demo"], ["draw", "x"], ["info", "x"], ["diff", "a", "b", "c.safetensors"]])
def test_ctrl_c_while_it_imports_is_a_sentence(words, tmp_path):
    """A torch in place of the real one is interrupted in its first line."""
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\nwhile True: pass\n")
    done = run(f"sys.argv = ['perflow', *{words}]; from perflow_diffusers.cli import main; main()", tmp_path)
    assert done.returncode == 130, done.stderr
    assert done.stderr == f"perflow {words[0]}: interrupted; no file was changed.\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_while_it_works_is_a_sentence(tmp_path):
    code = (
        "import os, signal; from perflow_diffusers import demo; from perflow_diffusers.cli import main; "
        "demo.draw_rows = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT) or __import__('time').sleep(30); "
        "sys.argv = ['perflow', 'demo', '--out', 'x.png']; main()"
    )
    done = run(code, tmp_path)
    assert done.returncode == 130 and done.stderr == "perflow demo: interrupted; no file was changed.\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
