"""Text that is not UTF-8, or not what its file's ending says: refused by name, or one example left out and counted."""

import io
import json
import logging
import re
import tarfile

import pytest
from tiny_pictures import make_folder, png

from perflow_training.config import ConfigError, load_config
from perflow_training.data import DataError, DataOptions, open_examples

MARK = b"\xef\xbb\xbf"
FIRST, SECOND = "a cat on a chair", "eine schöne Straße"
LINES = f"{FIRST}\n{SECOND}\n"
#: what a file of two lines is in -> the line that is named, what is said of it, and what `iconv` is told
OTHERS = {
    "utf-16": (1, "UTF-16 and not UTF-8", "UTF-16"),
    "utf-16-le": (1, "has null bytes", "UTF-16LE"),
    "utf-32": (1, "UTF-32 and not UTF-8", "UTF-32"),
    "latin-1": (2, "not UTF-8", "LATIN1"),
}


def captions(options: DataOptions, count=2, with_images=False) -> list[str]:
    return sorted(e.caption for e in open_examples(options, seed=0, with_images=with_images).batch(count))


def plain(**options) -> DataOptions:
    return DataOptions(**{"resolution": 16, "dataloader_num_workers": 0, **options})


#: (name, what stands in it) of every file that holds the captions of many examples, and the option that reads it
MANY = {
    "captions.txt": LINES,
    "table.csv": f"caption,size\n{FIRST},1\n{SECOND},2\n",
    "table.jsonl": "".join(json.dumps({"caption": text}, ensure_ascii=False) + "\n" for text in (FIRST, SECOND)),
    "table.json": json.dumps([{"caption": FIRST}, {"caption": SECOND}], ensure_ascii=False),
    "metadata.csv": f"file_name,caption\n000.png,{FIRST}\n001.png,{SECOND}\n",
    "metadata.jsonl": "".join(
        json.dumps({"file_name": f"00{i}.png", "caption": text}, ensure_ascii=False) + "\n"
        for i, text in enumerate((FIRST, SECOND))
    ),
}


def written(tmp_path, name, data: bytes) -> DataOptions:
    """Options that read the file; pictures lie beside metadata."""
    if name.startswith("metadata"):
        (make_folder(tmp_path / "pictures", 2) / "metadata.jsonl").unlink()
        (tmp_path / "pictures" / name).write_bytes(data)
        return plain(train_data_dir=str(tmp_path / "pictures"))
    (tmp_path / name).write_bytes(data)
    return plain(train_captions=str(tmp_path / name))


@pytest.mark.parametrize("name", MANY)
def test_utf_8_is_read_with_a_mark_and_without(tmp_path, name):
    for mark in (b"", MARK):
        assert captions(written(tmp_path, name, mark + MANY[name].encode())) == [FIRST, SECOND]


@pytest.mark.parametrize("encoding", OTHERS)
@pytest.mark.parametrize("name", MANY)
def test_other_encodings_are_refused_with_file_line_and_way_out(tmp_path, name, encoding):
    options = written(tmp_path, name, MANY[name].encode(encoding))
    line, what, told = OTHERS[encoding]
    if encoding == "latin-1" and not name.endswith(("txt", "json")):
        line += name.endswith("csv")
    line = 1 if name.endswith(".json") else line
    with pytest.raises(DataError, match=rf"{re.escape(name)}, line {line}: .*{what}.*iconv -f {told} -t UTF-8"):
        open_examples(options, seed=0, with_images=False)


@pytest.mark.parametrize("encoding", OTHERS)
def test_a_text_file_beside_one_picture_is_left_out_counted_and_named(tmp_path, encoding, caplog):
    """UTF-16 used to be trained on as letters with null bytes between them, Latin-1 with replacement marks."""
    folder = make_folder(tmp_path / "pictures", 5, missing=range(5))
    for number in range(5):
        (folder / f"{number:03d}.txt").write_bytes(MARK + f"caption {number}".encode())
    (folder / "002.txt").write_bytes(SECOND.encode(encoding))
    stream = open_examples(plain(train_data_dir=str(folder)), seed=0, with_images=True)
    with caplog.at_level(logging.WARNING):
        found = [example.caption for example in stream.batch(4)]
    assert sorted(found) == [f"caption {number}" for number in (0, 1, 3, 4)]
    stream.batch(4)
    stream.batch(1)  # of the third epoch
    assert stream.report.unreadable_captions in (2, 3)
    assert stream.report.missing_captions == 0
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1
    assert re.search(rf"002\.png: the text file beside it is .*iconv -f {OTHERS[encoding][2]} -t UTF-8", warnings[0])


