"""Compare two models on the same samples: paired differences, agreement, flips; and a student with its teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipkd.errors import require
from clipkd.evaluation import metrics
from clipkd.evaluation.measure import Measured
from clipkd.evaluation.results import Results, label, read_samples
from clipkd.evaluation.subjects import Subject

LOST_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    first: str
    """Results folder of clipkd eval with the baseline."""
    second: str
    """Results folder of the model to compare with it."""
    first_model: str | None = None
    """Model of the first folder, as `clipkd report` names it; needed if the folder holds several."""
    second_model: str | None = None
    """Model of the second folder."""
    max_drop: float | None = None
    """Largest accepted drop of a main metric, in points; null accepts any. A task that only the first has is a failure too."""

    def __post_init__(self) -> None:
        require(self.max_drop is None or self.max_drop >= 0, f"max_drop is {self.max_drop}; it is 0 or more points")


def compare(config: CompareConfig) -> tuple[list[dict[str, Any]], list[str]]:
    """One row per task that both were evaluated on, and the failures if max_drop is set.

    Raises: ValueError if they have no task in common, or their samples differ.
    """
    first = find_tables(config.first, config.first_model, "first")
    second = find_tables(config.second, config.second_model, "second")
    rows = [compare_tables(task, first[task], second[task]) for task in first if task in second]
    if not rows:
        raise ValueError(f"{config.first} and {config.second} have no task in common: {list(first)}, {list(second)}")
    if config.max_drop is None:
        return rows, []
    problems = [
        f"{row['task']} fell by {-100 * row['difference']:.2f} points, more than {config.max_drop:g}"
        for row in rows
        if -100 * row["difference"] > config.max_drop + 1e-9
    ]
    return rows, problems + [f"{task} was evaluated in {config.first} alone" for task in first if task not in second]


def find_tables(path: str, model: str | None, option: str) -> dict[str, dict[str, Any]]:
    """Task → a model's row, and the path of its samples."""
    results = Results(Path(path))
    rows = results.rows()
    if not rows:
        raise ValueError(f"{path} holds no results (eval_results.jsonl); make them with clipkd eval --output {path}")
    names = list(dict.fromkeys(label(row) for row in rows))
    if model is None and len(names) > 1:
        raise ValueError(f"{path} holds results of {names}; choose one with --{option}_model")
    chosen = model or names[0]
    if chosen not in names:
        raise ValueError(f"{path} has no results of {chosen!r}, only of {names}; see --{option}_model")
    return {row["key"]: row | {"path": results.folder / row["samples"]} for row in rows if label(row) == chosen}


