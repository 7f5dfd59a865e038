"""Images and texts → features: each image once on any number of processes, cached per weights."""

import functools
import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from clipkd import distributed, files, progress
from clipkd.data import Feed, loader_options, pixel_bytes
from clipkd.evaluation import zeroshot
from clipkd.evaluation.sets import EvaluationSet, Images
from clipkd.models.encoder import PROBES, Encoder

FEATURES_VERSION = 1
"""Raise it when the same model and source would give other features."""

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Embedder:
    """A model that encodes evaluation data. Features are float32, unit-norm, on the CPU. Call methods on every process."""

    encoder: Encoder
    """On `device`."""
    device: torch.device
    batch_size: int = 256
    num_workers: int = 2
    precision: Precision = "fp32"
    cache: Path | None = None
    """Folder of cached features, named by hashes of model and source."""

    @functools.cached_property
    def weights_sha256(self) -> str:
        return self.encoder.weights_sha256()

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of all that features depend on: weights, architecture, preprocessing, tokens, precision, kind of device."""
        encoder = self.encoder
        tokens = encoder.spec.tokenize(list(PROBES)).tolist()
        versions = [importlib.metadata.version(name) for name in ("open_clip_torch", "torchvision", "transformers")]
        about = [FEATURES_VERSION, self.weights_sha256, encoder.architecture(), encoder.preprocess_config, tokens]
        return files.sha256_of([*about, self.precision, self.device.type, versions])

    @torch.inference_mode()
    def images(self, data: EvaluationSet, title: str) -> Float[Tensor, "n d"]:
        def encode() -> Tensor:
            shares = distributed.gather_objects(distributed.together(lambda: self.encode_share(data, title)))
            merged = {position: row for share in shares for position, row in zip(*share, strict=True)}
            assert len(merged) == len(data), f"{len(merged)} of {len(data)} images were encoded"
            return torch.stack([merged[position] for position in range(len(data))])

        return self.remember(encode, "images", data.stamps_sha256)

    def encode_share(self, data: EvaluationSet, title: str) -> tuple[list[int], Tensor]:
        """Positions and features of this process's share, every n-th image."""
        share = range(distributed.rank(), len(data), distributed.world_size())
        images = Subset(Images(data.pictures, self.encoder.preprocess), share)
        batch_bytes = min(self.batch_size, len(share)) * 4 * pixel_bytes([self.encoder.spec])  # of float32
        options = loader_options(self.num_workers, batch_bytes, pin_memory=self.device.type == "cuda")
        loader = DataLoader(images, batch_size=self.batch_size, **options)
        features = [torch.empty(0, self.encoder.dim)]
        positions: list[int] = []
        with Feed(loader) as feed:
            for _ in progress.track(range(len(loader)), title, len(loader), visible=distributed.rank() == 0):
                pixels, where = next(feed)
                with self.autocast():
                    features.append(self.encoder.encode_image(pixels.to(self.device)).cpu())
                positions += where.tolist()
        return positions, torch.cat(features)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], title: str = "captions") -> Float[Tensor, "n d"]:
        """Equal texts have bit-equal features."""

        return self.remember(lambda: self.share_out(texts, self.encode_texts, title), "texts", texts)

    @torch.inference_mode()
    def classifier(
        self, classnames: Sequence[str], templates: Sequence[str], title: str = "classes"
    ) -> Float[Tensor, "k d"]:
        """One unit vector per class, as open_clip builds it."""

        def encode(names: Sequence[str]) -> Tensor:
            return zeroshot.build_classifier(self.encode_texts, names, templates)

        return self.remember(
            lambda: self.share_out(classnames, encode, title, texts_per_item=len(templates)),
            "classifier",
            [classnames, templates],
        )

    def share_out(
        self, items: Sequence[str], encode: Callable[[Sequence[str]], Tensor], title: str, *, texts_per_item: int = 1
    ) -> Tensor:
        """A row per item on every process; each process encodes its share of the distinct items in batches."""
        own = list(dict.fromkeys(items))[distributed.rank() :: distributed.world_size()]
        size = max(1, 4 * self.batch_size // texts_per_item)  # four texts take about the memory of one image
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        bar = progress.track(parts, title, len(parts), visible=distributed.rank() == 0 and len(parts) > 1)
        shares = distributed.gather_objects((own, torch.cat([encode(part) for part in bar]) if own else torch.empty(0)))
        row_of = {item: row for share in shares for item, row in zip(*share, strict=True)}
        return torch.stack([row_of[item] for item in items])

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        with self.autocast():
            return self.encoder.encode_prompts(self.encoder.spec.tokenize(list(texts)).to(self.device)).cpu()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32")

    def remember(self, make: Callable[[], Tensor], kind: str, source: object) -> Tensor:
        """Cached features of this model and source; computed and cached if there are none."""
        path = None
        if self.cache is not None:
            path = self.cache / f"{kind}-{files.sha256_of([self.sha256, kind, source])[:32]}.safetensors"
            stored = load_features(path)
            if all(distributed.gather_objects(stored is not None)) and stored is not None:
                return stored
        features = make()
        if not features.isfinite().all():
            advice = "; evaluate it with --precision fp32" if self.precision != "fp32" else ": its weights are damaged"
            raise ValueError(f"{self.encoder.name}: features of {kind} are not finite{advice}")
        if distributed.rank() == 0 and path is not None:
            try:
                files.write_whole(path, lambda file: file.write(save({"features": features.contiguous()})))
            except OSError as error:
                warnings.warn(f"{path} is not written: {error}", stacklevel=2)
        return features


def load_features(path: Path) -> Tensor | None:
    """Cached features; None if the file is missing or damaged."""
    try:
        return files.read_tensors(path)["features"]
    except (OSError, ValueError, KeyError):
        return None
