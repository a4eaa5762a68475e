"""Endless batches of encoded examples out of a cache: no autoencoder and no text encoder is needed."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from perflow_diffusers.words.shown import shown
from perflow_training.config.data import SOURCES, DataOptions
from perflow_training.data.batches import BatchSampler, Prefetcher, Sample, generator_seed
from perflow_training.data.manifest import EMPTY_PROMPT, OPTIONS, check_files, check_same, read_manifest
from perflow_training.data.order import IndexedOrder
from perflow_training.data.report import FAILURES, DataReport, FailureLimit
from perflow_training.data.sources.open import open_source
from perflow_training.errors import DataError
from perflow_training.teacher.encode import to_latents

OPEN_FILES = 64  # at once: systems allow a process some hundreds


@shown
@dataclass(frozen=True)
class CachedBatch:
    """`latents` (B, C, h, w) or None, `prompt_embeds` (B, L, D), SDXL's `pooled` (B, P) and `add_time_ids` (B, 6).

    `names` say where each row stands in the cache.
    """

    latents: Tensor | None
    prompt_embeds: Tensor
    pooled: Tensor | None
    add_time_ids: Tensor | None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A row of one group of tensors in one file."""

    file: str
    group: str
    number: int

    def __str__(self) -> str:
        return f"row {self.number} of {self.group} in {self.file}"


class Rows:
    """All rows of a cache by number, read from disk when they are asked for."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder = folder
        self.parts = [
            (entry["file"], group, count) for entry in manifest["shards"] for group, count in entry["groups"].items()
        ]
        self.ends = np.cumsum([count for _, _, count in self.parts])
        self._opened: OrderedDict[str, safe_open] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> Row:
        part = int(np.searchsorted(self.ends, index, side="right"))
        file, group, count = self.parts[part]
        return Row(file, group, index - int(self.ends[part]) + count)

    def load(self, row: Row, columns: Sequence[str]) -> dict[str, Tensor]:
        """The columns that exist, without a batch dimension."""
        opened = self._open(row.file)
        there = set(opened.keys())
        names = {column: f"{row.group}/{column}" for column in columns}
        return {column: opened.get_slice(name)[row.number] for column, name in names.items() if name in there}

    def _open(self, file: str):
        with self._lock:
            if file not in self._opened:
                self._opened[file] = safe_open(self.folder / file, framework="pt")
                if len(self._opened) > OPEN_FILES:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(file)
            return self._opened[file]


class CachedStream:
    """Endless batches of a cache that `write_cache` made, in the order in which `ExampleStream` has its examples.

    Latents are drawn from the stored posterior with noise that depends on (seed, position) alone. All tensors are
    float32 and on the CPU.

    Raises DataError for a cache that is missing, incomplete or damaged, made with another `model` (an identity from
    `model_identity`; None is not compared), at another resolution, or, if `options` still name a source, from other
    data.
    """

    def __init__(
        self,
        options: DataOptions,
        *,
        seed: int,
        with_images: bool,
        process_index: int = 0,
        num_processes: int = 1,
        model: str | None = None,
    ):
        folder = Path(options.train_cache_dir)
        self.manifest = _opened(folder, options, with_images, model, first=process_index == 0)
        self._seed = seed
        self._rows = Rows(folder, self.manifest)
        posterior = ("latents_mean", "latents_std") if with_images else ()
        self._columns = (*posterior, "prompt_embeds", "pooled", "add_time_ids")
        order = IndexedOrder(self._rows, seed)
        self._batches = Prefetcher(
            BatchSampler(order, lambda drawn: drawn.record.group, FailureLimit(len(self._rows))),
            self._work,
            process_index=process_index,
            num_processes=num_processes,
            workers=options.dataloader_num_workers,
        )
        self._epoch = 0
        self._used = 0
        #: `prompt_embeds` (1, L, D) and `pooled` (1, P) of the empty prompt
        self.empty_prompt = {name: tensor.float() for name, tensor in load_file(folder / EMPTY_PROMPT).items()}

    def batch(self, count: int) -> CachedBatch:
        """The next `count` rows of this process."""
        plan, done = self._batches.next(count)
        self._epoch = plan.epoch
        self._used += count
        rows = [row for _, row in done]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return CachedBatch(
            stacked.get("latents"),
            stacked["prompt_embeds"],
            stacked.get("pooled"),
            stacked.get("add_time_ids"),
            tuple(name for name, _ in done),
        )

    def _work(self, items: Sequence[Sample], place: int) -> tuple[str, dict[str, Tensor]]:
        drawn = items[place].drawn
        row = {name: tensor.float() for name, tensor in self._rows.load(drawn.record, self._columns).items()}
        if "latents_mean" in row:
            mean, std = row.pop("latents_mean"), row.pop("latents_std")
            entropy = np.random.SeedSequence(generator_seed(self._seed, 3, drawn.ref)).generate_state(1, np.uint64)
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(int(entropy[0]) >> 1))
            row["latents"] = to_latents((mean + std * noise)[None], self.manifest["scaling"])[0]
        return str(drawn.record), row

    @property
    def report(self) -> DataReport:
        """Rows used since this stream was opened; what was skipped when the cache was made."""
        skipped = {kind: self.manifest["skipped"].get(kind, 0) for kind in FAILURES}
        return DataReport(epoch=self._epoch, used=self._used, **skipped)

    def state_dict(self) -> dict:
        """Where the stream stands: JSON-able, and the same on every process."""
        return self._batches.state()

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken. Raises DataError if it belongs to another cache."""
        self._batches.load(state)

    def close(self) -> None:
        """End the threads."""
        self._batches.close()


def _opened(folder: Path, options: DataOptions, with_images: bool, model: str | None, *, first: bool) -> dict:
    """The checked manifest; the first process also compares hashes and the source."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"`train_cache_dir={folder}` holds no cache. Make one with training/precompute.py.")
    if not manifest["complete"]:
        raise DataError(
            f"The cache {folder} is not complete: {manifest['records']} records so far. Run precompute.py again with "
            "the same options; it goes on where it stopped."
        )
    if with_images and not manifest["images"]:
        raise DataError(f"The cache {folder} holds prompts only, and pictures are wanted. Make one with pictures.")
    wanted: dict = {} if model is None else {"model": model}
    if manifest["images"] and options.resolution:
        wanted |= {name: getattr(options, name) for name in OPTIONS}
    check_same(folder, manifest, wanted)
    if first and options.verify_cache and any(getattr(options, name) for name in SOURCES):
        source = open_source(options, with_images=manifest["images"])
        check_same(folder, manifest, {"source": source.fingerprint()})
    check_files(folder, manifest, hashes=first and options.verify_cache)
    return manifest
