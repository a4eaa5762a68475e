"""Every layout of data gives the captions and pictures that were put in, and streams resume inside it."""

import gzip
import io
import json
import re
import tarfile

import datasets
import pytest
import torch
from tiny_pictures import make_folder, numbers, picture, png

from perflow_training.data import DataError, DataOptions, open_examples

COUNT = 7
PLAIN = {"resolution": 16, "dataloader_num_workers": 0, "center_crop": True}


def table(**columns) -> datasets.Dataset:
    """Captions and pictures of 16 x 16 pixels, with the columns asked for."""
    pictures = [{"bytes": png(number, 16, 16), "path": None} for number in range(COUNT)]
    data = {"image": pictures, "caption": [f"caption {number}" for number in range(COUNT)]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    made = datasets.Dataset.from_dict(data, features=features)
    return made.rename_columns(columns) if columns else made


def assert_complete(options, count=COUNT):
    """One epoch holds each caption once, with its own picture's pixels."""
    batch = open_examples(options, seed=0, with_images=True).batch(count)
    assert sorted(numbers(batch)) == list(range(count))
    for example, number in zip(batch, numbers(batch), strict=True):
        stored = torch.frombuffer(bytearray(picture(number, 16, 16).tobytes()), dtype=torch.uint8).view(16, 16, 3)
        assert torch.equal(example.image, stored.permute(2, 0, 1) / 127.5 - 1)


def make_tars(folder, shards=((0, 1, 2), (3, 4), (5, 6))):
    folder.mkdir(exist_ok=True)
    for shard, members in enumerate(shards):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as tar:
            for number in members:
                parts = {"png": png(number, 16, 16), "txt": f"caption {number}\n".encode()}
                if number % 2:  # captions in JSON work as well
                    parts = {"json": json.dumps({"caption": f"caption {number}"}).encode(), "png": parts["png"]}
                for ending, data in parts.items():
                    info = tarfile.TarInfo(f"{number:03d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder / f"part-{{0..{len(shards) - 1}}}.tar")


def test_folder_with_json_lines(tmp_path):
    assert_complete(DataOptions(train_data_dir=str(make_folder(tmp_path / "a", COUNT, ((16, 16),))), **PLAIN))


def test_folder_with_csv_in_a_subfolder_and_text_files_beside_others(tmp_path):
    make_folder(tmp_path / "a" / "b", 4, ((16, 16),))
    (tmp_path / "a" / "b" / "metadata.jsonl").unlink()
    rows = [f'{number:03d}.png,"caption {number}"' for number in range(4)]
    (tmp_path / "a" / "b" / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    for number in range(4, COUNT):
        (tmp_path / "a" / f"{number}.png").write_bytes(png(number, 16, 16))
        (tmp_path / "a" / f"{number}.txt").write_text(f"caption \n {number}\n")
    assert_complete(DataOptions(train_data_dir=str(tmp_path / "a"), **PLAIN))


def test_pictures_that_metadata_name_and_do_not_exist_are_counted(tmp_path):
    folder = make_folder(tmp_path / "a", 5, ((16, 16),))
    (folder / "003.png").unlink()
    stream = open_examples(DataOptions(train_data_dir=str(folder), **PLAIN), seed=0, with_images=True)
    assert sorted(numbers(stream.batch(4))) == [0, 1, 2, 4]
    stream.batch(1)
    assert dict(stream.report.reasons) == {"no such file": stream.report.unreadable}
    assert stream.report.unreadable >= 1


def test_wrong_metadata_columns_are_named(tmp_path):
    folder = make_folder(tmp_path / "a", 1)
    (folder / "metadata.jsonl").write_text('{"file_name": "000.png", "title": "x"}')
    with pytest.raises(DataError, match="columns file_name, title; it needs `file_name` and caption or text"):
        open_examples(DataOptions(train_data_dir=str(folder)), seed=0, with_images=False)
    options = DataOptions(train_data_dir=str(folder), caption_column="title")
    assert open_examples(options, seed=0, with_images=False).batch(1)[0].caption == "x"


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_with_pictures(tmp_path, streaming):
    table().to_parquet(tmp_path / "all.parquet")
    assert_complete(DataOptions(train_captions=str(tmp_path / "all.parquet"), dataset_streaming=streaming, **PLAIN))


def test_saved_dataset_with_other_column_names(tmp_path):
    datasets.DatasetDict({"train": table(image="img", caption="words")}).save_to_disk(tmp_path / "saved")
    options = DataOptions(train_data_dir=str(tmp_path / "saved"), image_column="img", caption_column="words", **PLAIN)
    assert_complete(options)
    with pytest.raises(DataError, match="columns img, words, and no caption or text"):
        open_examples(DataOptions(train_data_dir=str(tmp_path / "saved")), seed=0, with_images=False)
    with pytest.raises(DataError, match="no `image_column=image`"):
        wrong = DataOptions(dataset_name=str(tmp_path / "saved"), caption_column="words", **PLAIN)
        open_examples(wrong, seed=0, with_images=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_named_builder_with_several_files(tmp_path, streaming):
    for shard, rows in enumerate((range(3), range(3, 5), range(5, COUNT))):
        table().select(rows).to_parquet(tmp_path / f"part-{shard}.parquet")
    files = str(tmp_path / "part-*.parquet")
    options = DataOptions(
        dataset_name="parquet", dataset_files=files, dataset_streaming=streaming, shuffle_buffer=2, **PLAIN
    )
    assert_complete(options)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "caption 0\n\n caption 1 \ncaption 2"),
        ("a.csv", "caption,n\ncaption 0,1\ncaption 1,1\ncaption 2,1"),
        ("a.jsonl", "\n".join(json.dumps({"text": f"caption {number}"}) for number in range(3))),
    ],
)
def test_captions_only(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    options = DataOptions(train_captions=str(tmp_path / name))
    assert sorted(numbers(open_examples(options, seed=0, with_images=False).batch(3))) == [0, 1, 2]
    with pytest.raises(DataError, match=r"captions only|no `image_column=image`"):
        open_examples(DataOptions(train_captions=str(tmp_path / name), **PLAIN), seed=0, with_images=True)


def test_one_of_several_captions_is_drawn_for_each_visit(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"caption": ["caption 0", "", "caption 1"]}))
    options = DataOptions(train_captions=str(tmp_path / "a.jsonl"))
    assert set(numbers(open_examples(options, seed=0, with_images=False).batch(20))) == {0, 1}


