"""Images and texts → features: every image once, whatever the number of processes, and never twice for the same weights."""

import functools
import hashlib
import importlib.metadata
import json
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from clipkd import distributed, files, progress
from clipkd.evaluation import zeroshot
from clipkd.evaluation.sets import EvaluationSet, Images
from clipkd.models.encoder import Encoder
from clipkd.models.load import PROBES

FEATURES_VERSION = 1
"""Changes when the same model and source would give other features."""

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
    def weights_sha256(self) -> str:
        return self.encoder.weights_sha256()

    @functools.cached_property
    def sha256(self) -> str:
        """Of all that its features depend on: weights, architecture, preprocessing, tokens, precision, and who computes them."""
        encoder = self.encoder
        tokens = encoder.spec.tokenize(list(PROBES)).tolist()
        versions = [importlib.metadata.version(name) for name in ("open_clip_torch", "torchvision", "transformers")]
        about = [FEATURES_VERSION, self.weights_sha256, encoder.architecture(), encoder.preprocess_config, tokens]
        return hashlib.sha256(json.dumps([*about, self.precision, versions], default=str).encode()).hexdigest()

    @torch.inference_mode()
    def images(self, data: EvaluationSet, title: str) -> Float[Tensor, "n d"]:
        def encode() -> Tensor:
            parts = distributed.gather_objects(distributed.together(lambda: self.encode_share(data, title)))
            merged = {position: row for part in parts for position, row in zip(*part, strict=True)}
            assert len(merged) == len(data), f"{len(merged)} of {len(data)} images were encoded"
            return torch.stack([merged[position] for position in range(len(data))])

        return self.remember(encode, "images", data.stamps_sha256)

    def encode_share(self, data: EvaluationSet, title: str) -> tuple[list[int], Tensor]:
        """Every n-th image, and where it stands."""
        share = range(distributed.rank(), len(data), distributed.world_size())
        images = Subset(Images(data.pictures, self.encoder.preprocess), share)
        loader = DataLoader(
            images,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_interrupts,
        )
        features = [torch.empty(0, self.encoder.dim)]
        positions: list[int] = []
        for pixels, where in progress.track(loader, title, len(loader), visible=distributed.rank() == 0):
            with self.autocast():
                features.append(self.encoder.encode_image(pixels.to(self.device)).cpu())
            positions += where.tolist()
        return positions, torch.cat(features)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], title: str = "captions") -> Float[Tensor, "n d"]:
        """Equal texts have equal features, to the bit."""

        def encode(own: Sequence[str]) -> Tensor:
            parts = [own[start : start + self.texts_at_a_time] for start in range(0, len(own), self.texts_at_a_time)]
            bar = progress.track(parts, title, len(parts), visible=distributed.rank() == 0)
            return torch.cat([self.encode_texts(part) for part in bar])

        return self.remember(lambda: share_out(texts, encode), "texts", texts)

    @torch.inference_mode()
    def classifier(
        self, classnames: Sequence[str], templates: Sequence[str], title: str = "classes"
    ) -> Float[Tensor, "k d"]:
        """One unit vector per class, as open_clip builds it."""

        def encode(own: Sequence[str]) -> Tensor:
            steps = -(-len(own) // max(1, self.texts_at_a_time // len(templates)))
            with progress.Bar(title, steps, visible=distributed.rank() == 0 and steps > 1) as bar:

                def prompts(texts: list[str]) -> Tensor:
                    features = self.encode_texts(texts)
                    bar.advance()
                    return features

                return zeroshot.build_classifier(prompts, own, templates, batch_size=self.texts_at_a_time)

        return self.remember(lambda: share_out(classnames, encode), "classifier", [classnames, templates])

    @property
    def texts_at_a_time(self) -> int:
        """Texts are short: four of them take about the memory of an image."""
        return 4 * self.batch_size

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        with self.autocast():
            return self.encoder.encode_prompts(self.encoder.spec.tokenize(list(texts)).to(self.device)).cpu()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32")

    def remember(self, make: Callable[[], Tensor], kind: str, source: object) -> Tensor:
        """What is cached for this model and source, or made now and cached."""
        path = None
        if self.cache is not None:
            key = hashlib.sha256(json.dumps([self.sha256, kind, source]).encode()).hexdigest()
            path = self.cache / f"{kind}-{key[:32]}.safetensors"
            stored = load_features(path)
            if all(distributed.gather_objects(stored is not None)) and stored is not None:
                return stored
        features = make()
        if not features.isfinite().all():
            advice = "; evaluate it with --precision fp32" if self.precision != "fp32" else ": its weights are damaged"
            raise ValueError(f"{self.encoder.name}: features of {kind} are not finite{advice}")
        if distributed.rank() == 0 and path is not None:
            self.store(path, features)
        return features

    def store(self, path: Path, features: Tensor) -> None:
        """What cannot be kept is made again another time."""
        try:
            files.write_whole(path, lambda file: file.write(save({"features": features.contiguous()})))
        except OSError as error:
            warnings.warn(f"{path} is not kept: {error}", stacklevel=2)


def leave_interrupts(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main one ends its loader processes (by SIGTERM)."""
    signal.signal(signal.SIGINT, lambda *_: None)


def share_out(items: Sequence[str], encode: Callable[[Sequence[str]], Tensor]) -> Tensor:
    """Each process encodes its share of the distinct items; every process gets a row per item."""
    distinct = list(dict.fromkeys(items))
    own = distinct[distributed.rank() :: distributed.world_size()]
    rows = distributed.gather_objects(encode(own) if own else None)
    row_of: dict[str, Tensor] = {}
    for rank, features in enumerate(rows):
        if features is not None:
            row_of |= zip(distinct[rank :: distributed.world_size()], features, strict=True)
    return torch.stack([row_of[item] for item in items])


def load_features(path: Path) -> Tensor | None:
    """None for what is not there, or damaged: then it is made again."""
    try:
        return load_file(path)["features"]
    except (OSError, SafetensorError, KeyError):
        return None
