"""Features and labels → metrics with their intervals, and a table of all samples."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipkd.evaluation import metrics as scoring
from clipkd.evaluation.embed import Embedder
from clipkd.evaluation.metrics import Interval
from clipkd.evaluation.sets import EvaluationSet
from clipkd.evaluation.subjects import Subject

RECALL_AT = (1, 5, 10)
CHUNK = 8192
"""Images whose cosines with all classes are held in memory at once."""


@dataclass
class Measured:
    """A model's result on a task."""

    metrics: dict[str, float | None]
    ci95: dict[str, Interval]
    counts: dict[str, int]
    samples: dict[str, list[Any]]
    """One column per name, one entry per sample."""
    calibration: dict[str, Any] | None = None
    scores: "ClassScores | None" = None
    """classification: for the comparison with a teacher."""
    recalls: list[float] = field(default_factory=list)
    """classification: recall of each class, NaN without images; multilabel: average precision of each class."""


@dataclass(frozen=True)
class ClassScores:
    """Cosines of images with classes, a chunk at a time."""

    images: Float[Tensor, "n d"]
    classifier: Float[Tensor, "k d"]
    scale: float
    """The model's own logit scale."""

    def cosines(self) -> Iterator[Float[Tensor, "c k"]]:
        return scoring.products(self.images, self.classifier, CHUNK)

    def log_probabilities(self) -> Iterator[Float[Tensor, "c k"]]:
        for cosines in self.cosines():
            yield (self.scale * cosines).log_softmax(dim=1)


def measure(embedder: Embedder, subject: Subject, *, title: str = "evaluate") -> Measured:
    """Evaluate a model on a task. Call on every process; all get the result.

    Raises: ValueError naming the image that cannot be decoded.
    """
    data = subject.data
    images = embedder.images(data, title)
    if data.kind in ("retrieval", "pairs"):
        texts = embedder.texts([text for captions in data.captions for text in captions])
        measure_texts = measure_retrieval if data.kind == "retrieval" else measure_pairs
        return measure_texts(data, images, texts)
    assert data.classnames is not None
    assert data.templates is not None
    classifier = embedder.classifier(data.classnames, data.templates)
    scores = ClassScores(images, classifier, embedder.encoder.logit_scale.item())
    return measure_multilabel(data, scores) if data.kind == "multilabel" else measure_classes(data, scores)


def measure_classes(data: EvaluationSet, scores: ClassScores) -> Measured:
    """Top-1, top-5 and mean per-class recall; calibration of the softmax at the model's own scale."""
    labels, num_classes = torch.tensor(data.labels), len(scores.classifier)
    columns: list[tuple[Tensor, ...]] = []
    for cosines, truth in zip(scores.cosines(), labels[:, None].split(CHUNK), strict=True):
        ranked = rank_classes(cosines)
        own = cosines.gather(1, truth)
        others = cosines.scatter(1, truth, -torch.inf).max(dim=1, keepdim=True).values
        probabilities = (scores.scale * cosines).softmax(dim=1).gather(1, ranked)
        columns.append((ranked, own - others, probabilities))
    ranked, margin, probabilities = (torch.cat(parts) for parts in zip(*columns, strict=True))
    hits = ranked == labels[:, None]
    correct1, correct5 = hits[:, 0], hits.any(dim=1)
    n, num1, num5 = len(labels), int(correct1.sum()), int(correct5.sum())
    recalls = scoring.class_recalls(correct1, labels, num_classes)
    values: dict[str, float | None] = {
        "acc1": num1 / n,
        "acc5": num5 / n if num_classes >= 5 else None,
        "mean_per_class_recall": recalls[~recalls.isnan()].mean().item(),
    }
    intervals = {"acc1": scoring.proportion_interval(num1, n)}
    if num_classes >= 5:
        intervals["acc5"] = scoring.proportion_interval(num5, n)
    intervals["mean_per_class_recall"] = scoring.recall_interval(correct1, labels, num_classes)
    samples = {
        "key": data.keys,
        "label": list(data.labels),
        "top5": ranked.tolist(),
        "correct": correct1.tolist(),
        "margin": margin[:, 0].tolist(),
        "probabilities": probabilities.tolist(),  # of the top 5; the first is the confidence
    }
    calibration = scoring.calibrate(probabilities[:, 0], correct1)
    counts = {"num_correct1": num1, "num_correct5": num5}
    return Measured(values, intervals, counts, samples, calibration, scores, recalls.tolist())


