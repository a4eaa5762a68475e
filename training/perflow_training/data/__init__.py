"""Examples for training: from folders, tables, streams, tar shards and captions, or from a cache of encoded ones."""

from perflow_training.config.data import DataOptions
from perflow_training.data.buckets import bucket_sizes, nearest_bucket
from perflow_training.data.example import Example
from perflow_training.data.report import DataReport
from perflow_training.data.stream import ExampleStream, open_examples
from perflow_training.errors import DataError

__all__ = [
    "DataError",
    "DataOptions",
    "DataReport",
    "Example",
    "ExampleStream",
    "bucket_sizes",
    "nearest_bucket",
    "open_examples",
]
