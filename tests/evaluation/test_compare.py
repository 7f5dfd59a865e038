"""Two results folders compared sample by sample, by hand."""

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkd.evaluation.compare import (
    CompareConfig,
    beside_teacher,
    compare,
    compare_samples,
    describe_comparison,
)
from clipkd.evaluation.measure import ClassScores, Measured, measure_classes
from clipkd.evaluation.results import Results
from clipkd.evaluation.subjects import Subject
from clipkd.evaluation.tasks import Task
from tests.evaluation.test_measure import classified

Table = dict[str, list[Any]]

KEYS = ["a", "b", "c", "d", "e"]
FIRST: Table = {
    "key": KEYS,
    "label": [0, 0, 1, 1, 2],
    "top5": [[0, 1], [1, 0], [1, 0], [0, 1], [0, 2]],
    "correct": [True, False, True, False, False],
}
SECOND: Table = {
    "key": KEYS,
    "label": [0, 0, 1, 1, 2],
    "top5": [[1, 0], [0, 1], [1, 2], [1, 0], [0, 1]],
    "correct": [False, True, True, True, False],
}


def reordered(table: Table, order: list[int]) -> Table:
    return {name: [column[place] for place in order] for name, column in table.items()}


def compared(first: Table, second: Table, metric: str = "acc1") -> dict[str, Any]:
    return compare_samples(first, second, metric=metric, where="these")


def write(folder: Path, tables: dict[str, Table], *, model: str = "m", **fields: Any) -> str:
    for task, samples in tables.items():
        row = {"model": model, "key": task, "dataset": task, "precision": "fp32", "weights": "student", "metrics": {}}
        row |= {"id": "0123", "ci95": {}, "main_metric_name": "acc1", "data_sha256": "d"}
        Results(folder).add({**row, **fields}, samples)
    return str(folder)


def run(first: str, second: str, **options: Any) -> list[dict[str, Any]]:
    rows, problems = compare(CompareConfig(first=first, second=second, **options))
    assert problems == []
    return rows


def normal(values: list[float]) -> Any:
    """Mean ± 1.96 standard errors."""
    mean, half = statistics.mean(values), 1.959964 * statistics.pstdev(values) / math.sqrt(len(values))
    return pytest.approx((mean - half, mean + half), abs=1e-6)


def test_a_comparison_by_hand() -> None:
    row = compared(FIRST, SECOND)
    assert (row["first"], row["second"], row["n"], row["won"], row["lost"]) == (2 / 5, 3 / 5, 5, 2, 1)
    assert row["difference"] == pytest.approx(1 / 5)
    half = 1.959964 * math.sqrt(((2.5 + 1.5) / 7 - (1 / 7) ** 2) / 7)  # half a sample more in each of four cells
    assert row["ci95"] == pytest.approx((1 / 7 - half, 1 / 7 + half))
    assert row["mcnemar_p"] == pytest.approx(1.0)  # 2 × (1 + 3) / 8
    assert (row["metric"], row["agreement"]) == ("acc1", 2 / 5)  # the same first guess at c and e, right or wrong
    back = compared(SECOND, FIRST)
    assert (back["won"], back["lost"], back["difference"]) == (1, 2, -row["difference"])
    five = compared(FIRST, SECOND, "acc5")
    assert (five["first"], five["second"], five["won"], five["lost"]) == (1.0, 4 / 5, 0, 1)
    pairs: Table = {"key": KEYS, "correct": [True, True, False, False, True], "margin": [0.1, 0.2, -0.1, 0.0, 0.3]}
    row = compared(pairs, {**pairs, "correct": [True, False, True, True, True]}, "acc")
    assert (row["metric"], row["first"], row["second"], row["won"], row["lost"]) == ("acc", 3 / 5, 4 / 5, 2, 1)


def test_samples_in_another_order_are_paired_by_key() -> None:
    expected = compared(FIRST, SECOND)
    for order in ([4, 3, 2, 1, 0], [1, 2, 3, 4, 0], [2, 0, 4, 1, 3]):
        assert compared(FIRST, reordered(SECOND, order)) == expected
        assert compared(reordered(FIRST, order), SECOND) == expected


def test_classes_weigh_the_same_in_their_mean_recall() -> None:
    row = compared(FIRST, SECOND, "mean_per_class_recall")
    assert (row["first"], row["second"]) == pytest.approx(((1 / 2 + 1 / 2 + 0) / 3, (1 / 2 + 1 + 0) / 3))
    assert row["difference"] == pytest.approx(1 / 6)
    assert row["ci95"] == normal([-5 / 6, 5 / 6, 0, 5 / 6, 0])  # an image of the first two counts 5/6, of the last 5/3


