"""Folders of tiny pictures and their options; nothing is written outside the test's own folder."""

import datasets
import pytest
from tiny_pictures import make_folder

from perflow_training.data import DataOptions


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` keeps its copies of local tables in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def folder_options(tmp_path):
    """`make(count, ..., option=value)`: options of a folder made on the spot."""

    def make(count, *, sizes=((20, 24),), missing=(), corrupt=(), broken=(), **options):
        folder = make_folder(tmp_path / "pictures", count, sizes, missing, corrupt, broken)
        values = {"resolution": 16, "dataloader_num_workers": 0, **options}
        return DataOptions(train_data_dir=str(folder), **values)

    return make
