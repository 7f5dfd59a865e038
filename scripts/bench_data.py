"""Images per second and loader process: clipkd's loader, a plain webdataset pipeline, and torchvision's ImageFolder.

    python scripts/bench_data.py --output eval/results/data.jsonl

All three read the same JPEGs (made here, of two sizes), decode them, crop, resize to 224 pixels and tokenize with CLIP's BPE
(ImageFolder has no captions), round by round in one run, so that a busy machine slows all alike. Also timed: a first index of
the shards, raw reads, and the decoding alone. What differs: webdataset shuffles within a buffer, ours within blocks; torchvision
crops at random ratios of the image, ours relative to its own ratio; ours sends bytes to the training process, the
others send floats.
"""

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import PIL
import torch
import torchvision
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from clipkd.config.data import DataConfig
from clipkd.config.objective import ObjectiveConfig
from clipkd.config.terms import InfoNCETerm
from clipkd.config.train import TrainConfig
from clipkd.data import PairSet, open_feed, open_pairs
from clipkd.data.tar_index import scan_tar
from clipkd.images import open_image
from clipkd.views import Views, ViewSpec

SIZES = {"256 × 256": (256, 256), "1024 × 768": (1024, 768)}
VIEW = 224
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def draw_photo(size: tuple[int, int], rng: np.random.Generator) -> bytes:
    """A JPEG about as hard to decode as a photo: noise with energy at every scale."""
    picture = np.zeros((size[1], size[0], 3), np.float32)
    for cells in (4, 16, 64, 256):
        noise = rng.normal(0, 60 / np.sqrt(cells), (cells * 3 // 4, cells, 3)) * 4
        layers = [
            Image.fromarray(noise[..., c].astype(np.float32)).resize(size, Image.Resampling.BICUBIC) for c in range(3)
        ]
        picture += np.stack([np.asarray(layer) for layer in layers], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(picture + 128, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_data(folder: Path, size: tuple[int, int], num_images: int, num_shards: int) -> int:
    """The same images as shards/ and as folders/; returns their mean size in bytes."""
    rng, total = np.random.default_rng(0), 0
    (folder / "shards").mkdir(parents=True)
    (folder / "folders" / "all").mkdir(parents=True)
    for shard in range(num_shards):
        with TarWriter(str(folder / "shards" / f"{shard:05d}.tar")) as tar:
            for number in range(shard, num_images, num_shards):
                photo = draw_photo(size, rng)
                total += len(photo)
                tar.write(
                    {"__key__": f"{number:06d}", "jpg": photo, "txt": f"a photo of thing number {number} outdoors"}
                )
                (folder / "folders" / "all" / f"{number:06d}.jpg").write_bytes(photo)
    return total // num_images


def clipkd_batches(folder: Path, options: argparse.Namespace) -> Iterable[Any]:
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    spec = ViewSpec(
        size=(VIEW, VIEW), mean=MEAN, std=STD, interpolation="bicubic", tokenize=tokenizer, tokenizer_name="CLIP BPE"
    )
    steps = options.images // options.batch_size
    config = TrainConfig(
        data=DataConfig(path=str(folder / "shards"), num_workers=options.workers),
        batch_size=options.batch_size,
        steps=steps,
        objective=ObjectiveConfig(info_nce=InfoNCETerm(weight=1)),
    )
    views = Views([spec])
    feed = open_feed(open_pairs(config.data), config, views)
    try:
        for _ in range(steps):
            (view,) = views.of(next(feed))
            yield view._replace(images=spec.normalize(view.images))
    finally:
        feed.close()


def transform() -> Callable[[Image.Image], torch.Tensor]:
    crop = v2.RandomResizedCrop(VIEW, scale=(0.9, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    steps = [v2.RGB(), crop, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose(steps)


def webdataset_batches(folder: Path, options: argparse.Namespace) -> Iterable[Any]:
    tokenizer, augment = open_clip.get_tokenizer("ViT-B-32"), transform()
    urls = sorted(map(str, (folder / "shards").glob("*.tar")))
    pairs = (
        WebDataset(urls, shardshuffle=100, seed=0, empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(augment, lambda text: tokenizer([text])[0])
        .batched(options.batch_size, partial=False)
    )
    return DataLoader(
        cast("Any", pairs), batch_size=None, num_workers=options.workers, prefetch_factor=4, worker_init_fn=one_thread
    )


def torchvision_batches(folder: Path, options: argparse.Namespace) -> Iterable[Any]:
    images = ImageFolder(str(folder / "folders"), transform())
    return DataLoader(
        images,
        batch_size=options.batch_size,
        shuffle=True,
        num_workers=options.workers,
        drop_last=True,
        prefetch_factor=4,
        worker_init_fn=one_thread,
    )


def one_thread(_: int) -> None:
    torch.set_num_threads(1)


LOADERS = {"clipkd": clipkd_batches, "webdataset": webdataset_batches, "torchvision": torchvision_batches}


def images_per_second(batches: Iterable[Any], batch_size: int) -> float:
    """From the second batch on: starting the processes is left out."""
    started, images = 0.0, 0
    for number, _ in enumerate(batches):
        if number == 0:
            started = time.perf_counter()
        else:
            images += batch_size
    return images / (time.perf_counter() - started)


def rate(work: Callable[[int], object], count: int) -> float:
    started = time.perf_counter()
    for number in range(count):
        work(number)
    return count / (time.perf_counter() - started)


def parts(folder: Path, num_images: int) -> dict[str, float]:
    """What a sample costs step by step, in one process: samples per second of each."""
    shards = sorted((folder / "shards").glob("*.tar"))
    pairs = open_pairs(DataConfig(path=str(folder / "shards")))
    assert isinstance(pairs, PairSet)
    order = np.random.default_rng(0).permutation(len(pairs)).tolist()
    images = [pairs.read(index).image for index in order[:200]]
    started = time.perf_counter()
    for shard in shards:
        scan_tar(shard)
    return {
        "index": num_images / (time.perf_counter() - started),
        "read": rate(lambda number: pairs.read(order[number]), len(order)),
        "decode": rate(lambda number: open_image(images[number]).convert("RGB"), len(images)),
    }


def table(results: Path) -> str:
    """Markdown, one line per image size and loader."""
    lines = ["| JPEG | loader | images/s per process | clipkd is |", "|---|---|---:|---:|"]
    for row in map(json.loads, results.read_text(encoding="utf-8").splitlines()):
        rate = statistics.median(row["images_per_second_per_process"])
        image = f"{row['image']}, {row['mean_bytes'] / 1000:.0f} kB"
        lines.append(f"| {image} | {row['loader']} | {rate:.0f} | {row['clipkd_ratio']:.2f} × |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("eval/results/data.jsonl"))
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1, help="loader processes of each; the rates are divided by it")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            mean_bytes = write_data(folder, size, options.images, options.shards)
            rates: dict[str, list[float]] = {loader: [] for loader in LOADERS}
            single = parts(folder, options.images)
            for _ in range(options.rounds):
                for loader, make in LOADERS.items():
                    rates[loader].append(images_per_second(make(folder, options), options.batch_size) / options.workers)
            print(f"{name} JPEG of {mean_bytes} bytes, {options.workers} loader processes")
            print("  samples per second of one step alone: " + ", ".join(f"{k} {v:,.0f}" for k, v in single.items()))
            for loader, measured in rates.items():
                ratio = statistics.median(a / b for a, b in zip(rates["clipkd"], measured, strict=True))
                print(f"  {loader:<12}{statistics.median(measured):8.1f} images/s per process; clipkd is {ratio:.2f} ×")
                rows.append(
                    {
                        "loader": loader,
                        "image": name,
                        "mean_bytes": mean_bytes,
                        "images_per_second_per_process": [round(value, 1) for value in measured],
                        "clipkd_ratio": round(ratio, 3),
                        "samples_per_second_alone": {k: round(v) for k, v in single.items()},
                        "num_images": options.images,
                        "batch_size": options.batch_size,
                        "num_workers": options.workers,
                        "cores": os.cpu_count(),
                        "machine": platform.machine(),
                        "versions": {m.__name__: m.__version__ for m in (torch, torchvision, webdataset, PIL)},
                    }
                )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"→ {options.output}")


if __name__ == "__main__":
    main()
