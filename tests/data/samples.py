"""Images, tars, views and configurations made on the spot."""

import contextlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clipkd import distributed
from clipkd.config.data import DataConfig
from clipkd.config.objective import ObjectiveConfig
from clipkd.config.terms import InfoNCETerm
from clipkd.config.train import TrainConfig
from clipkd.data.loader import Feed
from clipkd.data.sources import PairSet
from clipkd.views import Batch, ViewSpec


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def coordinates(width: int = 64, height: int = 48) -> Image.Image:
    """Red grows from left to right, green from top to bottom: the colours of a crop say where it was taken."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return Image.fromarray(pixels)


def plain_png(red: int) -> bytes:
    return encode(Image.new("RGB", (8, 6), (red, 0, 0)), "PNG")


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pair_members(numbers: Iterable[int], name: str = "{:04}") -> list[tuple[str, bytes]]:
    """Files of webdataset pairs: thing N with a plain image of red N."""
    return [
        member
        for number in numbers
        for key in [name.format(number)]
        for member in ((f"{key}.png", plain_png(number)), (f"{key}.txt", f"thing {number}".encode()))
    ]


def labels(source: PairSet) -> list[int]:
    return [source.read(number).label for number in range(len(source))]


def assert_things(source: PairSet, captions: Any = lambda number: (f"thing {number}",)) -> None:
    """Number N is thing N with its image, unless other captions are expected."""
    for number in range(len(source)):
        pair = source.read(number)
        assert (pair.image, pair.captions) == (plain_png(number), captions(number)), pair.key
        assert source.read(number, image=False).captions == pair.captions


def take(feed: Feed[Batch], steps: int) -> list[Batch]:
    with feed:
        return [next(feed) for _ in range(steps)]


def train_config(data: DataConfig, *, batch_size: int = 4, steps: int = 6, seed: int = 0) -> TrainConfig:
    objective = ObjectiveConfig(info_nce=InfoNCETerm(weight=1.0))
    return TrainConfig(data=data, batch_size=batch_size, steps=steps, seed=seed, objective=objective)


@contextlib.contextmanager
def as_process(rank: int, world_size: int) -> Iterator[None]:
    """Within it, this process is one of several as far as the data room sees. Data is opened before: no gathering."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "rank", lambda: rank)
        patch.setattr(distributed, "world_size", lambda: world_size)
        yield


def tokenize(texts: list[str]) -> Tensor:
    """The first four characters."""
    return torch.tensor([[ord(letter) for letter in text.ljust(4)[:4]] for text in texts])


def view_spec(size: int, *, mean: float = 0.0, std: float = 1.0, tokenizer_name: str = "letters") -> ViewSpec:
    return ViewSpec(
        size=(size, size),
        mean=(mean,) * 3,
        std=(std,) * 3,
        interpolation="bilinear",
        tokenize=tokenize,
        tokenizer_name=tokenizer_name,
    )
