"""Examples for training: from folders, tables, streams, tar shards and captions, or from a cache of encoded ones."""

from .buckets import bucket_sizes, nearest_bucket
from .example import Example, time_ids
from .options import DataError, DataOptions
from .report import DataReport
from .stream import ExampleStream, open_examples

__all__ = [
    "DataError",
    "DataOptions",
    "DataReport",
    "Example",
    "ExampleStream",
    "bucket_sizes",
    "nearest_bucket",
    "open_examples",
    "time_ids",
]
