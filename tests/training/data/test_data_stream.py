"""The order of examples: complete, reproducible, sliced between processes, and exactly resumable."""

import json
import logging
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pictures import make_folder, numbers, picture

from perflow_training.data import DataError, DataOptions, open_examples
from perflow_training.data.order import permutation
from perflow_training.teacher.conditions import time_ids

SHAPES = ((20, 24), (16, 40), (40, 16))
BUCKETS = {"resolution": 32, "aspect_buckets": True, "bucket_step": 8, "bucket_max_ratio": 3.0}


def same(one, other) -> bool:
    return all(
        a.caption == b.caption
        and torch.equal(a.image, b.image)
        and (a.original_size, a.crop_top_left, a.target_size) == (b.original_size, b.crop_top_left, b.target_size)
        for a, b in zip(one, other, strict=True)
    )


def test_each_epoch_has_every_example_once_in_an_order_of_its_own(folder_options):
    stream = open_examples(folder_options(11), seed=3, with_images=True)
    epochs = [numbers(stream.batch(11)) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(11))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = open_examples(folder_options(11), seed=3, with_images=True)
    assert numbers(again.batch(33)) == [number for epoch in epochs for number in epoch]
    assert numbers(open_examples(folder_options(11), seed=4, with_images=True).batch(11)) != epochs[0]


def test_the_numbers_of_threads_changes_nothing(folder_options):
    options = {"sizes": SHAPES, "random_flip": True, **BUCKETS}
    inline, threaded = (
        open_examples(folder_options(13, dataloader_num_workers=workers, **options), seed=1, with_images=True)
        for workers in (0, 3)
    )
    for count in (2, 3, 3, 1, 4):
        assert same(inline.batch(count), threaded.batch(count))
    assert inline.state_dict() == threaded.state_dict()
    threaded.close()


@pytest.mark.parametrize("buckets", [False, True])
def test_slices_of_two_processes_make_up_the_batch_of_one(folder_options, buckets):
    options = folder_options(13, sizes=SHAPES, corrupt=(4,), **(BUCKETS if buckets else {}))
    one = open_examples(options, seed=5, with_images=True)
    two = [open_examples(options, seed=5, with_images=True, process_index=i, num_processes=2) for i in (0, 1)]
    for _ in range(8):
        assert same(one.batch(4), [example for stream in two for example in stream.batch(2)])
        assert one.state_dict() == two[0].state_dict() == two[1].state_dict()


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5, 8])
def test_resumed_at_any_batch_the_rest_is_the_same(folder_options, stop):
    options = folder_options(10, sizes=SHAPES, random_flip=True, **BUCKETS)
    stream = open_examples(options, seed=2, with_images=True)
    for _ in range(stop):
        stream.batch(3)
    state = json.loads(json.dumps(stream.state_dict()))
    rest = [stream.batch(3) for _ in range(5)]
    resumed = open_examples(options, seed=2, with_images=True)
    resumed.batch(2)
    resumed.load_state_dict(state)
    assert all(same(batch, resumed.batch(3)) for batch in rest)


def test_a_position_of_other_data_is_refused(folder_options):
    state = open_examples(folder_options(4), seed=0, with_images=True).state_dict()
    with pytest.raises(DataError, match="belongs to 4 examples, the data now have 6"):
        open_examples(folder_options(6), seed=0, with_images=True).load_state_dict(state)


def test_batches_of_buckets_have_one_size_and_lose_nothing(folder_options):
    """Wide, tall and nearly square pictures; those that wait for a full batch come in a later epoch."""
    stream = open_examples(folder_options(15, sizes=SHAPES, **BUCKETS), seed=0, with_images=True)
    seen = Counter()
    for _ in range(40):
        batch = stream.batch(4)
        sizes = {example.target_size for example in batch}
        assert len(sizes) == 1
        assert all(tuple(example.image.shape[1:]) in sizes for example in batch)
        seen.update(numbers(batch))
        for example, number in zip(batch, numbers(batch), strict=True):
            assert example.target_size == {0: (32, 32), 1: (16, 48), 2: (48, 16)}[number % 3]
    waiting = len(stream.state_dict()["waiting"])
    assert set(seen) == set(range(15))
    assert sum(seen.values()) + waiting == 15 * stream.report.epoch + stream.state_dict()["position"][1]
    assert max(seen.values()) - min(seen.values()) <= 2


