"""Metrics, intervals and samples of every kind of task against plain Python and hand-made features."""

import importlib
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipkd.evaluation.measure import ClassScores, measure_classes, measure_multilabel, measure_pairs, measure_retrieval
from clipkd.evaluation.metrics import average_precisions, mean_interval, proportion_interval
from clipkd.evaluation.sets import EvaluationSet, Span
from clipkd.evaluation.subjects import Subject
from clipkd.evaluation.tasks import Kind, Task
from tests.evaluation.test_metrics import loop_ranks, whole_features


def captioned(counts: list[int], kind: Kind = "retrieval") -> EvaluationSet:
    pictures = [Span(f"0/s{place}", Path("0.tar")) for place in range(len(counts))]
    captions = [tuple(f"caption {place} {number}" for number in range(n)) for place, n in enumerate(counts)]
    return EvaluationSet("here", kind, pictures, captions=captions)


def classified(labels: list[int]) -> EvaluationSet:
    pictures = [Span(f"0/s{place}", Path("0.tar")) for place in range(len(labels))]
    return EvaluationSet("here", "classification", pictures, labels)


@pytest.mark.parametrize("counts", [[1] * 16, [2, 9, 1, 4, 3, 1, 6, 2, 2, 8, 1, 1]])
def test_recall_is_the_share_of_queries_with_one_of_their_own_among_the_first(counts: list[int]) -> None:
    images, texts = whole_features(len(counts), 5, 1), whole_features(sum(counts), 5, 2)
    owner = [image for image, count in enumerate(counts) for _ in range(count)]
    places = list(range(len(counts)))
    text_ranks, image_ranks = loop_ranks(texts, images, owner, places), loop_ranks(images, texts, places, owner)
    found = measure_retrieval(captioned(counts), images, texts)
    assert len(found.metrics) == 7
    for k in (1, 5, 10):
        of_texts, of_images = sum(rank < k for rank in text_ranks), sum(rank < k for rank in image_ranks)
        assert 0 < of_texts < len(texts)
        assert found.metrics[f"image_retrieval_recall@{k}"] == pytest.approx(of_texts / len(texts), abs=1e-12)
        assert found.metrics[f"text_retrieval_recall@{k}"] == pytest.approx(of_images / len(images), abs=1e-12)
        assert found.counts[f"num_images_found@{k}"] == of_texts
        assert found.counts[f"num_texts_found@{k}"] == of_images
    at_one = [float(Fraction(sum(r < 1 for r in ranks), len(ranks))) for ranks in (text_ranks, image_ranks)]
    assert found.metrics["mean_recall@1"] == pytest.approx(sum(at_one) / 2, abs=1e-12)
    assert found.counts["num_captions"] == sum(counts)
    assert found.samples["key"] == [f"0/s{place}" for place in range(len(counts))]
    assert found.samples["text_rank"] == image_ranks
    assert [len(ranks) for ranks in found.samples["image_ranks"]] == counts
    assert [rank for ranks in found.samples["image_ranks"] for rank in ranks] == text_ranks


def test_intervals_of_retrieval_take_images_as_what_is_drawn() -> None:
    # Four images of two captions; both captions of the first two find their image, one of the third's, none of the last.
    images = torch.eye(4)
    texts = images[[0, 0, 1, 1, 2, 0, 0, 0]]
    found = measure_retrieval(captioned([2] * 4), images, texts)
    assert found.metrics["image_retrieval_recall@1"] == 5 / 8
    assert found.ci95["image_retrieval_recall@1"] == pytest.approx(mean_interval(torch.tensor([1, 1, 0.5, 0])))
    # Image 3 is equally far from all captions, of which its own come last.
    assert found.samples["text_rank"] == [0, 0, 0, 6]
    assert found.ci95["text_retrieval_recall@1"] == pytest.approx(proportion_interval(3, 4))
    assert found.ci95["mean_recall@1"] == pytest.approx(mean_interval(torch.tensor([1, 1, 0.75, 0])))


def test_a_pair_is_right_where_the_true_caption_is_strictly_nearer() -> None:
    images = torch.eye(3)[[0, 0, 1, 0]]
    true = torch.tensor([[0.6, 0.8, 0.0], [0.6, 0.8, 0.0], [0.6, 0.0, 0.8], [1.0, 0.0, 0.0]])
    false = torch.tensor([[0.0, 0.6, 0.8], [0.8, 0.6, 0.0], [0.8, 0.0, 0.6], [0.0, 1.0, 0.0]])
    data = captioned([2] * 4, "pairs")
    same = [*data.captions[:3], ("a cat", "a cat")]  # equal captions, whatever their features
    data = replace(data, captions=same)
    found = measure_pairs(data, images, torch.stack([true, false], dim=1).flatten(0, 1))
    assert found.samples["correct"] == [True, False, False, False]
    assert found.samples["margin"] == pytest.approx([0.6, -0.2, 0.0, 1.0])
    assert found.metrics == {"acc": 0.25}
    assert found.counts == {"num_correct": 1, "num_ties": 2}
    assert found.ci95["acc"] == pytest.approx(proportion_interval(1, 4))
    assert found.samples["key"] == ["0/s0", "0/s1", "0/s2", "0/s3"]


IMAGES = torch.tensor([[0.6, 0.8, 0.0], [1.0, 0.0, 0.0], [0.0, 0.6, 0.8], [0.8, 0.0, 0.6]])