def test_tar_shards(tmp_path):
    pytest.importorskip("webdataset")
    shards = make_tars(tmp_path)
    assert_complete(DataOptions(train_shards=shards, shuffle_buffer=3, **PLAIN))
    assert_complete(DataOptions(train_shards=f"pipe:cat {shards}", shuffle_buffer=100, **PLAIN))


def test_a_shard_that_cannot_be_read_is_named(tmp_path):
    pytest.importorskip("webdataset")
    make_tars(tmp_path)
    with pytest.raises(DataError, match=r"1 of 4 files are not there, e.g. .*part-3.tar"):
        open_examples(DataOptions(train_shards=str(tmp_path / "part-{0..3}.tar")), seed=0, with_images=False)
    (tmp_path / "part-1.tar").write_bytes(b"no tar")
    for shards in (str(tmp_path / "part-1.tar"), "pipe:cat no-such-file.tar 2>/dev/null"):
        stream = open_examples(DataOptions(train_shards=shards, dataloader_num_workers=0), seed=0, with_images=False)
        with pytest.raises(DataError, match="cannot be read"):
            stream.batch(1)


@pytest.mark.parametrize("form", ["plain", "gz", "pipe"])
@pytest.mark.parametrize("blocks", range(1, 13))
def test_a_shard_that_was_cut_is_never_a_shorter_shard(tmp_path, form, blocks):
    """Cut after each of its 512-byte blocks: one that ends between two files looks whole to `tarfile`."""
    pytest.importorskip("webdataset")
    make_tars(tmp_path)
    whole = (tmp_path / "part-0.tar").read_bytes()
    data = sum(1 for number in range(0, len(whole), 512) if any(whole[number : number + 512]))
    cut = whole[: 512 * blocks]
    if form == "gz":
        cut = gzip.compress(cut)
    (tmp_path / "cut.tar").write_bytes(cut)
    shards = f"pipe:cat {tmp_path / 'cut.tar'}" if form == "pipe" else str(tmp_path / "cut.tar")

    def read():
        return open_examples(DataOptions(train_shards=shards, **PLAIN), seed=0, with_images=True).batch(3)

    if blocks > data:  # the files are whole, and one closing block is there
        assert sorted(numbers(read())) == [0, 1, 2]
    else:
        with pytest.raises(DataError, match=re.escape(str(tmp_path / "cut.tar"))):
            read()


def streamed(kind, tmp_path, **options) -> DataOptions:
    if kind == "tar":
        pytest.importorskip("webdataset")
        return DataOptions(train_shards=make_tars(tmp_path), **{**PLAIN, **options})
    for shard, rows in enumerate((range(3), range(3, 5), range(5, COUNT))):
        if not (tmp_path / f"part-{shard}.parquet").exists():
            table().select(rows).to_parquet(tmp_path / f"part-{shard}.parquet")
    source = {"dataset_name": "parquet", "dataset_files": str(tmp_path / "part-*.parquet"), "dataset_streaming": True}
    return DataOptions(**{**PLAIN, **source, **options})


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("block", [1, 3, 50])
def test_streams_resume_at_every_position(tmp_path, kind, block):
    options = streamed(kind, tmp_path, shuffle_buffer=block)
    stream = open_examples(options, seed=1, with_images=True)
    states, order = [], []
    for _ in range(2 * COUNT + 1):
        states.append(json.loads(json.dumps(stream.state_dict())))
        order += numbers(stream.batch(1))
    assert sorted(order[:COUNT]) == sorted(order[COUNT : 2 * COUNT]) == list(range(COUNT))
    assert order[:COUNT] != order[COUNT : 2 * COUNT] or block == 1
    resumed = open_examples(options, seed=1, with_images=True)
    for position in (9, 0, 4, 7, 14):
        resumed.load_state_dict(states[position])
        assert numbers(resumed.batch(4))[: len(order) - position] == order[position : position + 4]


def test_streams_deal_slices_and_resume_with_buckets_and_threads(tmp_path):
    """What waits for its bucket is read again."""
    options = streamed("tar", tmp_path, shuffle_buffer=3, dataloader_num_workers=2, aspect_buckets=True, bucket_step=8)
    one = open_examples(options, seed=1, with_images=True)
    two = [open_examples(options, seed=1, with_images=True, process_index=i, num_processes=2) for i in (0, 1)]
    for _ in range(5):
        assert numbers(one.batch(4)) == [number for stream in two for number in numbers(stream.batch(2))]
    state = one.state_dict()
    rest = [numbers(one.batch(4)) for _ in range(4)]
    two[0].load_state_dict(state)
    two[1].load_state_dict(state)
    assert [[n for stream in two for n in numbers(stream.batch(2))] for _ in range(4)] == rest
    for stream in (one, *two):
        stream.close()
