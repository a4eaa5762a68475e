"""What a person sees who types a name at a prompt or in a notebook: a few lines, and tables with values escaped."""

import copy
import functools
import importlib
import inspect
import json
import pickle
import pkgutil
import re
from dataclasses import fields, is_dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from diffusers.utils import BaseOutput

import perflow_diffusers as pf
import perflow_training
from perflow_diffusers import flow, hub, weights
from perflow_diffusers.words.shown import LongDict, LongTuple, html_table

LINES, WIDTH = 10, 100
# Types of which a field may hold any number, or a network.
ENDLESS = re.compile(r"Mapping|dict\[|list\[|\.\.\.\]|Tensor|Module|WeightSource|Any\b")


def short(text):
    lines = text.splitlines()
    return len(lines) <= LINES and max(map(len, lines), default=0) <= WIDTH


@pytest.fixture(scope="module")
def returned(tmp_path_factory):
    """What every public function returns on the miniature, by the call's name."""
    folder = tmp_path_factory.mktemp("a-folder-of-a-rather-long-name-as-people-have-them-in-their-home-folders")
    pipe, disco = pf.load_miniature(), pf.load_miniature("disco")
    pipe.set_progress_bar_config(disable=True)
    found = {
        "open_weights": pf.open_weights("miniature"),
        "open_weights of a LoRA": pf.open_weights("miniature-lora"),
        "open_weights of a model": pf.open_weights(pipe),
        "as_delta": weights.as_delta(pf.open_weights("miniature-lora")),
        "plan_merge": weights.plan_merge(pipe, "miniature"),
        "compute_delta": pf.compute_delta(pipe, disco),
        "compute_delta to a file": pf.compute_delta(pipe, disco, folder / "delta.safetensors"),
        "content_hash": weights.content_hash(pipe),
        "measure_moments": pf.measure_moments(
            pipe, lambda: pipe("a person", num_inference_steps=1, output_type="latent")
        ),
        "extract_lora": pf.extract_lora("miniature", folder / "lora", rank=2),
        "shrink_delta": pf.shrink_delta("miniature", folder / "int8.safetensors", "int8"),
        "combine": pf.combine(["miniature-lora", "miniature-lora"], folder / "both.safetensors", [1, 0.5]),
        "merge_files": weights.merge_files(pipe, "miniature", folder / "merged.safetensors"),
        "describe_weights": weights.describe_weights("miniature-lora"),
        "describe": hub.describe("miniature"),
        "describe of a LoRA": hub.describe("miniature-lora"),
        "a place on the Hub": weights.SHORT_NAMES["perflow-sd15-delta"],
        "windows": flow.Windows.uniform(8),
        "a noise path": flow.NoisePath.straight(500),
    }
    handle = pf.merge_delta(pipe, "miniature", {"down": 0.8, "mid": 1, "up": {"block_0": 0.4}})
    found["merge_delta"], found["its report"], found["its plan"] = handle, handle.report, handle.plan
    handle.undo()
    found["load_perflow"] = pf.load_perflow(pipe, "miniature")
    found["its state"] = hub.state.loaded(pipe)
    pf.unload_perflow(pipe)
    found["save"] = found["load_perflow"].save(folder / "artefact", base=pipe)
    return found


def test_everything_that_a_call_returns_fits_ten_lines_of_a_hundred_characters(returned):
    long = {name: repr(thing) for name, thing in returned.items() if not short(repr(thing))}
    assert not long
    assert all(repr(thing) for thing in returned.values())


def test_so_does_every_public_attribute_of_it(returned):
    seen = 0
    for name, thing in returned.items():
        known = dir(type(thing)) if is_dataclass(thing) else ()
        names = {one for one in known if isinstance(getattr(type(thing), one), property | functools.cached_property)}
        names |= {field.name for field in fields(thing)} if is_dataclass(thing) else set()
        for attribute in names:
            value = getattr(thing, attribute) if attribute != "lora_file" else None  # raises where there is none
            as_others_show_it = callable(value) or isinstance(value, Path | str | torch.Tensor)
            if not attribute.startswith("_") and not as_others_show_it and not hasattr(value, "save_pretrained"):
                seen += 1
                assert short(repr(value)), (name, attribute)
        if hasattr(thing, "to_dict"):
            assert short(repr(thing.to_dict())), name
            assert json.loads(json.dumps(thing.to_dict()))
    assert seen > 100


def test_what_is_shown_says_what_it_is_and_how_much(returned):
    count = len(pf.load_miniature().unet.state_dict())
    numbers = sum(weight.numel() for weight in pf.load_miniature().unet.state_dict().values())
    said = repr(returned["open_weights"])
    assert "miniature: delta" in said and f"{count} tensors, {numbers / 1e6:.2f} M numbers" in said
    assert f"{2 * numbers / 1e6:.2f} MB in float16" in said
    assert f"miniature changes {count} weights" in repr(returned["plan_merge"])
    assert f"of {count}" not in repr(returned["measure_moments"]) and " more}" in repr(returned["measure_moments"])


def test_windows_show_their_ends_however_many_they_are():
    assert repr(flow.Windows.uniform(4)) == "Windows(4: 1000 > 750 > 500 > 250 > 0)"
    many = repr(flow.Windows.uniform(500))
    assert short(many) and many.startswith("Windows(500: 1000 > 998 > ") and many.endswith(" > 4 > 2 > 0)")


