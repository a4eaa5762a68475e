"""Encodes every example of a source once, into shards of safetensors and a manifest; a killed run goes on."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from perflow_diffusers.io.repository import file_sha256
from perflow_diffusers.io.writer import specs_of, write_safetensors
from perflow_training.config.data import DataOptions
from perflow_training.data.example import Example
from perflow_training.data.manifest import (
    EMPTY_PROMPT,
    FORMAT,
    OPTIONS,
    check_files,
    check_same,
    read_manifest,
    write_manifest,
)
from perflow_training.data.order import Drawn
from perflow_training.data.report import Failure, FailureLimit
from perflow_training.data.sources.open import open_source
from perflow_training.data.sources.record import Record, ShardedSource, Source
from perflow_training.data.stream import Cropper, Size
from perflow_training.errors import DataError
from perflow_training.teacher.conditions import time_ids
from perflow_training.teacher.encode import Encoders

Progress = Callable[[int, int | None], None]


def write_cache(
    folder: str | Path,
    options: DataOptions,
    encoders: Encoders,
    *,
    seed: int = 0,
    with_images: bool = True,
    shard_size: int = 512,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float16,
    progress: Progress | None = None,
) -> dict:
    """Encode the source of `options` into `folder` and return the manifest.

    Each shard holds what `shard_size` consecutive records of the source became: mean and standard deviation of the
    autoencoder's posterior (so that training still draws from it), prompt embeddings, and SDXL's time ids, in `dtype`
    (time ids in float32). Crops and flips are drawn once, from `seed`. A shard is written under a temporary name and
    renamed, then the manifest is replaced; an interrupted run keeps every shard that its manifest names and goes on
    after it, with files equal to the byte to those of an uninterrupted one. `progress(done, total or None)` is called
    after each shard.

    Raises DataError if the folder holds a cache of something else, or most of the source cannot be used.
    """
    folder = Path(folder)
    source = open_source(options, with_images=with_images)
    made = {
        "model": encoders.model,
        "source": source.fingerprint(),
        "images": with_images,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        "shard_size": shard_size,
        "batch_size": batch_size,
        **({name: getattr(options, name) for name in OPTIONS} if with_images else {}),
    }
    manifest = _begin(folder, made, encoders, dtype)
    if manifest["complete"]:
        return manifest
    with _Writer(folder, options, encoders, seed, with_images, batch_size, dtype) as writer:
        _write_shards(folder, source, manifest, writer, shard_size, progress)
    return manifest


def _begin(folder: Path, made: dict, encoders: Encoders, dtype: torch.dtype) -> dict:
    """The manifest to go on with: a new one, or that of an interrupted run of the same job."""
    manifest = read_manifest(folder)
    if manifest is not None:
        check_same(folder, manifest, made)
        check_files(folder, manifest, hashes=True)
        for stale in folder.glob(".*.tmp"):  # what a killed run was writing
            stale.unlink()
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    empty = {name: _stored(tensor, dtype) for name, tensor in encoders.empty_prompt().items()}
    path = write_safetensors(folder / EMPTY_PROMPT, specs_of(empty), empty.items(), {"format": "pt"}, overwrite=True)
    manifest = {
        "format": FORMAT,
        **made,
        "scaling": dict(encoders.scaling),
        "complete": False,
        "count": 0,
        "records": 0,
        "skipped": {},
        "empty_prompt": {"file": EMPTY_PROMPT, "bytes": path.stat().st_size, "sha256": file_sha256(path)},
        "shards": [],
    }
    write_manifest(folder, manifest)
    return manifest


def _write_shards(
    folder: Path, source: Source, manifest: dict, writer: "_Writer", shard_size: int, progress: Progress | None
) -> None:
    total = None if isinstance(source, ShardedSource) else len(source)
    limit = FailureLimit(total)
    shards = manifest["shards"]
    walk = _walk(source, shards[-1]["next"] if shards else [0, 0])
    while part := list(islice(walk, shard_size)):
        first = manifest["records"]
        records = [Drawn((0, first + place), record) for place, (record, _) in enumerate(part)]
        entry = writer.write(f"shard-{len(shards):05d}.safetensors", records, limit)
        shards.append({**entry, "records": len(part), "next": part[-1][1]})
        manifest["records"] += len(part)
        manifest["count"] += sum(entry["groups"].values())
        manifest["skipped"] = dict(Counter(manifest["skipped"]) + Counter(entry["skipped"]))
        write_manifest(folder, manifest)
        if progress is not None:
            progress(manifest["records"], total)
    if manifest["records"] == 0 or limit.tried == manifest["records"]:
        limit.end()
    if not manifest["count"]:
        raise DataError(f"None of {manifest['records']} examples can be used: {manifest['skipped']}.")
    manifest["complete"] = True
    write_manifest(folder, manifest)


def _walk(source: Source, begin: list[int]) -> Iterator[tuple[Record, list[int]]]:
    """Every record once from `begin` (shard, number in it) on, in the source's order, and where the next one is."""
    if not isinstance(source, ShardedSource):
        for number in range(begin[1], len(source)):
            yield source[number], [0, number + 1]
        return
    for shard in range(begin[0], source.num_shards):
        start = begin[1] if shard == begin[0] else 0
        for number, record in enumerate(source.read(shard, start), start + 1):
            yield record, [shard, number]


