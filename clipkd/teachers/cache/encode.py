"""Compute the features of every view and caption, from the pixels and tokens that training would show the teachers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipkd.config.train import Tower
from clipkd.data import Augment, BadSample, Feed, PairSet, Skip, loader_options, pixel_bytes
from clipkd.models.encoder import Encoder
from clipkd.teachers.cache.captions import require_readable
from clipkd.teachers.cache.plan import CacheConfig
from clipkd.teachers.store.manifest import Shard, fingerprint
from clipkd.views import Views

IMAGES_AT_A_TIME = 128

FEWEST_ROWS = 8
"""Smaller batches take other kernels (matrix times vector), whose features differ in the last bits."""

SampleViews = tuple[list[np.ndarray], int, Skip | None]


class ViewBatch(NamedTuple):
    """Consecutive samples of a shard with all their views."""

    pixels: tuple[Tensor, ...]
    """One per kind of pixels: uint8 [samples · views, 3, h, w], zeros for a sample that cannot be used."""
    fingerprints: tuple[int, ...]
    skips: tuple[Skip | None, ...]
    """Per sample: why it cannot be used."""


class EveryView(Dataset):
    """Sample id → its pixels (one uint8 [views, h, w, 3] per kind), its fingerprint, and why it cannot be used."""

    def __init__(self, pairs: PairSet, augment: Augment, num_views: int) -> None:
        self.pairs, self.augment, self.num_views = pairs, augment, num_views

    def __getitem__(self, id: int) -> SampleViews:
        try:
            pair = self.pairs.read(id)
            views = [self.augment.pixels(pair, view, id, seed=self.augment.seed) for view in range(self.num_views)]
        except BadSample as bad:
            require_readable(bad)
            return [np.zeros((self.num_views, *spec.size, 3), np.uint8) for spec in self.augment.specs], 0, bad.skip
        return [np.stack(kind) for kind in zip(*views, strict=True)], fingerprint(pair), None


def collate(samples: list[SampleViews]) -> ViewBatch:
    pixels, fingerprints, skips = zip(*samples, strict=True)
    kinds = [torch.from_numpy(np.concatenate(kind)).permute(0, 3, 1, 2) for kind in zip(*pixels, strict=True)]
    return ViewBatch(tuple(kind.contiguous() for kind in kinds), fingerprints, skips)


@dataclass(frozen=True)
class FeatureEncoder:
    """The models whose features are stored, and the data they see."""

    config: CacheConfig
    pairs: PairSet
    teachers: list[Encoder]
    student: Encoder | None
    frozen: tuple[Tower, ...]
    """The student's frozen towers that are none of the teachers'."""
    accelerator: Accelerator

    def towers(self, side: Tower) -> dict[str, tuple[Encoder, Callable[[Tensor], Tensor]]]:
        """Kind of features → the model, and its tower."""
        found = {f"{side}.{n}": (one, getattr(one, f"encode_{side}")) for n, one in enumerate(self.teachers)}
        if self.student is not None and side in self.frozen:
            found[f"{side}.student"] = self.student, partial(self.student.encode_frozen, side)
        return found

    def views(self) -> Views:
        return Views([encoder.spec for encoder, _ in self.towers("image").values()])

    def batches(self, shard: Shard) -> list[list[int]]:
        """Sample ids, cut within the shard so that they do not depend on the number of processes."""
        ids, size = list(range(shard.first, shard.first + shard.rows)), max(1, IMAGES_AT_A_TIME // self.config.views)
        return [ids[start : start + size] for start in range(0, len(ids), size)]

    def feed(self, shards: list[Shard]) -> Feed[ViewBatch]:
        augment = Augment(self.config.data, self.views(), self.config.seed)
        loader = DataLoader(
            EveryView(self.pairs, augment, self.config.views),
            batch_sampler=[batch for shard in shards for batch in self.batches(shard)],
            collate_fn=collate,
            **loader_options(
                self.config.data.num_workers,
                max(IMAGES_AT_A_TIME, self.config.views) * pixel_bytes(augment.specs),
                pin_memory=self.accelerator.device.type == "cuda",
            ),
        )
        return Feed(loader)

    @torch.inference_mode()
    def encode_images(self, batch: ViewBatch) -> dict[str, np.ndarray]:
        """image.N and image.student → features [samples, views, width], in the type in which they are stored."""
        sent = [kind.to(self.accelerator.device, non_blocking=True) for kind in batch.pixels]
        pixels = dict(zip([spec.pixels for spec in self.views().pixel_specs], sent, strict=True))
        found = {}
        for kind, (encoder, tower) in self.towers("image").items():
            features = self.encode(encoder, tower, pixels[encoder.spec.pixels])
            found[kind] = features.reshape(-1, self.config.views, features.shape[-1])
        return found

    @torch.inference_mode()
    def encode_texts(self, texts: list[str]) -> dict[str, np.ndarray]:
        """text.N and text.student → features [texts, width], in the type in which they are stored."""
        return {
            kind: self.encode(encoder, tower, encoder.spec.tokenize(texts).to(self.accelerator.device))
            for kind, (encoder, tower) in self.towers("text").items()
        }

    def encode(self, encoder: Encoder, tower: Callable[[Tensor], Tensor], inputs: Tensor) -> np.ndarray:
        """Raises: ValueError if the features are not finite."""
        padded = inputs if len(inputs) >= FEWEST_ROWS else inputs.repeat(FEWEST_ROWS, *[1] * (inputs.ndim - 1))
        with self.accelerator.autocast():
            features = tower(padded)[: len(inputs)].to(getattr(torch, self.config.dtype))
        if not features.isfinite().all():
            raise ValueError(
                f"features of {encoder.name} are not finite: its weights are damaged, or overflow at this precision; see "
                "precision, dtype and teacher.dtype"
            )
        stored = features.cpu()
        return (stored.view(torch.uint16) if self.config.dtype == "bfloat16" else stored).numpy()
