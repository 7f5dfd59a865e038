"""Images and texts → features: every image once, whatever the number of processes, and never twice for the same weights."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from clipkd import distributed, models, progress, zeroshot
from clipkd.data import EvaluationSet, Images
from clipkd.models import Encoder

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Embedder:
    """A model at work. Features are float32, unit-norm and on the CPU. Call every method on every process."""

    encoder: Encoder
    """On `device`."""
    device: torch.device
    batch_size: int = 256
    num_workers: int = 2
    precision: Precision = "fp32"
    cache: Path | None = None
    """Folder that keeps features, by what they were made from."""

    @functools.cached_property
    def sha256(self) -> str:
        """Of all that its features depend on: weights, preprocessing, tokens, precision."""
        tokens = self.encoder.spec.tokenize(list(models.PROBES)).tolist()
        about = [self.encoder.weights_sha256(), self.encoder.preprocess_config, tokens, self.precision]
        return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()

    @torch.inference_mode()
    def images(self, data: EvaluationSet, title: str) -> Float[Tensor, "n d"]:
        def encode() -> Tensor:
            parts = distributed.gather_objects(distributed.together(lambda: self.encode_share(data, title)))
            merged = {position: row for part in parts for position, row in zip(*part, strict=True)}
            assert len(merged) == len(data), f"{len(merged)} of {len(data)} images were encoded"
            return torch.stack([merged[position] for position in range(len(data))])

        return self.remember(encode, "images", data.stamps_sha256())

    def encode_share(self, data: EvaluationSet, title: str) -> tuple[list[int], Tensor]:
        """Every n-th image, and where it stands."""
        share = range(distributed.rank(), len(data), distributed.world_size())
        images = Subset(Images(data.pictures, self.encoder.preprocess), share)
        loader = DataLoader(
            images, batch_size=self.batch_size, num_workers=self.num_workers, pin_memory=self.device.type == "cuda"
        )
        features = [torch.empty(0, self.encoder.dim)]
        positions: list[int] = []
        for pixels, where in progress.track(loader, title, len(loader), visible=distributed.rank() == 0):
            with self.autocast():
                features.append(self.encoder.encode_image(pixels.to(self.device)).cpu())
            positions += where.tolist()
        return positions, torch.cat(features)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        return self.remember(lambda: torch.cat([self.encode_texts(part) for part in batches(texts)]), "texts", texts)

    @torch.inference_mode()
    def classifier(self, classnames: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "k d"]:
        """One unit vector per class, as open_clip builds it."""
        return self.remember(
            lambda: zeroshot.build_classifier(self.encode_texts, classnames, templates),
            "classifier",
            [classnames, templates],
        )

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        with self.autocast():
            return self.encoder.encode_text(self.encoder.spec.tokenize(list(texts)).to(self.device)).cpu()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32")

    def remember(self, make: Callable[[], Tensor], kind: str, source: object) -> Tensor:
        """What is cached for this model and source, or made now and cached."""
        if self.cache is None:
            return make()
        key = hashlib.sha256(json.dumps([self.sha256, kind, source]).encode()).hexdigest()
        path = self.cache / f"{kind}-{key[:32]}.safetensors"
        stored = load_features(path)
        if all(distributed.gather_objects(stored is not None)) and stored is not None:
            return stored
        features = make()
        if distributed.rank() == 0:
            self.cache.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            save_file({"features": features.contiguous()}, temporary)
            os.replace(temporary, path)
        return features


def batches(texts: Sequence[str], size: int = 1024) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


def load_features(path: Path) -> Tensor | None:
    """None for what is not there, or damaged: then it is made again."""
    try:
        return load_file(path)["features"]
    except (OSError, SafetensorError, KeyError):
        return None
