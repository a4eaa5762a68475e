"""What the README promises runs, word for word."""

import re
from pathlib import Path

from PIL import Image

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_laptop_snippet_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "load_miniature" in code)
    exec(compile(snippet, "README.md", "exec"), {})
    with Image.open("four-steps.png") as picture:
        assert picture.size == (256, 256)


def test_both_commands_are_in_the_first_lines_and_in_the_makefile():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for command in ("demo", "test"):
        assert f"make {command}" in "\n".join(README.splitlines()[:10])
        assert re.search(rf"^{command}:", makefile, re.M)


def test_every_file_the_readme_links_to_exists():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / link).exists(), link