def test_examples_say_how_they_were_cropped(folder_options):
    """The pixels are those of Pillow at the stated corner; SDXL's six numbers stand in its order."""
    stream = open_examples(folder_options(6, sizes=((20, 50),), random_flip=True), seed=0, with_images=True)
    mirrored = 0
    for example, number in [(example, numbers([example])[0]) for example in stream.batch(12)]:
        top, left = example.crop_top_left
        resized = picture(number, 20, 50).resize((40, 16), Image.Resampling.LANCZOS)
        plain, flipped = (
            torch.from_numpy(np.array(image.crop((left, top, left + 16, top + 16)))).permute(2, 0, 1) / 127.5 - 1
            for image in (resized, resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        )
        mirrored += torch.equal(example.image, flipped)
        assert torch.equal(example.image, plain) != torch.equal(example.image, flipped)
        assert time_ids([example.sizes]).tolist() == [[20, 50, 0, left, 16, 16]]
    assert 1 <= mirrored <= 11


def test_the_centre_crop_is_in_the_centre(folder_options):
    stream = open_examples(folder_options(3, sizes=((20, 50),), center_crop=True), seed=0, with_images=True)
    assert [example.crop_top_left for example in stream.batch(3)] == [(0, 12)] * 3


def test_crops_are_new_in_each_epoch(folder_options):
    stream = open_examples(folder_options(1, sizes=((16, 400),)), seed=0, with_images=True)
    assert len({example.crop_top_left for example in stream.batch(8)}) >= 7


def test_corrupt_pictures_and_missing_captions_are_counted_and_left_out(folder_options, caplog):
    options = folder_options(20, missing=(3, 7), corrupt=(0, 5, 11))
    stream = open_examples(options, seed=0, with_images=True)
    with caplog.at_level(logging.INFO):
        first = numbers(stream.batch(15))
        assert sorted(first) == sorted(set(range(20)) - {0, 3, 5, 7, 11})
        stream.batch(15)
        stream.batch(15)
    report = stream.report
    # The third epoch's failures are met up to where its last example was drawn.
    assert (report.used, report.broken) == (45, 0)
    assert 4 <= report.missing_captions <= 6
    assert 6 <= report.unreadable <= 9
    assert dict(report.reasons) == {"no caption": report.missing_captions, "no picture": report.unreadable}
    messages = [record.message for record in caplog.records if "first epoch" in record.message]
    assert len(messages) == 1
    assert "missing captions" in messages[0]


@pytest.mark.parametrize(("least", "left"), [(16, {0, 3, 4}), (2, {0, 2, 3, 4}), (1, {0, 1, 2, 3, 4})])
def test_pictures_below_a_size_are_counted_and_left_out(folder_options, caplog, least, left):
    """A tracking pixel, a rule between paragraphs, one just large enough, and larger ones; upright sizes count."""
    sizes = ((20, 24), (1, 1), (2, 300), (16, 17), (40, 30))
    stream = open_examples(folder_options(5, sizes=sizes, min_image_size=least), seed=0, with_images=True)
    with caplog.at_level(logging.INFO):
        assert set(numbers(stream.batch(len(left)))) == left
        stream.batch(len(left))
        stream.batch(1)  # of the third epoch
    assert 2 * (5 - len(left)) <= stream.report.too_small <= 3 * (5 - len(left))
    assert dict(stream.report.reasons) == (
        {f"its shorter side is below `min_image_size={least}`": stream.report.too_small} if len(left) < 5 else {}
    )


def test_counts_of_one_epoch_are_exact(folder_options):
    """Up to the first example of the second epoch, whose own failures (in its order before it) are known."""
    options = folder_options(20, missing=(3, 7), corrupt=(0, 5, 11))
    stream = open_examples(options, seed=0, with_images=True)
    stream.batch(15)
    second = permutation(0, 1, 20).tolist()
    stream.batch(1)
    before = next(place for place, number in enumerate(second) if number not in (0, 3, 5, 7, 11))
    extra = second[:before]
    report = stream.report
    assert report.missing_captions == 2 + sum(number in (3, 7) for number in extra)
    assert report.corrupt == report.unreadable == 3 + sum(number in (0, 5, 11) for number in extra)
    assert (report.used, report.epoch) == (16, 1)


def test_a_truncated_picture_is_replaced_within_its_batch(folder_options):
    """Its header is whole, so that only decoding shows it; the order of the others does not change."""
    whole = open_examples(folder_options(8), seed=6, with_images=True)
    expected = numbers(whole.batch(8))
    options = folder_options(8, broken=(2,))
    stream = open_examples(options, seed=6, with_images=True)
    place = expected.index(2)
    got = numbers(stream.batch(8))
    assert got == [*expected[:place], expected[(place + 1) % 8], *expected[place + 1 :]]
    assert (stream.report.broken, stream.report.corrupt, stream.report.used) == (1, 1, 8)
    halves = [open_examples(options, seed=6, with_images=True, process_index=i, num_processes=2) for i in (0, 1)]
    assert [number for half in halves for number in numbers(half.batch(4))] == got
    assert sum(half.report.broken for half in halves) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"corrupt": range(6)}, r"6 of the first \d+ examples .* 6 x no picture. The first is 00\d.png: no picture"),
        ({"missing": range(4, 10)}, "6 x no caption"),
        ({"broken": range(6)}, "6 x OSError"),
    ],
)
def test_mostly_unusable_data_are_an_error_with_its_reasons(folder_options, bad, message):
    stream = open_examples(folder_options(10, **bad), seed=0, with_images=True)
    with pytest.raises(DataError, match=message):
        for _ in range(12):
            stream.batch(1)


