"""Webdataset shards: tar files in which the parts of an example share a name."""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from perflow_training.data.sources.record import PICTURES, Record, caption_of, digest, own_caption
from perflow_training.errors import DataError

CUT = "without the empty blocks that close a tar: cut short, though between two of its files"
#: webdataset's own notes in a shard, which belong to no example
_META = re.compile(r"__[^/]*__($|/)")


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
            from webdataset.tariterators import group_by_keys
        except ImportError as error:
            raise DataError(
                "`train_shards` needs the library webdataset. Install it (pip install webdataset)."
            ) from error
        self._open, self._set_options = gopen, set_options
        self._group = group_by_keys
        self.caption_column = caption_column
        given = [patterns] if isinstance(patterns, str) else patterns
        self.urls = [url for pattern in given for url in braceexpand(pattern)]
        gone = [url for url in self.urls if not _is_remote(url) and not Path(url).is_file()]
        if gone or not self.urls:
            raise DataError(
                f"`train_shards={patterns}`: {len(gone)} of {len(self.urls)} files are not there, e.g. "
                f"{gone[0] if gone else '(the list is empty)'}."
            )
        cut = [url for url in self.urls if not _is_remote(url) and _is_cut(Path(url))]
        if cut:
            raise DataError(
                f"`train_shards={patterns}`: {len(cut)} of {len(self.urls)} files end {CUT}, e.g. {cut[0]}. "
                "Copy them anew, or take them off the list."
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
                    for number, sample in enumerate(self._group(_parts(stream, url))):
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
        caption, problem = self._caption(sample)
        return Record(f"{sample['__url__']}: {sample['__key__']}", caption, image, problem)

    def _caption(self, sample: dict) -> tuple[str | list[str] | None, str]:
        """(caption, why it cannot be used)."""
        ending = self.caption_column or "txt"
        if ending in sample:
            return own_caption(sample[ending], f"its .{ending}")
        if "json" not in sample:
            return None, ""
        text, problem = own_caption(sample["json"], "its .json")
        if text is None:
            return None, problem
        try:
            row = json.loads(text)
            return caption_of(row if isinstance(row, dict) else {}, self.caption_column), ""
        except DataError as error:
            return None, f"in its .json {error}"
        except ValueError:
            return None, "its .json is not JSON"

    def fingerprint(self) -> str:
        """Names of all shards, and the sizes of those on this disk."""
        return digest([url] if _is_remote(url) else [Path(url).name, Path(url).stat().st_size] for url in self.urls)


class _Header(tarfile.TarInfo):
    """A member whose archive remembers having met the blocks that close a tar."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> Any:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # of no stub, though of every Python
            archive.closed_by_its_mark = True
            raise


def _parts(stream: IO[bytes], url: str) -> Iterator[dict]:
    """Files of a tar as webdataset groups them. Raises DataError where it ends without the mark that closes a tar.

    `tarfile` itself, and webdataset with it, takes a file that was cut between two members for a shorter one.
    """
    archive: Any
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as archive:
        for member in archive:
            archive.members = []  # a list of all of them is of no use in a stream
            if member.isreg() and not _META.match(member.name):
                yield {"fname": member.name, "data": archive.extractfile(member).read(), "__url__": url}
    if not getattr(archive, "closed_by_its_mark", False):
        raise tarfile.ReadError(f"it ends {CUT}")
    yield {}  # groups end here


def _is_cut(path: Path) -> bool:
    """Whether a plain tar ends on a block that is not empty: cut between two members, if it is one at all."""
    size = path.stat().st_size
    if size < tarfile.BLOCKSIZE or size % tarfile.BLOCKSIZE:
        return False  # no tar, compressed, or cut within a block, which reading shows
    with path.open("rb") as file:
        if file.read(tarfile.BLOCKSIZE)[257:262] != b"ustar":
            return False
        file.seek(-tarfile.BLOCKSIZE, os.SEEK_END)
        return any(file.read(tarfile.BLOCKSIZE))


def _is_remote(url: str) -> bool:
    return url.startswith("pipe:") or "://" in url
