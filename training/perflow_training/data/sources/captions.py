"""A text file of captions."""

from pathlib import Path

from perflow_training.data.sources.record import Record, digest
from perflow_training.errors import DataError
from perflow_training.text import read_text


class TextSource:
    """A text file with one caption a line; empty lines are no examples."""

    has_images = False

    def __init__(self, path: Path):
        self.path = path
        self.captions = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if not self.captions:
            raise DataError(f"`train_captions={path}` holds no captions. Write one a line.")

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Record:
        return Record(f"{self.path.name}, caption {index + 1}", self.captions[index], None)

    def fingerprint(self) -> str:
        return digest(self.captions)