def rank_classes(cosines: Float[Tensor, "b k"], *, num_ranks: int = 5) -> Int[Tensor, "b r"]:
    """The most similar classes of each image, best first; ties (duplicate names) in order of index."""
    return cosines.sort(dim=-1, descending=True, stable=True).indices[:, :num_ranks]


def measure_multilabel(data: EvaluationSet, scores: ClassScores) -> Measured:
    """Mean average precision over classes, of cosines (as CLIP_benchmark)."""
    assert data.targets is not None
    cosines, targets = torch.cat(list(scores.cosines())), torch.from_numpy(data.targets)
    precisions = scoring.average_precisions(cosines, targets)

    def mean(drawn: Tensor) -> Tensor:
        return scoring.average_precisions(cosines[drawn], targets[drawn]).mean()

    labels = [row.nonzero()[:, 0].tolist() for row in targets]
    return Measured(
        metrics={"mean_average_precision": precisions.mean().item()},
        ci95={"mean_average_precision": scoring.bootstrap_interval(mean, len(cosines))},
        counts={"num_positives": int(targets.sum())},
        samples={"key": data.keys, "label": labels, "scores": cosines.tolist()},
        recalls=precisions.tolist(),
    )


def measure_retrieval(data: EvaluationSet, images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"]) -> Measured:
    """Recall@k in both directions: whether one of a query's positives is among its k most similar (COCO, Flickr)."""
    counts = torch.tensor([len(captions) for captions in data.captions])
    every_image = torch.arange(len(images))
    image_of = every_image.repeat_interleave(counts)
    text_ranks = scoring.best_ranks(texts, images, image_of, every_image)  # of each caption's image among the images
    image_ranks = scoring.best_ranks(images, texts, every_image, image_of)
    values: dict[str, float | None] = {}
    intervals: dict[str, Interval] = {}
    found: dict[str, int] = {}
    for k in RECALL_AT:
        by_text, by_image = (text_ranks < k).double(), (image_ranks < k).double()
        found |= {f"num_images_found@{k}": int(by_text.sum()), f"num_texts_found@{k}": int(by_image.sum())}
        share = by_text.mean()
        values[f"image_retrieval_recall@{k}"] = share.item()
        values[f"text_retrieval_recall@{k}"] = by_image.mean().item()
        # Images are independent; the captions of one image are not.
        hits = torch.zeros(len(images), dtype=torch.float64).index_add_(0, image_of, by_text)
        per_image = share + (hits - share * counts) / counts.double().mean()
        intervals[f"image_retrieval_recall@{k}"] = scoring.mean_interval(per_image)
        intervals[f"text_retrieval_recall@{k}"] = scoring.proportion_interval(int(by_image.sum()), len(images))
        if k == 1:
            both = (per_image + by_image) / 2
            values["mean_recall@1"] = both.mean().item()
            intervals["mean_recall@1"] = scoring.mean_interval(both)
    samples = {
        "key": data.keys,
        "text_rank": image_ranks.tolist(),
        "image_ranks": [part.tolist() for part in text_ranks.split(counts.tolist())],
    }
    return Measured(values, intervals, {"num_captions": len(texts), **found}, samples)


def measure_pairs(data: EvaluationSet, images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"]) -> Measured:
    """Share of images strictly more similar to the true caption than to the false one (SugarCrepe, arXiv 2306.14610)."""
    true, false = texts.view(len(images), 2, -1).unbind(dim=1)
    margin = (images * true).sum(dim=1) - (images * false).sum(dim=1)
    same = torch.tensor([captions[0] == captions[1] for captions in data.captions])
    correct = (margin > 0) & ~same
    num, ties = int(correct.sum()), int(((margin == 0) | same).sum())
    return Measured(
        metrics={"acc": num / len(images)},
        ci95={"acc": scoring.proportion_interval(num, len(images))},
        counts={"num_correct": num, "num_ties": ties},
        samples={"key": data.keys, "correct": correct.tolist(), "margin": margin.tolist()},
    )
