"""Options of the data: location, format and column names of the pairs, and augmentation."""

from dataclasses import dataclass
from typing import Literal

from clipkd.errors import require, require_least
from clipkd.files import expand_home


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    format: Literal["webdataset", "huggingface", "csv"] = "webdataset"
    """webdataset: tar shards; huggingface: a hub name, a save_to_disk folder, a parquet file, or a folder of parquet, arrow or image files; csv: a table of image paths and captions."""
    path: tuple[str, ...] | str = ""
    """webdataset: folders, tars, brace patterns such as shards/{00000..00331}.tar, URLs or pipes, one or a list; huggingface: name or folder; csv: .csv or .tsv files, also compressed."""
    split: str = "train"
    """Split of a Hugging Face data set; the others ignore it."""
    configuration: str | None = None
    """Configuration of a Hugging Face data set that has several."""
    image_column: str = "image"
    """Image column of a Hugging Face data set, or of a table (paths, relative to the table). webdataset uses the member with an image suffix."""
    caption_key: str | None = "txt"
    """Caption. webdataset: txt for the .txt member, or a key of the .json member; other formats: the column. Of a list of captions one is drawn for each view. null: images alone, without captions."""
    label_key: str | None = None
    """Class number, for objective.closed_set. webdataset: cls for the .cls member, or a key of the .json member; other formats: the column."""
    weight: float = 1.0
    """Passes through this source per epoch: 2 uses every sample twice, 0.5 one half in one epoch and the other half in the next."""

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(expand_home(path) for path in ((self.path,) if isinstance(self.path, str) else self.path) if path)

    def __post_init__(self) -> None:
        self.check("data.mix[…]")

    def check(self, where: str) -> None:
        require(self.label_key != "", f"{where}.label_key is empty; name a key or column, or omit it")
        require(self.weight > 0, f"{where}.weight is {self.weight}; it must be positive")
        require(
            self.format != "huggingface" or len(self.paths) <= 1,
            f"{where}.path lists {len(self.paths)} Hugging Face data sets; name one, and the others in data.mix",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    mix: tuple[SourceConfig, ...] = ()
    """Further sources, each with its own path, format, columns and weight."""
    max_skipped: float = 0.01
    """Largest share of damaged samples (and shards) that are skipped; above it the run stops. 0 stops at the first one."""
    num_workers: int = 2
    """Loader processes per training process; 0 loads in the training process."""
    min_crop: float = 0.9
    """Smallest random crop, as a share of the image's area; 1 resizes the complete image."""
    background: Literal["white", "random"] = "white"
    """Colour behind transparent pixels: white, or a random colour per view (an augmentation for drawings)."""

    def __post_init__(self) -> None:
        self.check("data")
        require(0 < self.min_crop <= 1, f"data.min_crop is {self.min_crop}; it is a share of the area in (0, 1]")
        require_least(self, "data.", num_workers=0)
        require(0 <= self.max_skipped <= 1, f"data.max_skipped is {self.max_skipped}; it is a share in [0, 1]")
        captioned = {source.caption_key is not None for source in (self, *self.mix)}
        require(
            len(captioned) == 1,
            "some sources have a caption_key and others null; set null for all of them, or for none",
        )
        labelled = {source.label_key is not None for source in (self, *self.mix)}
        require(
            len(labelled) == 1,
            "some sources have a label_key and others none; set it for data and each of data.mix, or for none",
        )
