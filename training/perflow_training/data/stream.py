"""Endless examples from any source: shuffled, decoded and cropped as a function of (seed, position) alone."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from perflow_training.config.data import DataOptions
from perflow_training.data.batches import BatchSampler, Prefetcher, Sample, generator_seed
from perflow_training.data.buckets import bucket_sizes, nearest_bucket
from perflow_training.data.example import Example
from perflow_training.data.images import fit, load_rgb, read_size
from perflow_training.data.order import Drawn, IndexedOrder, Order, ShardedOrder
from perflow_training.data.report import FAILURES, DataReport, Failure, FailureLimit
from perflow_training.data.sources.open import open_source
from perflow_training.data.sources.record import Record, ShardedSource, Source
from perflow_training.errors import DataError

logger = logging.getLogger(__name__)
Size = tuple[int, int]


class Cropper:
    """What `options` do to a record: which size its picture gets, and the example that it becomes."""

    def __init__(self, options: DataOptions, seed: int, with_images: bool):
        if with_images and not options.resolution:
            raise DataError("`resolution` is not set: give the size of the shorter side in pixels, e.g. 512.")
        self.options = options
        self.seed = seed
        self.with_images = with_images
        self.square: Size = (options.resolution, options.resolution)
        self.buckets = [self.square]
        if with_images and options.aspect_buckets:
            try:
                self.buckets = bucket_sizes(options.resolution, options.bucket_step, options.bucket_max_ratio)
            except ValueError as error:
                raise DataError(str(error)) from error

    def size(self, record: Record) -> Size | Failure:
        """The (height, width) that the example will have, or why there will be none: caption and header are read."""
        options = self.options
        if record.problem:
            return Failure("unreadable_captions", record.problem, record.name)
        texts = record.caption if isinstance(record.caption, list) else [record.caption]
        if not any(text and text.strip() for text in texts):
            return Failure("missing_captions", "no caption", record.name)
        if not self.with_images:
            return self.square
        if record.image is None:
            return Failure("unreadable", "no picture", record.name)
        try:
            size = read_size(record.image)
        except Exception as error:  # Pillow's readers raise whatever a broken header leads them to
            return Failure("unreadable", reason_of(error, record.image), record.name)
        if min(size) < options.min_image_size:
            return Failure(
                "too_small", f"its shorter side is below `min_image_size={options.min_image_size}`", record.name
            )
        return nearest_bucket(size, self.buckets)

    def example(self, drawn: Drawn, target: Size) -> Example | Failure:
        """The decoded example, or a failure if the pixels are broken."""
        record, options = drawn.record, self.options
        random = np.random.default_rng(generator_seed(self.seed, 2, drawn.ref))
        flip, top, left, which = random.random(4)
        texts = record.caption if isinstance(record.caption, list) else [record.caption]
        texts = [" ".join(text.split()) for text in texts if text and text.strip()]
        caption = texts[int(which * len(texts))]
        if not self.with_images or record.image is None:
            return Example(caption, None, target, (0, 0), target, record.name)
        try:
            picture: Image.Image = load_rgb(record.image)
            image, corner = fit(
                picture,
                target,
                place=None if options.center_crop else (top, left),
                flip=options.random_flip and flip < 0.5,
            )
        except Exception as error:  # Pillow's decoders raise whatever broken data leads them to
            return Failure("broken", reason_of(error, record.image), record.name)
        return Example(caption, image, (picture.height, picture.width), corner, target, record.name)


def reason_of(error: Exception, image: Path | bytes) -> str:
    """A reason to count, without the file's name and numbers in it."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return "no picture" if image else "an empty file"
    text = str(error).replace(str(image), "(file)") if isinstance(image, Path) else str(error)
    return f"{type(error).__name__}: {re.sub('[0-9]+', '#', text)}"