def test_retrieval_is_compared_image_by_image_and_captions_weigh_the_same() -> None:
    first: Table = {"key": KEYS[:3], "text_rank": [0, 3, 0], "image_ranks": [[0, 1], [2], [0]]}
    second: Table = {"key": KEYS[2::-1], "text_rank": [2, 0, 0], "image_ranks": [[4], [0], [0, 0]]}
    row = compared(first, second, "mean_recall@1")
    assert (row["first"], row["second"]) == pytest.approx(((2 / 4 + 2 / 3) / 2, (3 / 4 + 2 / 3) / 2))
    # 4 captions of 3 images: one that finds its image counts 3/4 of an image.
    assert row["ci95"] == normal([(3 / 4 + 0) / 2, (3 / 4 + 1) / 2, (-3 / 4 - 1) / 2])
    assert (row["metric"], "agreement" in row, "won" in row) == ("mean_recall@1", False, False)
    row = compared(first, second, "image_retrieval_recall@1")
    assert (row["first"], row["second"]) == pytest.approx((2 / 4, 3 / 4))
    row = compared(first, second, "text_retrieval_recall@5")
    assert (row["first"], row["second"], row["difference"], row["ci95"]) == (1.0, 1.0, 0.0, (0.0, 0.0))


def test_multilabel_is_compared_in_its_precision_with_resampled_images() -> None:
    first: Table = {"key": KEYS, "label": [[0], [], [0], [0], []], "scores": [[0.9], [0.8], [0.7], [0.6], [0.5]]}
    second = {**first, "scores": [[0.9], [0.5], [0.8], [0.6], [0.7]]}

    def precision(ranking: str) -> float:
        hits = [place for place, key in enumerate(ranking) if key in "acd"]
        return statistics.mean((n + 1) / (place + 1) for n, place in enumerate(hits)) if hits else 0.0

    row = compared(first, second, "mean_average_precision")
    assert (row["first"], row["second"]) == pytest.approx((precision("abcde"), precision("acedb")))
    draw, drops = random.Random(0), []
    for _ in range(4000):
        times = [draw.randrange(5) for _ in range(5)]
        rankings = (
            "".join(KEYS[place] * times.count(place) for place in order) for order in (range(5), (0, 2, 4, 3, 1))
        )
        before, after = map(precision, rankings)
        drops.append(after - before)
    low, high = row["ci95"]
    assert (low + high) / 2 == pytest.approx(row["difference"]) == pytest.approx(row["second"] - row["first"])
    assert (high - low) / 2 == pytest.approx(1.96 * statistics.stdev(drops), rel=0.15)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {**t, "key": ["a", "b", "c", "d", "f"]}, "other samples, such as [ef]"),
        (lambda t: reordered(t, [0, 1, 2, 3, 3]), "other samples, such as e"),
        (lambda t: reordered(t, [0, 1, 2, 3, 4, 4]), "other samples, such as a key that comes twice"),
        (lambda t: {**t, "label": [0, 0, 1, 2, 2]}, "other labels"),
        (lambda t: {name: t[name] for name in ("key", "correct")}, "different kinds of tasks"),
        (lambda t: {"key": t["key"], "text_rank": [0] * 5}, "different kinds of tasks"),
    ],
)
def test_tables_of_other_samples_labels_or_kinds_are_refused(change: Callable[[Table], Table], words: str) -> None:
    for pair in ((FIRST, change(SECOND)), (change(FIRST), SECOND)):
        with pytest.raises(ValueError, match=f"these .*{words}"):
            compared(*pair)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere holds no results"):
        run(str(tmp_path / "nowhere"), write(tmp_path / "1", {"x": FIRST}))


def test_tasks_that_two_folders_share_are_compared(tmp_path: Path) -> None:
    first = write(tmp_path / "1", {"x": FIRST, "y": FIRST, "z": FIRST})
    second = write(tmp_path / "2", {"z": SECOND, "x": reordered(SECOND, [4, 3, 2, 1, 0]), "w": SECOND})
    rows = run(first, second)
    assert [row["task"] for row in rows] == ["x", "z"]
    assert rows[0] == {"task": "x", **compared(FIRST, SECOND)} == {**rows[1], "task": "x"}
    with pytest.raises(ValueError, match=r"no task in common: \['x', 'y', 'z'\], \['v', 'w'\]"):
        run(first, write(tmp_path / "3", {"v": FIRST, "w": FIRST}))
    _, problems = compare(CompareConfig(first=second, second=first, max_drop=19.9))
    fell = [f"{task} fell by 20.00 points, more than 19.9" for task in "zx"]
    assert problems == [*fell, f"w was evaluated in {second} alone"]
    assert compare(CompareConfig(first=second, second=first, max_drop=20.0))[1] == problems[2:]


