"""Images, tars, views and configurations made on the spot."""

import contextlib
import io
import itertools
import tarfile
from collections.abc import Callable, Iterable, Iterator
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
from clipkd.data.open import open_pairs
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


def write_images(folder: Path, numbers: Iterable[int]) -> list[str]:
    """N.png with a plain image of red N; returns the names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(plain_png(number))
    return [f"{number}.png" for number in numbers]


def write_table(path: Path, numbers: Iterable[int], caption_key: str = "caption") -> Path:
    """Thing N with its image beside the table, for every number."""
    lines = [f"{name},thing {name.removesuffix('.png')}\n" for name in write_images(path.parent, numbers)]
    path.write_text(f"image,{caption_key}\n" + "".join(lines))
    return path


def picture_rows(
    reds: Iterable[int | None],
    column: str = "image",
    /,
    *,
    features: dict[str, Any] | None = None,
    **columns: list[Any],
) -> Any:
    """A datasets.Dataset of plain images, or none for None, beside other columns."""
    import datasets

    datasets.disable_progress_bars()
    images = [None if red is None else {"bytes": plain_png(red), "path": None} for red in reds]
    if features:
        kinds = datasets.Features({column: datasets.Image(), **features})
        return datasets.Dataset.from_dict({column: images} | columns, features=kinds)
    return datasets.Dataset.from_dict({column: images} | columns).cast_column(column, datasets.Image())


def write_parquet(path: Path, numbers: Iterable[int], caption_key: str = "caption") -> Path:
    """Thing N with its image, for every number, and label 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {caption_key: [f"thing {number}" for number in numbers], "label": [0 for _ in numbers]}
    with path.open("wb") as file:
        picture_rows(numbers, **columns).to_parquet(file)
    return path


def write_benchmark(
    root: Path,
    *shards: list[tuple[str, bytes]],
    classnames: str = "cat\ndog\n",
    templates: str = "a photo of a {c}.\n{c}\n",
    kind: str = "",
) -> Path:
    """CLIP_benchmark's layout."""
    texts = {"test/nshards.txt": f"{len(shards)}\n", "dataset_type.txt": kind}
    texts |= {"classnames.txt": classnames, "zeroshot_classification_templates.txt": templates if classnames else ""}
    (root / "test").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if text:
            (root / name).write_text(text, encoding="utf-8")
    for number, members in enumerate(shards):
        write_tar(root / "test" / f"{number}.tar", members)
    return root


def pair_members(
    numbers: Iterable[int], name: str = "{:04}", picture: Callable[[int], bytes] = plain_png
) -> list[tuple[str, bytes]]:
    """Files of webdataset pairs: thing N with its image."""
    return [
        member
        for number in numbers
        for key in [name.format(number)]
        for member in ((f"{key}.png", picture(number)), (f"{key}.txt", f"thing {number}".encode()))
    ]


def write_shards(folder: Path, sizes: list[int], picture: Callable[[int], bytes] = plain_png) -> list[Path]:
    """Shards of so many samples s0000, s0001, …"""
    ends = list(itertools.accumulate(sizes, initial=0))
    return [
        write_tar(folder / f"{shard:05}.tar", pair_members(range(*ends[shard : shard + 2]), "s{:04}", picture))
        for shard in range(len(sizes))
    ]


def open_set(*paths: str | Path, **options: Any) -> PairSet:
    """Local pairs as training opens them: shards unless a format says otherwise."""
    pairs = open_pairs(DataConfig(path=tuple(map(str, paths)), **options))
    assert isinstance(pairs, PairSet)
    return pairs


def things(source: PairSet) -> list[int]:
    return [int(source.read(number).captions[0].removeprefix("thing ")) for number in range(len(source))]


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
