"""The data part of a training configuration, checked when it is made."""

from dataclasses import asdict, dataclass, fields, replace

from perflow_diffusers.words.shown import shown
from perflow_training.config.option import option
from perflow_training.errors import DataError

#: the options that name where examples come from; exactly one of them is set
SOURCES = ("train_data_dir", "train_captions", "dataset_name", "train_shards")


@shown
@dataclass(frozen=True)
class DataOptions:
    """Where captions and pictures come from, and what is done to the pictures. The names are those of the YAML files.

    Raises `DataError`, which names the option, its value and what it can be.
    """

    train_data_dir: str = option(
        "",
        "folder of pictures with metadata.jsonl, metadata.csv or <name>.txt; or a saved dataset",
        section="captions and pictures",
    )
    train_captions: str = option(
        "", "text file, one caption a line, or parquet, csv, json, jsonl, arrow (with pictures or not)"
    )
    dataset_name: str = option(
        "", "Hub id, local dataset, or parquet, json, csv, arrow, imagefolder with dataset_files"
    )
    dataset_config_name: str | None = option(None, "one of a Hub dataset's configurations")
    dataset_revision: str | None = option(None, "branch, tag or commit on the Hub")
    dataset_split: str = option("train", "which part of it")
    dataset_files: str | list[str] | None = option(None, "file names or patterns for dataset_name")
    dataset_streaming: bool = option(False, "read it as it comes instead of downloading it first")
    train_shards: str | list[str] = option(
        "", "webdataset: .tar files, brace patterns, pipe: commands (these run in a shell!)"
    )
    train_cache_dir: str = option("", "what precompute.py writes, and training then reads instead of the source")
    verify_cache: bool = option(True, "compare the SHA-256 of each cache file when it is opened")
    image_column: str = option("image", "of tables")
    caption_column: str = option("", "empty: `caption`, else `text`")
    resolution: int = option(0, "of the shorter side; 0: the network's own size")
    min_image_size: int = option(16, "pictures with a shorter side are left out and counted; 1: none is too small")
    center_crop: bool = option(False, "otherwise a random crop")
    random_flip: bool = option(False, "mirrors half of the pictures")
    aspect_buckets: bool = option(False, "sizes of many shapes and of nearly the same area, as SDXL was trained")
    bucket_step: int = option(64, "their sides are multiples of this")
    bucket_max_ratio: float = option(2.0, "of the longer to the shorter side")
    shuffle_buffer: int = option(1000, "examples shuffled at once when streaming, shards being shuffled besides")
    dataloader_num_workers: int = option(2, "threads that decode ahead; 0: none")

    def __post_init__(self) -> None:
        for name, least in (
            ("resolution", 0),
            ("min_image_size", 1),
            ("bucket_step", 8),
            ("shuffle_buffer", 1),
            ("dataloader_num_workers", 0),
        ):
            if getattr(self, name) < least:
                raise DataError(f"`{name}={getattr(self, name)}` must be at least {least}.")
        if self.bucket_step % 8:
            raise DataError(f"`bucket_step={self.bucket_step}` must be a multiple of 8, the autoencoder's step.")
        if self.bucket_max_ratio < 1:
            raise DataError(f"`bucket_max_ratio={self.bucket_max_ratio}` must be at least 1: longer to shorter side.")
        given = [name for name in SOURCES if getattr(self, name)]
        if len(given) > 1:
            raise DataError(f"{' and '.join(f'`{name}`' for name in given)} are set. Examples come from one of them.")

    @classmethod
    def of(cls, config, **changes) -> "DataOptions":
        """The options that `config` (any object with attributes of these names) has, then `changes`."""
        known = {option.name: getattr(config, option.name) for option in fields(cls) if hasattr(config, option.name)}
        return cls(**{**known, **changes})

    def sized(self, resolution: int) -> "DataOptions":
        """The same with `resolution` filled in where it is 0."""
        return self if self.resolution else replace(self, resolution=resolution)

    def to_dict(self) -> dict:
        return asdict(self)