def test_half_of_the_data_may_be_bad(folder_options):
    stream = open_examples(folder_options(10, corrupt=range(5)), seed=0, with_images=True)
    assert sorted(numbers(stream.batch(5))) == [5, 6, 7, 8, 9]


def test_the_global_generators_are_not_touched(folder_options):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    stream = open_examples(folder_options(6, random_flip=True), seed=0, with_images=True)
    stream.batch(9)
    assert states() == before


def test_without_pictures_only_captions_are_read(folder_options):
    """Corrupt files do not matter then."""
    stream = open_examples(folder_options(6, corrupt=range(6)), seed=0, with_images=False)
    batch = stream.batch(6)
    assert sorted(numbers(batch)) == list(range(6))
    assert {(example.image, example.original_size, example.target_size) for example in batch} == {
        (None, (16, 16), (16, 16))
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"resolution": -1}, "resolution=-1"),
        ({"bucket_step": 12}, "bucket_step=12"),
        ({"bucket_max_ratio": 0.5}, "bucket_max_ratio=0.5"),
        ({"shuffle_buffer": 0}, "shuffle_buffer=0"),
        ({"train_data_dir": "a", "train_captions": "b"}, "`train_data_dir` and `train_captions` are set"),
    ],
)
def test_options_that_cannot_work_are_named(wrong, message):
    with pytest.raises(DataError, match=message):
        DataOptions(**wrong)


def test_what_a_stream_needs_is_said(folder_options, tmp_path):
    with pytest.raises(DataError, match="`resolution` is not set"):
        open_examples(folder_options(2, resolution=0), seed=0, with_images=True)
    with pytest.raises(DataError, match="No source of examples"):
        open_examples(DataOptions(), seed=0, with_images=False)
    with pytest.raises(DataError, match="is not a folder"):
        open_examples(DataOptions(train_data_dir=str(tmp_path / "none")), seed=0, with_images=False)
    with pytest.raises(DataError, match="multiple of `bucket_step=64`"):
        open_examples(folder_options(2, resolution=48, aspect_buckets=True), seed=0, with_images=True)
    with pytest.raises(DataError, match="process_index=2"):
        open_examples(folder_options(2), seed=0, with_images=True, process_index=2, num_processes=2)
    with pytest.raises(DataError, match="seed=-1"):
        open_examples(folder_options(2), seed=-1, with_images=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        open_examples(DataOptions(train_data_dir=str(tmp_path / "empty")), seed=0, with_images=False)
    make_folder(tmp_path / "pictures", 0)


def test_a_batch_without_one_whole_picture_is_passed_over(folder_options):
    """Batches of one: nothing can stand in, and every process goes on to the next batch."""
    options = folder_options(6, broken=(1, 4))
    stream = open_examples(options, seed=0, with_images=True)
    expected = [number for number in permutation(0, 0, 6).tolist() if number not in (1, 4)]
    assert [numbers(stream.batch(1))[0] for _ in range(4)] == expected
