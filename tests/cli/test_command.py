"""The console script: quick, and quiet when it is interrupted while it imports."""

import signal
import subprocess
import sys
from importlib.metadata import entry_points

import pytest


def run(code, folder=None):
    first = f"import sys; sys.path.insert(0, {str(folder)!r}); " if folder is not None else ""
    return subprocess.run([sys.executable, "-c", first + code], capture_output=True, text=True, timeout=120)


def test_the_module_of_the_script_imports_nothing_heavy():
    done = run("import perflow_command, sys; print([m for m in ('torch', 'diffusers', 'typer') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr
    (script,) = entry_points(group="console_scripts", name="perflow")
    assert script.value == "perflow_command:main"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_while_it_imports_ends_it_without_a_traceback(tmp_path):
    """A package in place of ours is interrupted in its first line, as a user's Ctrl-C would hit torch's."""
    package = tmp_path / "perflow_diffusers"
    package.mkdir()
    (package / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\n")
    (package / "cli.py").write_text("main = lambda: print('went on')\n")
    done = run("import perflow_command; perflow_command.main()", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
    ignored = run("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import perflow_command; "
                  "perflow_command.main()", tmp_path)  # as under nohup  # fmt: skip
    assert (ignored.returncode, ignored.stdout, ignored.stderr) == (0, "went on\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_while_it_works_is_a_sentence(tmp_path):
    code = (
        "import os, signal; from perflow_diffusers import demo; "
        "demo.draw_rows = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT) or __import__('time').sleep(30); "
        "import perflow_command, sys; sys.argv = ['perflow', 'demo', '--out', 'x.png']; perflow_command.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 130 and done.stderr == "perflow demo: interrupted; no file was changed.\n"
