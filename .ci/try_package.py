"""Builds the sdist and, from it alone, the wheel; compares the sdist with git; tries the wheel where no checkout is.

    python .ci/try_package.py [dist]

Run it with the project's own environment: the trial takes torch and the other libraries from there, and nothing is
downloaded. The package itself comes from the wheel.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from email import message_from_string
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    ["perflow", "--version"],
    ["perflow", "info", "miniature"],
    ["perflow", "draw", "a person with red hair"],
    ["perflow", "demo"],
)
DRAWN = ("a-person-with-red-hair.png", "perflow-demo.png")
WHERE = "import perflow_diffusers; print(perflow_diffusers.__file__)"


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """What the command prints; its errors go to the terminal, and end this script."""
    return subprocess.run(command, cwd=cwd, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def build(work: Path) -> tuple[Path, Path]:
    """(sdist, wheel): the sdist from a copy of what git knows, and from nothing else; the wheel from the sdist."""
    copy = work / "copy"
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(work)!r})"
    run(sys.executable, "-c", code, cwd=copy)
    sdist = next(work.glob("*.tar.gz"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", work, sdist, cwd=work)
    return sdist, next(work.glob("*.whl"))


def tracked() -> list[str]:
    """The files of the repository, those that git does not know yet among them; what it ignores is not."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def missing(sdist: Path) -> list[str]:
    """Files that git knows and the sdist does not hold."""
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    return sorted(set(tracked()) - held)


def environment(folder: Path) -> Path:
    """The folder of scripts of a fresh venv, which finds this environment's libraries behind its own."""
    venv.create(folder, with_pip=False)
    paths = {"base": str(folder), "platbase": str(folder)}
    own = Path(sysconfig.get_path("purelib", "venv", paths))
    others = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (own / "libraries.pth").write_text("\n".join(others) + "\n")
    return Path(sysconfig.get_path("scripts", "venv", paths))


def try_wheel(wheel: Path, work: Path) -> None:
    """Installs the wheel into a fresh venv and runs the commands there, in an empty folder."""
    scripts = environment(work / "venv")
    options = ["--quiet", "--no-deps", "--no-index", "--ignore-installed", "--disable-pip-version-check"]
    run(scripts / "python", "-m", "pip", "install", *options, wheel, cwd=work)
    empty = work / "empty"
    empty.mkdir()
    kept = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if name not in kept}
    env["PATH"] = f"{scripts}{os.pathsep}{env['PATH']}"
    found = Path(run(scripts / "python", "-c", WHERE, cwd=empty, env=env).strip())
    if work not in found.parents:
        sys.exit(f"perflow_diffusers was found at {found}, not in the fresh environment {work / 'venv'}.")
    for command in COMMANDS:
        print("$", *command, flush=True)
        print(run(scripts / command[0], *command[1:], cwd=empty, env=env), flush=True)
    lacking = [name for name in DRAWN if not (empty / name).is_file()]
    if lacking:
        sys.exit(f"The commands left no {', '.join(lacking)}.")
    metadata = run(
        scripts / "python",
        "-c",
        "from importlib.metadata import distribution as d; print(d('perflow-diffusers').read_text('METADATA'))",
        cwd=empty,
        env=env,
    )
    said = message_from_string(metadata)
    needed = [line for line in said.get_all("Requires-Dist") or [] if "extra ==" not in line]
    if said["Requires-Python"] != ">=3.11" or len(needed) < 5 or "](docs/" in metadata:
        sys.exit(f"The wheel's metadata are not complete, or have links that lead nowhere:\n{metadata}")


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist").resolve()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name).resolve()
        sdist, wheel = build(work)
        if lacking := missing(sdist):
            sys.exit(f"{sdist.name} lacks {len(lacking)} files; add them to MANIFEST.in: {', '.join(lacking[:20])}")
        try_wheel(wheel, work)
        target.mkdir(parents=True, exist_ok=True)
        for built in (sdist, wheel):
            shutil.copy2(built, target)
            print(f"{target / built.name} ({built.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
