"""The example's offline form: a sentence in, a contact sheet of twelve views and a turntable out."""

import runpy
import sys
from pathlib import Path

from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples/text_to_multiview.py"


def test_a_sentence_becomes_twelve_views_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", [str(EXAMPLE), "a person with glasses", "--tiny", "--out", str(tmp_path / "views")]
    )
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    with Image.open(tmp_path / "views.png") as sheet:
        assert sheet.size == (6 * 32, 2 * 32)
        tiles = [sheet.crop((32 * x, 32 * y, 32 * x + 32, 32 * y + 32)).tobytes() for y in (0, 1) for x in range(6)]
    assert len(set(tiles)) == 12
    with Image.open(tmp_path / "views.gif") as turn:
        assert turn.n_frames == 6 and turn.size == (64, 32)
    assert "views.png" in capsys.readouterr().out