def test_mostly_other_encodings_are_an_error_that_says_how_to_convert(tmp_path):
    folder = make_folder(tmp_path / "pictures", 4, missing=range(4))
    for number in range(4):
        (folder / f"{number:03d}.txt").write_bytes(SECOND.encode("latin-1"))
    stream = open_examples(plain(train_data_dir=str(folder)), seed=0, with_images=True)
    with pytest.raises(DataError, match=r"3 x the text file beside it is not UTF-8\. Convert it: iconv -f LATIN1"):
        stream.batch(1)


@pytest.mark.parametrize(
    ("ending", "bad"),
    [
        ("txt", SECOND.encode("utf-16")),
        ("txt", SECOND.encode("latin-1")),
        ("json", json.dumps({"caption": SECOND}, ensure_ascii=False).encode("latin-1")),
        ("json", b'{"caption": '),
        ("json", b'{"caption": {"en": "a cat"}}'),
    ],
)
def test_bad_captions_in_shards_are_left_out_and_counted(tmp_path, ending, bad):
    pytest.importorskip("webdataset")
    good = {"txt": MARK + FIRST.encode(), "json": MARK + json.dumps({"caption": FIRST}).encode()}[ending]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(4):
            for name, data in ((f"{number}.png", png(number)), (f"{number}.{ending}", bad if number == 2 else good)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    stream = open_examples(plain(train_shards=str(tmp_path / "a.tar")), seed=0, with_images=True)
    assert [example.caption for example in stream.batch(3)] == [FIRST] * 3
    stream.batch(3)
    stream.batch(1)  # of the third epoch
    assert stream.report.unreadable_captions in (2, 3)
    assert stream.report.missing_captions == 0
    assert f"its .{ending}" in stream.report.reasons[0][0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "000.png", "caption": "a"}\n{"file_name": ', "line 2 is not JSON"),
        ("metadata.jsonl", '{"file_name": "000.png", "caption": "a"}\n\n["b"]', "line 3 is a JSON list"),
        ("metadata.jsonl", '{"file_name": "000.png", "caption": "a"}\n{"caption": "b"}', "line 2: `file_name=None`"),
        ("metadata.jsonl", '{"file_name": "000.png", "caption": {"en": "a"}}', "line 1: `caption` holds dict"),
        ("metadata.jsonl", '{"file_name": "000.png", "caption": true}', "line 1: `caption` holds bool"),
        (
            "metadata.csv",
            "file_name,caption\n000.png,a cat, on a chair",
            "line 2 has more fields than the heading's 2",
        ),
        ("metadata.csv", 'file_name,caption\n000.png,"a cat\n001.png,b\n', "line 3: unexpected end of data"),
        ("table.jsonl", '{"caption": "a"}\n{"caption": \n', "line 2 is not JSON"),
        ("table.jsonl", '{"caption": "a"}\nb\n', "line 2 is not JSON"),
        ("table.csv", "caption,caption\na,b\n", "line 1: the heading must name each column once"),
        ("table.csv", "caption,size\na,1\na cat, on a chair, 2\n", "could not be opened: .*line 3"),
        ("table.json", '[{"caption": "a"}, ', "could not be opened"),
    ],
)
def test_broken_files_are_refused_with_the_line(tmp_path, name, text, message):
    options = written(tmp_path, name, text.encode())
    with pytest.raises(DataError, match=rf"{re.escape(name)}.*{message}"):
        open_examples(options, seed=0, with_images=False)


def test_words_of_a_csv_file_stay_words(tmp_path):
    """pandas and YAML read these as nothing, truth and numbers."""
    words = ["no", "None", "NA", "null", "nan", "True", "007", "1e5"]
    text = "caption\n" + "\n".join(words) + "\n"
    assert captions(written(tmp_path, "table.csv", text.encode()), len(words)) == sorted(words)


def test_numbers_of_classes_are_their_names(tmp_path):
    import datasets

    kinds = datasets.Features({"label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_dict({"label": [1, 0]}, features=kinds).save_to_disk(tmp_path / "saved")
    options = plain(train_data_dir=str(tmp_path / "saved"), caption_column="label")
    assert captions(options) == ["cat", "dog"]


@pytest.mark.parametrize("encoding", [*OTHERS, "utf-8-sig"])
def test_a_file_of_options_is_utf_8_too(tmp_path, encoding):
    path = tmp_path / "my.yaml"
    path.write_bytes("pretrained_model_name_or_path: a\noutput_dir: Straße\ntrain_captions: b\n".encode(encoding))
    if encoding == "utf-8-sig":
        assert load_config(path).output_dir == "Straße"
        return
    with pytest.raises(ConfigError, match=rf"my\.yaml, line {OTHERS[encoding][0]}: .*iconv"):
        load_config(path)