def modules():
    for package in (pf, perflow_training):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            try:
                yield importlib.import_module(found.name)
            except ImportError:  # an extra that is not here
                continue


def test_no_dataclass_of_either_package_shows_all_that_it_holds():
    endless = {
        kind
        for module in modules()
        for name, kind in inspect.getmembers(module, is_dataclass)
        if inspect.isclass(kind)
        and kind.__module__.startswith("perflow")
        and not name.startswith("_")
        and not issubclass(kind, BaseOutput)  # as diffusers shows its outputs
        and any(ENDLESS.search(str(field.type)) for field in fields(kind) if field.repr)
    }
    assert len(endless) > 20
    assert not [kind for kind in endless if hasattr(kind.__repr__, "__wrapped__")]  # what @dataclass would make


def test_long_dicts_and_tuples_are_dicts_and_tuples_in_all_but_their_looks():
    plain = {f"down_blocks.{i}.weight": torch.zeros(3) for i in range(300)}
    long = LongDict(plain)
    assert long == plain and isinstance(long, dict) and short(repr(long))
    assert repr(long).startswith("{'down_blocks.0.weight': <tensor (3,) float32>") and repr(long).endswith("more}")
    assert int(re.search(r"(\d+) more", repr(long))[1]) + repr(long).count("<tensor") == 300
    assert list(pickle.loads(pickle.dumps(long))) == list(copy.deepcopy(long)) == list(plain)
    assert json.dumps(LongDict(a=1)) == '{"a": 1}' and repr(LongDict(a=1)) == "{'a': 1}" and repr(LongDict()) == "{}"
    fixed = pf.open_weights("miniature").shapes
    assert fixed == dict(fixed) and pickle.loads(pickle.dumps(fixed)) == copy.deepcopy(fixed) == fixed
    for change in (lambda: fixed.update(a=1), lambda: fixed.pop("conv_in.bias"), fixed.clear, fixed.popitem):
        with pytest.raises(TypeError, match="read-only"):
            change()
    with pytest.raises(TypeError):
        fixed["conv_in.bias"] = ()
    names = LongTuple(plain)
    assert names == tuple(plain) and hash(names) == hash(tuple(plain)) and short(repr(names))
    assert repr(LongTuple("a")) == "('a',)" and repr(LongTuple()) == "()" and repr(LongTuple((1, 2))) == "(1, 2)"


class Cells(HTMLParser):
    """Texts of a table's cells, row by row; raises for tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.open, self.texts, self.sides = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.sides.append([])
        if tag in ("td", "th"):
            self.sides[-1].append(dict(attrs)["style"].removeprefix("text-align:"))
        assert not any("color" in str(value) or "background" in str(value) for _, value in attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        self.texts.append(data)


def test_tables_for_notebooks_count_the_layers_of_each_block(returned):
    state = pf.load_miniature().unet.state_dict()
    for name in ("open_weights", "plan_merge", "shrink_delta", "extract_lora", "compute_delta"):
        rows = Cells(returned[name]._repr_html_()).rows[1:]
        assert "mid_block" in [row[0] for row in rows], name
        if name != "extract_lora":
            assert sum(int(row[1]) for row in rows) == len(state)
    for name in ("describe", "describe_weights", "load_perflow"):
        assert len(Cells(returned[name]._repr_html_()).rows) > 3


def test_the_table_of_an_extraction_has_the_errors_of_its_layers(returned):
    report = returned["extract_lora"]
    row = next(row for row in Cells(report._repr_html_()).rows if row[0] == "conv_in")
    layer = next(layer for layer in report.layers if layer.name == "conv_in.weight")
    assert row[1:4] == ["1", "2", f"{layer.relative_error:.4f}"]


def test_numbers_of_a_column_end_below_each_other_and_words_begin_so(returned):
    """Their heads, too; and the places behind the decimal point are as many in all rows."""
    seen = 0
    for thing in returned.values():
        if not hasattr(thing, "_repr_html_"):
            continue
        read = Cells(thing._repr_html_())
        assert "<caption" not in thing._repr_html_()  # notebooks make it as narrow as the table
        for width in {len(row) for row in read.rows} - {2}:
            table = [(row, sides) for row, sides in zip(read.rows, read.sides, strict=True) if len(row) == width]
            for place in range(width):
                cells = [row[place] for row, _ in table[1:]]
                are_numbers = all(re.fullmatch(r"[\d.,e+-]+( [KMG]i?B)?", cell) for cell in cells)
                assert {sides[place] for _, sides in table} == {"right" if are_numbers else "left"}, cells
                if are_numbers:
                    seen += 1
                    assert len({len(cell.split()[0].partition(".")[2]) for cell in cells}) == 1, cells
    assert seen > 10


def test_values_of_tables_are_escaped():
    hostile = "<script>alert(1)</script>"
    text = html_table(hostile, (hostile, "b"), [(hostile, 1)])
    assert "<script" not in text and Cells(text).texts.count(hostile) == 3
    artifact = pf.PeRFlowArtifact("ddim_eps", base_model=hostile, licence=hostile, name=hostile)
    info = hub.ArtifactInfo(hostile, artifact, {hostile: 1}, hostile, hostile)
    assert "<script" not in artifact._repr_html_() + info._repr_html_()
    assert "<script" not in pf.open_weights({hostile: torch.zeros(1)})._repr_html_()
    assert Cells(html_table("", ("n",), [(i,) for i in range(100)])).texts[-1] == "... 60 more"
