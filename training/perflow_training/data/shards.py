"""Webdataset shards: tar files in which the parts of an example share a name."""

import json
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from .options import DataError
from .sources import PICTURES, Record, caption_of, digest


class TarSource:
    """Pictures and captions in tar files, read with the `webdataset` library (an optional dependency).

    `patterns` are file names, http(s) addresses or `pipe:` commands, each with braces for many, for example
    `data/{00000..00127}.tar` or `pipe:aws s3 cp s3://bucket/{000..127}.tar -`. A `pipe:` command is run by the shell:
    it must only ever come from the user's own configuration.

    The picture is the part with a picture's ending; the caption is `<name>.txt`, or `caption` or `text` in
    `<name>.json`. `caption_column` names another ending, or another key in the JSON.
    """

    has_images = True

    def __init__(self, patterns: str | list[str], caption_column: str = ""):
        try:
            from braceexpand import braceexpand
            from webdataset.gopen import gopen, set_options
            from webdataset.tariterators import group_by_keys, tar_file_expander
        except ImportError as error:
            raise DataError(
                "`train_shards` needs the library webdataset. Install it (pip install webdataset)."
            ) from error
        self._open, self._set_options = gopen, set_options
        self._expand, self._group = tar_file_expander, group_by_keys
        self.caption_column = caption_column
        given = [patterns] if isinstance(patterns, str) else patterns
        self.urls = [url for pattern in given for url in braceexpand(pattern)]
        gone = [url for url in self.urls if not _is_remote(url) and not Path(url).is_file()]
        if gone or not self.urls:
            raise DataError(
                f"`train_shards={patterns}`: {len(gone)} of {len(self.urls)} files are not there, e.g. "
                f"{gone[0] if gone else '(the list is empty)'}."
            )

    @property
    def num_shards(self) -> int:
        return len(self.urls)

    def read(self, shard: int, start: int) -> Iterator[Record]:
        """Records of a shard from number `start` on. Raises DataError if the tar or its command breaks."""
        url = self.urls[shard]
        try:
            with closing(self._open(url, "rb")) as stream:
                try:
                    parts = self._expand([{"url": url, "stream": stream}])
                    for number, sample in enumerate(self._group(parts)):
                        if number >= start:
                            yield self._record(sample)
                    while stream.read(1 << 20):  # what follows the tar's end; a command may fail even there
                        pass
                except GeneratorExit:  # the reader goes elsewhere: a command that is cut off has not failed
                    self._set_options(stream, ignore_errors=True)
                    raise
        except (OSError, tarfile.TarError, ValueError) as error:
            raise DataError(f"Shard {url} cannot be read ({error}). Copy it anew, or take it off the list.") from error

    def _record(self, sample: dict) -> Record:
        image = next((data for ending, data in sample.items() if f".{ending.rpartition('.')[2]}" in PICTURES), None)
        return Record(f"{sample['__url__']}: {sample['__key__']}", self._caption(sample), image)

    def _caption(self, sample: dict) -> str | list[str] | None:
        ending = self.caption_column or "txt"
        if ending in sample:
            return sample[ending].decode("utf-8", errors="replace")
        if "json" in sample:
            try:
                row = json.loads(sample["json"])
            except ValueError:
                return None
            return caption_of(row, self.caption_column) if isinstance(row, dict) else None
        return None

    def fingerprint(self) -> str:
        """Names of all shards, and the sizes of those on this disk."""
        return digest([url] if _is_remote(url) else [Path(url).name, Path(url).stat().st_size] for url in self.urls)


def _is_remote(url: str) -> bool:
    return url.startswith("pipe:") or "://" in url