def test_classification_by_hand() -> None:
    found = measure_classes(classified([0, 0, 2, 0]), ClassScores(IMAGES, torch.eye(3), 10.0))
    assert found.samples["top5"] == [[1, 0, 2], [0, 1, 2], [2, 1, 0], [0, 2, 1]]
    assert found.samples["correct"] == [False, True, True, True]
    assert found.samples["label"] == [0, 0, 2, 0]
    assert found.samples["margin"] == pytest.approx([-0.2, 1.0, 0.2, 0.2], abs=1e-6)
    exponents = [(8, 6, 0), (10, 0, 0), (8, 6, 0), (8, 6, 0)]
    confidences = [row[0] for row in found.samples["probabilities"]]
    for row, powers in zip(found.samples["probabilities"], exponents, strict=True):
        assert row == pytest.approx([math.exp(power) / sum(map(math.exp, powers)) for power in powers], rel=1e-5)
    assert found.metrics == {"acc1": 0.75, "acc5": None, "mean_per_class_recall": pytest.approx((2 / 3 + 1) / 2)}
    assert found.counts["num_correct1"] == 3
    assert found.recalls[0] == 2 / 3
    assert math.isnan(found.recalls[1])
    assert found.recalls[2] == 1.0
    assert set(found.ci95) == {"acc1", "mean_per_class_recall"}
    assert found.ci95["acc1"] == pytest.approx(proportion_interval(3, 4))
    assert found.calibration is not None
    # Confidences of 0.88 (thrice, two of them right) and of nearly 1 lie in the last two bins.
    assert found.calibration["counts"] == [0] * 13 + [3, 1]
    assert found.calibration["ece"] == pytest.approx((3 * confidences[0] - 2 + 1 - confidences[1]) / 4, abs=1e-6)


@pytest.mark.parametrize("chunk", [4, 8192])
def test_top5_counts_the_label_among_five_of_six_classes(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(importlib.import_module("clipkd.evaluation.measure"), "CHUNK", chunk)
    images = torch.tensor([[0.6, 0.5, 0.4, 0.3, 0.2, 0.1]]).expand(7, 6)
    found = measure_classes(classified([0, 1, 2, 3, 4, 5, 5]), ClassScores(images, torch.eye(6), 1.0))
    assert found.metrics["acc1"] == pytest.approx(1 / 7)
    assert found.metrics["acc5"] == pytest.approx(5 / 7)
    assert found.ci95["acc5"] == pytest.approx(proportion_interval(5, 7))
    assert found.counts == {"num_correct1": 1, "num_correct5": 5}
    assert found.samples["top5"] == [[0, 1, 2, 3, 4]] * 7
    assert found.samples["margin"] == pytest.approx([0.1, -0.1, -0.2, -0.3, -0.4, -0.5, -0.5], abs=1e-6)
    assert found.metrics["mean_per_class_recall"] == pytest.approx(1 / 6)


def test_multilabel_is_the_mean_of_the_classes_average_precisions() -> None:
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]], bool)
    pictures = [Span(f"0/s{place}", Path("0.tar")) for place in range(4)]
    data = EvaluationSet("here", "multilabel", pictures, targets=targets)
    found = measure_multilabel(data, ClassScores(IMAGES, torch.eye(3), 100.0))
    # Ranked by the first class 1, 3, 0, 2; by the second 0, 2, 1, 3; the third has no image.
    first, second = (1 / 3 + 2 / 4) / 2, (1 / 2 + 2 / 3) / 2
    assert found.recalls == pytest.approx([first, second, 0.0])
    assert found.metrics == {"mean_average_precision": pytest.approx((first + second) / 3)}
    assert found.recalls == average_precisions(IMAGES, torch.from_numpy(targets)).tolist()
    assert found.counts == {"num_positives": 4}
    assert found.samples["label"] == [[0], [1], [0, 1], []]
    assert found.samples["scores"] == IMAGES.tolist()
    low, high = found.ci95["mean_average_precision"]
    assert 0 <= low < (first + second) / 3 < high <= 1


@pytest.mark.parametrize(
    ("data", "chances"),
    [
        (classified([0, 1]), {"acc1": 1 / 6, "acc5": 5 / 6, "mean_per_class_recall": 1 / 6}),
        (replace(classified([0]), kind="multilabel"), {"mean_average_precision": None}),
        (captioned([1] * 4), {"mean_recall@1": 1 / 4, "image_retrieval_recall@10": None}),
        (captioned([2] * 4, "pairs"), {"acc": 1 / 2}),
    ],
)
def test_chance_follows_from_the_data_unless_the_task_says_it(data: EvaluationSet, chances: dict[str, float]) -> None:
    data = replace(data, classnames=list("abcdef"))
    assert {metric: Subject(Task(), "x", data, metric).chance for metric in chances} == chances
    assert {Subject(Task(chance=0.0), "x", data, metric).chance for metric in chances} == {0.0}


def test_the_digest_of_data_covers_keys_lengths_and_labels_but_not_the_place(tmp_path: Path) -> None:
    (tmp_path / "0.tar").touch()

    def digest(kind: Kind, size: int = 7, key: str = "b", root: str = "here", **found: Any) -> str:
        pictures = [Span(name, tmp_path / "0.tar", 0, n) for name, n in (("a", 5), (key, size))]
        return EvaluationSet(root, kind, pictures, **found).sha256

    first = digest("classification", labels=[0, 1])
    assert digest("classification", labels=[0, 1], root="elsewhere", classnames=["cat", "dog"]) == first
    others = [digest("classification", labels=[0, 0]), digest("classification", 8, labels=[0, 1])]
    others.append(digest("classification", key="c", labels=[0, 1]))
    others += [digest("multilabel", targets=np.array(rows, bool)) for rows in ([[0], [1]], [[1], [1]])]
    others += [digest("retrieval", captions=texts) for texts in ([("a", "b"), ("c",)], [("a",), ("b", "c")])]
    assert len({first, *others}) == len(others) + 1