class _Writer:
    """Encodes and writes one shard after the other."""

    def __init__(
        self,
        folder: Path,
        options: DataOptions,
        encoders: Encoders,
        seed: int,
        with_images: bool,
        batch_size: int,
        dtype: torch.dtype,
    ):
        self.folder = folder
        self.encoders = encoders
        self.cropper = Cropper(options, seed, with_images)
        self.with_images = with_images
        self.batch_size = batch_size
        self.dtype = dtype
        self.pool = ThreadPoolExecutor(max(1, options.dataloader_num_workers), "decode")

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)

    def write(self, name: str, records: list[Drawn], limit: FailureLimit) -> dict:
        """One shard; returns its entry for the manifest."""
        groups: dict[Size, list[Drawn]] = {}
        failures: list[Failure] = []
        sizes = self.pool.map(lambda drawn: self.cropper.size(drawn.record), records)
        for drawn, size in zip(records, sizes, strict=True):
            limit.add(size if isinstance(size, Failure) else None)
            if isinstance(size, Failure):
                failures.append(size)
            else:
                groups.setdefault(size, []).append(drawn)
        tensors: dict[str, Tensor] = {}
        rows: dict[str, int] = {}
        for size in sorted(groups):
            parts = list(self._encode(groups[size], size, failures))
            if parts:
                group = f"{size[0]}x{size[1]}" if self.with_images else "prompts"
                columns = {column: torch.cat([part[column] for part in parts]) for column in parts[0]}
                tensors.update({f"{group}/{column}": tensor for column, tensor in columns.items()})
                rows[group] = len(columns["prompt_embeds"])
        skipped = dict(Counter(failure.kind for failure in failures))
        if not rows:
            return {"file": None, "bytes": 0, "sha256": "", "groups": {}, "skipped": skipped}
        path = write_safetensors(
            self.folder / name, specs_of(tensors), tensors.items(), {"format": "pt"}, overwrite=True
        )
        return {
            "file": name,
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
            "groups": rows,
            "skipped": skipped,
        }

    def _encode(self, drawn: list[Drawn], size: Size, failures: list[Failure]) -> Iterator[dict[str, Tensor]]:
        """Rows of one picture size, a batch at a time; the next batch is decoded meanwhile."""
        starts = range(0, len(drawn), self.batch_size)
        pending: list[Future] = []
        for start in (*starts, None):
            ready, pending = pending, []
            if start is not None:
                batch = drawn[start : start + self.batch_size]
                pending = [self.pool.submit(self.cropper.example, one, size) for one in batch]
            decoded = [future.result() for future in ready]
            failures += [one for one in decoded if isinstance(one, Failure)]
            examples = [one for one in decoded if isinstance(one, Example)]
            if examples:
                yield self._rows(examples)

    def _rows(self, examples: list[Example]) -> dict[str, Tensor]:
        rows = self.encoders.encode_prompts([example.caption for example in examples])
        if self.with_images:
            rows = {**rows, **self.encoders.encode_images(torch.stack([example.pixels for example in examples]))}
        rows = {name: _stored(tensor, self.dtype) for name, tensor in rows.items()}
        if "pooled" in rows and examples[0].target_size != (0, 0):  # prompts alone: an uncropped picture's, if known
            rows["add_time_ids"] = time_ids([example.sizes for example in examples])
        return rows


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()
