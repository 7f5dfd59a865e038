"""The options of `clipkd cache`: a training configuration, how much to store, and where."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from clipkd.config.train import TrainConfig
from clipkd.errors import require


@dataclass(frozen=True, kw_only=True)
class CacheConfig(TrainConfig):
    trains: ClassVar[bool] = False
    output: str = ""
    """Folder of the cache, named on the command line: the output in a training's YAML is its run folder."""
    views: int = 1
    """Augmented views per sample: so many passes over the data see new crops, then the crops repeat in the same order."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of the stored features. On a CPU, float32 gives the losses of a run without a cache to the bit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.output), "output is empty; name the folder of the cache: --output DIR")
        require(self.views >= 1, f"views is {self.views}; it must be 1 or more")
        require(bool(self.teacher.names), "a cache is made with a teacher: set teacher.models")
        require(self.teacher.cache is None, "teacher.cache is read by training; leave it out to make a cache")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(CacheConfig):
    recompute: int = 0
    """Samples, spread over all shards, whose features the teachers compute again; 0 loads no teacher."""