def test_the_main_metric_and_the_data_of_the_rows_count(tmp_path: Path) -> None:
    first = write(tmp_path / "1", {"x": FIRST}, main_metric_name="mean_per_class_recall")
    second = write(tmp_path / "2", {"x": SECOND}, data_sha256=None)  # of an older version
    assert run(first, second) == [{"task": "x", **compared(FIRST, SECOND, "mean_per_class_recall")}]
    with pytest.raises(ValueError, match=r"2/samples.* were measured on other data; evaluate both on the same"):
        run(first, write(tmp_path / "2", {"x": SECOND}, data_sha256="e"))


def test_a_folder_of_several_models_needs_a_choice(tmp_path: Path) -> None:
    both = write(tmp_path, {"x": FIRST}, model="a", pretrained="b")
    write(tmp_path, {"x": SECOND}, model="a", pretrained="b", weights="ema")
    names = r"\['a@b', 'a@b \(ema\)'\]"
    with pytest.raises(ValueError, match=f"{names}; choose one with --first_model"):
        run(both, both)
    with pytest.raises(ValueError, match=r"choose one with --second_model"):
        run(both, both, first_model="a@b")
    with pytest.raises(ValueError, match=rf"no results of 'a', only of {names}; see --second_model"):
        run(both, both, first_model="a@b", second_model="a")
    rows = run(both, both, first_model="a@b", second_model="a@b (ema)")
    assert rows == [{"task": "x", **compared(FIRST, SECOND)}]


def test_a_student_beside_its_teacher_by_hand() -> None:
    data = replace(classified([0, 1, 2, 2]), classnames=["cat", "dog", "eel", "fox"], templates=["{c}"])
    about = Subject(Task(), "x", data, "mean_per_class_recall")
    classes = torch.eye(4)

    def seen(guesses: list[int], scale: float) -> Measured:
        return measure_classes(about.data, ClassScores(classes[guesses], classes, scale))

    row = beside_teacher(about, seen([0, 0, 2, 1], 1.0), seen([0, 1, 1, 2], 2.0))
    # Recalls: student 1, 0, 1/2; teacher 1, 1, 1/2. Accuracies 2/4 and 3/4.
    assert (row["main_metric"], row["acc1"]) == pytest.approx((5 / 6, 3 / 4))
    assert row["retained"] == pytest.approx((1 / 2) / (5 / 6))
    assert row["agreement"] == row["paired"]["agreement"] == 1 / 4
    assert (row["paired"]["metric"], row["paired"]["difference"]) == ("mean_per_class_recall", pytest.approx(-1 / 3))
    assert row["paired"] == {
        **row["paired"],
        **compared(seen([0, 1, 1, 2], 1.0).samples, seen([0, 0, 2, 1], 1.0).samples, "mean_per_class_recall"),
    }
    assert row["lost_classes"] == [{"class": 1, "name": "dog", "recall": 0.0, "teacher_recall": 1.0}]
    line = describe_comparison({"task": "x", **compared(FIRST, SECOND)})
    assert line == (
        "x: acc1 40.00% → 60.00%, +20.00 points [-40.70, +69.28], McNemar p 1, won 2, lost 1, same answer 40.0%, n 5"
    )
    assert row["ece"] == pytest.approx(abs(3 / 4 - math.exp(2) / (math.exp(2) + 3)), abs=1e-6)
    # One class has the logit of the scale, the three others 0.
    sure = {scale: math.exp(scale) / (math.exp(scale) + 3) for scale in (1.0, 2.0)}
    rest = {scale: (1 - p) / 3 for scale, p in sure.items()}
    same = sure[2] * math.log(sure[2] / sure[1]) + 3 * rest[2] * math.log(rest[2] / rest[1])
    other = sure[2] * math.log(sure[2] / rest[1]) + rest[2] * math.log(rest[2] / sure[1])
    other += 2 * rest[2] * math.log(rest[2] / rest[1])
    assert row["kl"] == pytest.approx((same + 3 * other) / 4, rel=1e-5)
