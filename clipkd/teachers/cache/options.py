"""The options of `clipkd cache`: those of the training that will use it, and how much to store."""

from dataclasses import dataclass
from typing import Literal

from clipkd.config.train import TrainConfig
from clipkd.errors import require


@dataclass(frozen=True, kw_only=True)
class CacheConfig(TrainConfig):
    output: str = ""
    """Folder to make, named on the command line: the output in a training's YAML is its run."""
    views: int = 1
    """Augmented views per sample: as many passes over the data see new crops; then they come again in the same order."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """What features are stored in. float32 gives the losses of a run without a cache to the bit (on a CPU)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.output), "output is empty; name the folder of the cache: --output DIR")
        require(self.views >= 1, f"views is {self.views}; it must be 1 or more")
        require(bool(self.teacher.names), "a cache is made with a teacher: set teacher.models")
        require(self.teacher.cache is None, "teacher.cache is read by training; leave it out to make a cache")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(CacheConfig):
    recompute: int = 0
    """Samples, spread over all shards, whose features the real teachers compute again; 0 loads no teacher."""