def compare_tables(task: str, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    where = f"{first['path']} and {second['path']}"
    if len({first.get("data_sha256"), second.get("data_sha256")} - {None}) > 1:
        raise ValueError(f"{where} were measured on other data; evaluate both on the same")
    samples = read_samples(first["path"]), read_samples(second["path"])
    return {"task": task, **compare_samples(*samples, metric=first["main_metric_name"], where=where)}


def compare_samples(first: dict[str, list], second: dict[str, list], *, metric: str, where: str) -> dict[str, Any]:
    """Compare two tables in a metric, paired by key. Raises: ValueError if the samples are not the same."""
    if first.keys() != second.keys():
        raise ValueError(f"{where} are of different kinds of tasks")
    places = {key: place for place, key in enumerate(second["key"])}
    if not len(places) == len(second["key"]) == len(first["key"]) or places.keys() != set(first["key"]):
        missing = next(iter(places.keys() ^ set(first["key"])), "a key that comes twice")
        raise ValueError(f"{where} hold other samples, such as {missing}; compare runs on the same data")
    order = [places[key] for key in first["key"]]
    second = {name: [column[place] for place in order] for name, column in second.items()}
    if first.get("label") != second.get("label"):
        raise ValueError(f"{where} hold other labels; compare runs on the same data")
    row = {"metric": metric, "n": len(order), **compare_values(first, second, metric)}
    if "top5" in first:
        same = [a[0] == b[0] for a, b in zip(first["top5"], second["top5"], strict=True)]
        row["agreement"] = sum(same) / len(same)
    return row


def compare_values(first: dict[str, list], second: dict[str, list], metric: str) -> dict[str, Any]:
    if metric == "mean_average_precision":
        return compare_precisions(first, second)
    ours, theirs = (sample_values(table, metric) for table in (first, second))
    row: dict[str, Any] = {"first": ours.mean().item(), "second": theirs.mean().item()}
    if metric in ("acc1", "acc5", "acc"):
        return row | metrics.compare_paired(ours > 0, theirs > 0)
    change = theirs - ours
    return row | {"difference": change.mean().item(), "ci95": metrics.difference_interval(change)}


def sample_values(table: dict[str, list], metric: str) -> Tensor:
    """The value per sample whose mean is the metric."""
    if metric == "acc5":
        pairs = zip(table["label"], table["top5"], strict=True)
        return torch.tensor([float(label in top) for label, top in pairs], dtype=torch.float64)
    if metric in ("acc1", "acc"):
        return torch.tensor(table["correct"], dtype=torch.float64)
    if metric == "mean_per_class_recall":  # every class weighs the same, however many images it has
        labels = torch.tensor(table["label"])
        images = torch.bincount(labels).double()
        weights = len(labels) / ((images > 0).sum() * images[labels])
        return torch.tensor(table["correct"], dtype=torch.float64) * weights
    side, _, k = metric.partition("@")
    captions = sum(len(ranks) for ranks in table["image_ranks"]) / len(table["image_ranks"])
    by_text = [sum(rank < int(k) for rank in ranks) / captions for ranks in table["image_ranks"]]
    by_image = [float(rank < int(k)) for rank in table["text_rank"]]
    chosen = {"mean_recall": [(a + b) / 2 for a, b in zip(by_text, by_image, strict=True)]}
    chosen |= {"image_retrieval_recall": by_text, "text_retrieval_recall": by_image}
    return torch.tensor(chosen[side], dtype=torch.float64)


def compare_precisions(first: dict[str, list], second: dict[str, list]) -> dict[str, Any]:
    """Difference of the mean average precision, its interval from resampled images."""
    ours, theirs = (torch.tensor(table["scores"]) for table in (first, second))
    targets = torch.zeros(ours.shape, dtype=torch.bool)
    for row, labels in enumerate(first["label"]):
        targets[row, labels] = True

    def means(drawn: Tensor) -> Tensor:
        return torch.stack([metrics.average_precisions(each[drawn], targets[drawn]).mean() for each in (ours, theirs)])

    before, after = means(torch.arange(len(ours))).tolist()
    interval = metrics.bootstrap_interval(lambda drawn: means(drawn).diff()[0], len(ours), lowest=-1.0)
    return {"first": before, "second": after, "difference": after - before, "ci95": interval}


def describe_comparison(row: dict[str, Any]) -> str:
    """A row as one line, in percent and points."""
    low, high = row["ci95"]
    line = (
        f"{row['task']}: {row['metric']} {row['first']:.2%} → {row['second']:.2%}, {100 * row['difference']:+.2f} points "
        f"[{100 * low:+.2f}, {100 * high:+.2f}]"
    )
    if "won" in row:
        line += f", McNemar p {row['mcnemar_p']:.3g}, won {row['won']}, lost {row['lost']}"
    line += f", same answer {row['agreement']:.1%}" if "agreement" in row else ""
    return f"{line}, n {row['n']}"


def beside_teacher(subject: Subject, student: Measured, teacher: Measured) -> dict[str, Any]:
    """A student's share of its teacher's metric; for classification also agreement, KL and the classes that lost most."""
    main, own = teacher.metrics[subject.metric], student.metrics[subject.metric]
    row: dict[str, Any] = {
        "main_metric": main,
        "retained": own / main if main and own is not None else None,
        "paired": compare_samples(teacher.samples, student.samples, metric=subject.metric, where=subject.name),
    }
    if student.scores is None or teacher.scores is None:
        return row
    divergence = 0.0
    for p, q in zip(teacher.scores.log_probabilities(), student.scores.log_probabilities(), strict=True):
        divergence += (p.exp() * (p - q)).sum().item()
    recalls = zip(subject.data.classnames or (), student.recalls, teacher.recalls, strict=True)
    lost = [
        {"class": number, "name": name, "recall": ours, "teacher_recall": theirs}
        for number, (name, ours, theirs) in enumerate(recalls)
        if ours < theirs  # not of NaN, the recall of a class without images
    ]
    return row | {
        "acc1": teacher.metrics["acc1"],
        "agreement": row["paired"]["agreement"],
        "kl": divergence / len(subject.data),
        "ece": teacher.calibration and teacher.calibration["ece"],
        "lost_classes": sorted(lost, key=lambda each: each["recall"] - each["teacher_recall"])[:LOST_CLASSES],
    }
