"""The screenshots of the documents are those that the browser's tests take."""

import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
TESTS = (ROOT / "tests" / "app" / "test_browser.py").read_text()
PICTURES = sorted((ROOT / "docs" / "app").iterdir())


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_screenshot_says_the_test_that_took_it(path):
    with Image.open(path) as picture:
        file, _, test = picture.text["taken by"].partition("::")
        width = picture.width
    body = re.search(rf"^def {test.partition('[')[0]}\(.*?(?=^def |\Z)", TESTS, re.M | re.S)
    assert file == "tests/app/test_browser.py" and body, test
    name = re.escape(path.stem).replace("light", "(light|\\{scheme\\})").replace("dark", "(dark|\\{scheme\\})")
    assert re.search(rf'shot\(page, f?"{name}"\)', body[0])
    assert width == (375 if "phone" in path.stem else 1280)


def test_every_screenshot_is_shown_and_none_is_missing():
    shown = {
        path for page in ROOT.glob("docs/*.md") for path in re.findall(r"\((app/[\w-]+\.png)\)", page.read_text())
    }
    assert shown == {f"app/{path.name}" for path in PICTURES}
