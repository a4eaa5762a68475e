"""The source that the options name: a new kind of source is a branch here and a module beside it."""

from pathlib import Path

from perflow_training.config.data import SOURCES, DataOptions
from perflow_training.data.sources import tables
from perflow_training.data.sources.captions import TextSource
from perflow_training.data.sources.folder import FolderSource
from perflow_training.data.sources.record import Source
from perflow_training.data.sources.webdataset import TarSource
from perflow_training.errors import DataError


def open_source(options: DataOptions, *, with_images: bool) -> Source:
    """The source that `options` name. Raises DataError if there is none, or no pictures where they are wanted."""
    source = _open(options, with_images)
    if with_images and not source.has_images:
        raise DataError(
            "Pictures are wanted, but the source has captions only. Give one with pictures (`train_data_dir`, "
            "`dataset_name`, `train_shards`, or a table with an image column), or start from the teacher's own "
            "trajectories, which need none."
        )
    return source


def _open(options: DataOptions, with_images: bool) -> Source:
    if options.train_captions:
        path = Path(options.train_captions)
        if not path.is_file():
            raise DataError(f"`train_captions={path}` is not a file. Give a text file or a table ({tables.ENDINGS}).")
        return tables.table_file(path, options, with_images) if tables.is_table(path) else TextSource(path)
    if options.train_data_dir:
        folder = Path(options.train_data_dir)
        if not folder.is_dir():
            raise DataError(f"`train_data_dir={folder}` is not a folder.")
        if tables.is_saved(folder):
            return tables.saved_dataset(folder, options, with_images)
        return FolderSource(folder, options.caption_column)
    if options.dataset_name:
        return tables.named_dataset(options, with_images)
    if options.train_shards:
        return TarSource(options.train_shards, options.caption_column)
    raise DataError(f"No source of examples is set. Give one of {', '.join(f'`{name}`' for name in SOURCES)}.")
