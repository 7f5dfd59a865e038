"""Samples → features of every view, by the teachers that training would ask, from the pixels that it would show them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipkd.data import Augment, BadSample, Feed, PairSet, Skip, loader_options
from clipkd.models.encoder import Encoder
from clipkd.teachers.cache.captions import Captions, require_readable
from clipkd.teachers.cache.options import CacheConfig
from clipkd.teachers.store.manifest import DTYPES, Shard, fingerprint
from clipkd.views import Views

IMAGES_AT_A_TIME, TEXTS_AT_A_TIME = 128, 512


class EncodedViews(NamedTuple):
    """Some samples of a shard in order, with all their views."""

    pixels: tuple[Tensor, ...]
    """One per kind of pixels, uint8 [samples · views, 3, h, w]; zeros of a sample that cannot be used."""
    fingerprints: list[int]
    skips: list[Skip | None]
    """Why a sample cannot be used."""


class EveryView(Dataset):
    """Id → pixels of all views, each kind [views, h, w, 3], and the sample's fingerprint; or why there are none."""

    def __init__(self, pairs: PairSet, augment: Augment, num_views: int) -> None:
        self.pairs, self.augment, self.num_views = pairs, augment, num_views

    def __getitem__(self, id: int) -> tuple[list[np.ndarray], int, Skip | None]:
        try:
            pair = self.pairs.read(id)
            views = [self.augment(pair, view, id).pixels for view in range(self.num_views)]
        except BadSample as bad:
            require_readable(bad)
            shapes = [(self.num_views, *spec.size, 3) for spec in self.augment.specs]
            return [np.zeros(shape, np.uint8) for shape in shapes], 0, bad.skip
        return [np.stack(kind) for kind in zip(*views, strict=True)], fingerprint(pair), None


def collate(samples: list[tuple[list[np.ndarray], int, Skip | None]]) -> EncodedViews:
    pixels, fingerprints, skips = zip(*samples, strict=True)
    kinds = [torch.from_numpy(np.concatenate(kind)).permute(0, 3, 1, 2) for kind in zip(*pixels, strict=True)]
    return EncodedViews(tuple(kind.contiguous() for kind in kinds), list(fingerprints), list(skips))


@dataclass(frozen=True)
class Job:
    """All that a shard is made from."""

    config: CacheConfig
    pairs: PairSet
    captions: Captions
    teachers: list[Encoder]
    student: Encoder | None
    """One whose frozen text tower is no teacher's."""
    accelerator: Accelerator

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def views(self) -> Views:
        return Views([teacher.spec for teacher in self.teachers])

    @property
    def samples_at_a_time(self) -> int:
        return max(1, IMAGES_AT_A_TIME // self.config.views)

    def dataset(self) -> EveryView:
        return EveryView(self.pairs, Augment(self.config.data, self.views, self.config.seed), self.config.views)

    def batches(self, shard: Shard) -> list[list[int]]:
        """Ids. Cut within a shard, so that it comes out the same on any number of processes."""
        ids, size = range(shard.first, shard.first + shard.rows), self.samples_at_a_time
        return [list(ids[start : start + size]) for start in range(0, len(ids), size)]

    def feed(self, shards: list[Shard]) -> Feed[EncodedViews]:
        loader = DataLoader(
            self.dataset(),
            batch_sampler=[batch for shard in shards for batch in self.batches(shard)],
            collate_fn=collate,
            **loader_options(self.config.data, self.device.type == "cuda"),
        )
        return Feed(loader, epoch=lambda _, __: 0.0)

    def num_batches(self, shard: Shard) -> int:
        return len(self.batches(shard)) + -(-shard.texts // TEXTS_AT_A_TIME)

    @torch.inference_mode()
    def encode_images(self, batch: EncodedViews) -> list[np.ndarray]:
        """Features [samples, views, width] of each teacher, as they are stored."""
        kinds = [spec.pixels for spec in self.views.pixel_specs]
        pixels = [kind.to(self.device, non_blocking=True) for kind in batch.pixels]
        found = []
        for teacher in self.teachers:
            images = teacher.spec.normalize(pixels[kinds.index(teacher.spec.pixels)])
            with self.accelerator.autocast():
                features = not_alone(teacher.encode_image, images)
            found.append(self.store(features, teacher).reshape(-1, self.config.views, teacher.dim))
        return found

    @torch.inference_mode()
    def encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        """Features [texts, width] of each teacher, and of the student if it is here, as they are stored."""
        found = []
        for encoder in (*self.teachers, *filter(None, [self.student])):
            with self.accelerator.autocast():
                features = not_alone(encoder.encode_text, encoder.spec.tokenize(texts).to(self.device))
            found.append(self.store(features, encoder))
        return found

    def store(self, features: Tensor, teacher: Encoder) -> np.ndarray:
        """Raises: ValueError if they are not finite."""
        if not features.isfinite().all():
            raise ValueError(
                f"features of {teacher.name} are not finite: its weights are damaged, or overflow at this precision; see "
                "precision and teacher.dtype"
            )
        features = features.cpu()
        if self.config.dtype == "bfloat16":
            return features.bfloat16().view(torch.uint16).numpy()
        return features.to(getattr(torch, self.config.dtype)).numpy()


FEWEST_ROWS = 8


def not_alone(encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Batches of one or two take other kernels (matrix times vector) than larger ones, and come out with other last bits."""
    if len(inputs) >= FEWEST_ROWS:
        return encode(inputs)
    return encode(inputs.repeat(FEWEST_ROWS, *[1] * (inputs.ndim - 1)))[: len(inputs)]


def encode_shard(
    job: Job, shard: Shard, feed: Feed[EncodedViews], advance: Callable[[], Any]
) -> tuple[dict[str, np.ndarray], list[Skip]]:
    """Arrays of a shard by kind, and its unusable samples. advance: called after each batch.

    Raises: ValueError if features are not finite or captions have changed; RunStopped if a loader process dies.
    """
    texts = job.captions.read_texts(shard, job.pairs)
    found_texts: list[list[np.ndarray]] = []
    for start in range(0, len(texts), TEXTS_AT_A_TIME):
        found_texts.append(job.encode_texts(texts[start : start + TEXTS_AT_A_TIME]))
        advance()
    found_images: list[list[np.ndarray]] = []
    fingerprints: list[int] = []
    skips: list[Skip | None] = []
    for _ in job.batches(shard):
        batch = next(feed)
        found_images.append(job.encode_images(batch))
        fingerprints += batch.fingerprints
        skips += batch.skips
        advance()
    table = job.captions.table(shard)
    bad = np.array([skip is not None for skip in skips])
    table[bad] = -1
    arrays = {"samples": np.concatenate([np.array(fingerprints, np.int64)[:, None], table], axis=1)}
    for number, images in enumerate(zip(*found_images, strict=True)):
        arrays[f"image.{number}"] = np.concatenate(images)
        arrays[f"image.{number}"][bad] = 0
    for number, encoder in enumerate((*job.teachers, *filter(None, [job.student]))):
        kind = "text.student" if encoder is job.student else f"text.{number}"
        empty = np.empty((0, encoder.dim), DTYPES[job.config.dtype])
        arrays[kind] = np.concatenate([empty, *(part[number] for part in found_texts)])
    return arrays, [skip for skip in skips if skip is not None]