def order_of(source: Source, options: DataOptions, seed: int) -> Order:
    """The order in which a source is met."""
    if seed < 0:
        raise DataError(f"`seed={seed}` must be 0 or more.")
    if isinstance(source, ShardedSource):
        return ShardedOrder(source, seed, options.shuffle_buffer)
    if not len(source):
        raise DataError("The source of examples is empty. Look at its files, split and column names.")
    return IndexedOrder(source, seed)


class ExampleStream:
    """Endless batches of examples, shuffled anew in each epoch. No global random number generator is touched.

    The order is that of one process: a global batch is `count` times `num_processes` consecutive examples, of which a
    process is given its contiguous slice. With aspect buckets, all examples of a global batch have one `target_size`.
    Records without a caption and files that are no pictures are left out; a picture whose pixels turn out to be broken
    is replaced by the next good one of the global batch, so that every process keeps the same order without asking the
    others.

    Raises DataError for a source that cannot be opened and, from `batch`, when most examples cannot be used.
    """

    def __init__(
        self,
        options: DataOptions,
        *,
        seed: int,
        with_images: bool,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.source = open_source(options, with_images=with_images)
        self._cropper = Cropper(options, seed, with_images)
        order = order_of(self.source, options, seed)
        total = None if isinstance(self.source, ShardedSource) else len(self.source)
        self._batches = Prefetcher(
            BatchSampler(order, lambda drawn: self._cropper.size(drawn.record), FailureLimit(total)),
            self._work,
            process_index=process_index,
            num_processes=num_processes,
            workers=options.dataloader_num_workers,
        )
        self._pixels = FailureLimit(total)
        self._counts = dict.fromkeys(("used", *FAILURES), 0)
        self._reasons: dict[str, int] = {}
        self._example = ""
        self._epoch = 0
        self._reported = False

    def batch(self, count: int) -> list[Example]:
        """The next `count` examples of this process."""
        examples: list[Example] = []
        while len(examples) < count:  # a global batch without one whole picture: all processes see that and go on
            plan, done = self._batches.next(count)
            for failure in plan.failures:
                self._note(failure)
            for _, broken in done:
                self._pixels.add(broken)
                if broken is not None:
                    self._note(broken)
            examples = [example for example, _ in done if example is not None]
        self._counts["used"] += count
        self._epoch = plan.epoch
        if self._epoch and not self._reported:
            self._reported = True
            logger.info("End of the first epoch. %s", self.report)
        return examples

    def _work(self, items: Sequence[Sample], place: int) -> tuple[Example | None, Failure | None]:
        """The example of a place in the global batch; a broken one is replaced by the next whole one, if any."""
        first: Failure | None = None
        for step in range(len(items)):
            item = items[(place + step) % len(items)]
            example = self._cropper.example(item.drawn, cast(Size, item.group))
            if isinstance(example, Example):
                return example, first
            first = first or example
        return None, first

    def _note(self, failure: Failure) -> None:
        if failure.kind == "unreadable_captions" and not self._counts[failure.kind]:
            logger.warning("A caption cannot be read and is left out; others are only counted. %s", failure)
        self._counts[failure.kind] += 1
        self._reasons[failure.reason] = self._reasons.get(failure.reason, 0) + 1
        self._example = self._example or str(failure)

    @property
    def report(self) -> DataReport:
        """Counts since this stream was opened."""
        reasons = tuple(sorted(self._reasons.items(), key=lambda pair: -pair[1]))
        return DataReport(epoch=self._epoch, reasons=reasons, example=self._example, **self._counts)

    def state_dict(self) -> dict:
        """Where the stream stands: JSON-able, and the same on every process."""
        return self._batches.state()

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken. Raises DataError if it belongs to other data."""
        self._batches.load(state)

    def close(self) -> None:
        """End the threads."""
        self._batches.close()


def open_examples(
    options: DataOptions, *, seed: int, with_images: bool, process_index: int = 0, num_processes: int = 1
) -> ExampleStream:
    """The stream for whichever source `options` name: folder, `datasets`, webdataset or captions only."""
    return ExampleStream(
        options, seed=seed, with_images=with_images, process_index=process_index, num_processes=num_processes
    )
