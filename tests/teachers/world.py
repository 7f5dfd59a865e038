"""Tiny data, teachers and caches, which the tests of this folder share."""

import dataclasses
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from clipkd.config.data import DataConfig
from clipkd.config.objective import ObjectiveConfig
from clipkd.config.terms import ClosedSetTerm, KLTerm
from clipkd.config.train import StudentConfig, TeacherConfig, TrainConfig
from clipkd.data import PairSet, open_pairs
from clipkd.models.encoder import Encoder
from clipkd.models.initial import create_student
from clipkd.models.load import load_model
from clipkd.teachers.cache.command import CacheConfig
from clipkd.teachers.cached import CachedTeachers, open_cache
from clipkd.teachers.store.manifest import Manifest, read_manifest
from tests.data.samples import encode, write_tar

SHARDS = (20, 18, 10)
"""Samples of each tar."""

NUM_VIEWS = 2

TOWERS: dict[str, dict[str, Any]] = {
    "first": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "second": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 24, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
}


@dataclass(frozen=True)
class World:
    """Data, two teachers, and the configuration of a cache of them."""

    folder: Path
    teachers: dict[str, str]
    captions: list[list[str]]
    """Captions of every sample."""

    def config(self, output: Path, *teachers: str, dtype_of_teachers: Any = "fp32", **changes: Any) -> CacheConfig:
        """Both teachers unless some are named, two views, float32."""
        options: dict[str, Any] = {
            "views": NUM_VIEWS,
            "dtype": "float32",
            "seed": 3,
            "precision": "fp32",
            "objective": ObjectiveConfig(kl=KLTerm(weight=1.0), keys="student"),
            "data": data_config(self.folder / "data"),
            "teacher": TeacherConfig(models=teachers or tuple(self.teachers.values()), dtype=dtype_of_teachers),
        }
        return CacheConfig(output=str(output), **(options | changes))


@dataclass(frozen=True)
class Made:
    """A cache, and the configuration that made it."""

    world: World
    folder: Path
    config: CacheConfig

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.folder)

    @property
    def pairs(self) -> PairSet:
        pairs = open_pairs(self.config.data)
        assert isinstance(pairs, PairSet)
        return pairs

    def training(self, *teachers: str, folder: Path | None = None, dtype: Any = "fp32", **changes: Any) -> TrainConfig:
        """The training that reads the cache; it names no teacher unless some are given."""
        values = {item.name: getattr(self.config, item.name) for item in dataclasses.fields(TrainConfig)}
        teacher = TeacherConfig(models=teachers, dtype=dtype, cache=str(folder or self.folder))
        return TrainConfig(**(values | {"output": "run", "teacher": teacher} | changes))

    def open(self, *teachers: str, student: Encoder | None = None, **changes: Any) -> CachedTeachers:
        config = self.training(*teachers, **changes)
        return open_cache(config, student or load_model(self.world.teachers["first"]), open_pairs(config.data))


def data_config(path: Path, **changes: Any) -> DataConfig:
    options: dict[str, Any] = {"num_workers": 0, "min_crop": 0.5, "background": "random", "caption_key": "captions"}
    return DataConfig(path=str(path), **(options | changes))


def captions_of(id: int) -> list[str]:
    """One to four captions; some occur twice in a sample, most in several, and the last tar has no new ones."""
    if id >= 38:
        return [f"a drawing of thing {id % 7}", "every sample's"]
    named = [f"a drawing of thing {id % 7}", f"sample number {id}, naïve ☃", "every sample's", "a drawing of thing 0"]
    return named[: 1 + id % 4]


def picture(id: int) -> tuple[str, bytes]:
    """Suffix and content: PNGs with and without transparency, and JPEGs that are decoded at half their size."""
    rng = np.random.default_rng(id)
    if id % 3 == 0:
        return "jpg", encode(Image.fromarray(rng.integers(0, 256, (90, 130, 3), np.uint8)), "JPEG")
    channels = 4 if id % 3 == 1 else 3
    return "png", encode(Image.fromarray(rng.integers(0, 256, (30, 24 + id, channels), np.uint8)), "PNG")


def members(id: int, captions: list[str] | None = None) -> list[tuple[str, bytes]]:
    suffix, content = picture(id)
    record = {"captions": captions_of(id) if captions is None else captions, "other": f"other {id}", "label": id % 8}
    return [(f"{id:03d}.{suffix}", content), (f"{id:03d}.json", json.dumps(record).encode())]


def write_data(folder: Path, sizes: tuple[int, ...] = SHARDS) -> Path:
    ends = list(itertools.accumulate(sizes))
    for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        write_tar(folder / f"{number:05d}.tar", itertools.chain.from_iterable(map(members, range(end - size, end))))
    return folder


def write_damaged_data(folder: Path) -> Path:
    """16 samples: 3 has no picture, 9 only blank captions, 11 a caption file that is no text."""
    parts = [members(id) for id in range(16)]
    parts[3][0] = (parts[3][0][0], b"no picture")
    parts[9] = members(9, ["  ", ""])
    parts[11][1] = (parts[11][1][0], b"{")
    write_tar(folder / "00000.tar", itertools.chain.from_iterable(parts))
    return folder


def write_model(folder: Path, name: str, *, seed: int, **changes: Any) -> str:
    """NAME@WEIGHTS of an untrained open_clip model."""
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(TOWERS.get(name, TOWERS["first"]) | changes))
    torch.manual_seed(seed)
    encoder = create_student(StudentConfig(model=str(path)))
    weights = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in encoder.model.state_dict().items()}, weights)
    return f"{path}@{weights}"


def make_world(folder: Path) -> World:
    write_data(folder / "data")
    teachers = {name: write_model(folder / "models", name, seed=seed) for seed, name in enumerate(TOWERS)}
    return World(folder, teachers, [captions_of(id) for id in range(sum(SHARDS))])


def with_classes(folder: Path) -> ObjectiveConfig:
    (folder / "classes.txt").write_text("cat\ndog\nhouse\n")
    term = ClosedSetTerm(weight=1.0, classes=str(folder / "classes.txt"), templates=("a {c}",), class_prior=False)
    return ObjectiveConfig(closed_set=term)


def content_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", ".verified.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def flip(path: Path, offset: int = -1) -> None:
    """Change one bit; size and time of change stay."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
