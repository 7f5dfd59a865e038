"""Two models on the same samples: paired differences, agreement, flips; and a student beside its teacher."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from clipkd import metrics
from clipkd.evaluation.measure import Measured
from clipkd.evaluation.results import Results, read_samples
from clipkd.evaluation.tasks import Subject
from clipkd.requirements import require

LOST_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    first: str
    """Baseline: a results folder of clipkd eval, or one of its samples/*.parquet."""
    second: str
    """What is compared with it."""
    first_model: str | None = None
    """Which model of the first folder, as its rows call it; needed where it holds several."""
    second_model: str | None = None
    """Which model of the second folder."""
    max_drop: float | None = None
    """Largest drop of accuracy, in points, that is no failure; null judges nothing."""

    def __post_init__(self) -> None:
        require(self.max_drop is None or self.max_drop >= 0, f"max_drop is {self.max_drop}; it is 0 or more points")


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """One row per task that both have been evaluated on.

    Raises: ValueError if there is none, or samples differ.
    """
    first, second = (
        find_tables(config.first, config.first_model, "first"),
        find_tables(config.second, config.second_model, "second"),
    )
    if len(first) == len(second) == 1:  # two files, or two runs on one task
        common = [(*first, *second)]
    else:
        common = [(task, task) for task in first if task in second]
    if not common:
        raise ValueError(f"{config.first} and {config.second} have no task in common: {list(first)}, {list(second)}")
    rows = []
    for task, other in common:
        samples = read_samples(first[task]), read_samples(second[other])
        rows.append({"task": task, **compare_samples(*samples, where=f"{first[task]} and {second[other]}")})
    return rows


def find_tables(path: str, model: str | None, option: str) -> dict[str, Path]:
    """Task → table of samples."""
    if Path(path).is_file():
        return {Path(path).stem: Path(path)}
    results = Results(Path(path))
    rows = results.rows()
    if not rows:
        raise ValueError(f"{path} holds no results (eval_results.jsonl); make them with clipkd eval --output {path}")
    models = list(dict.fromkeys(row["model"] for row in rows))
    if model is None and len(models) > 1:
        raise ValueError(f"{path} holds results of {models}; choose one with --{option}_model")
    chosen = model or models[0]
    if chosen not in models:
        raise ValueError(f"{path} has no results of {chosen!r}, only of {models}; see --{option}_model")
    return {row["key"]: results.folder / row["samples"] for row in rows if row["model"] == chosen}


def compare_samples(first: dict[str, list], second: dict[str, list], *, where: str) -> dict[str, Any]:
    """Paired by key. Raises: ValueError if the samples are not the same, or not right or wrong each."""
    if first.keys() != second.keys():
        raise ValueError(f"{where} are of different kinds of tasks")
    places = {key: place for place, key in enumerate(second["key"])}
    if places.keys() != set(first["key"]) or len(places) != len(first["key"]):
        missing = next(iter(places.keys() ^ set(first["key"])), "a key that comes twice")
        raise ValueError(f"{where} hold other samples, such as {missing}; compare runs on the same data")
    order = [places[key] for key in first["key"]]
    if "label" in first and [second["label"][place] for place in order] != first["label"]:
        raise ValueError(f"{where} hold other labels; compare runs on the same data")
    guesses = None
    if "text_rank" in first:
        right = [torch.tensor([rank == 0 for rank in table["text_rank"]]) for table in (first, second)]
    elif "correct" in first:
        right = [torch.tensor(table["correct"]) for table in (first, second)]
        guesses = ([row[0] for row in table["top5"]] for table in (first, second)) if "top5" in first else None
    else:
        raise ValueError(f"{where}: multilabel samples are not right or wrong; compare their rows")
    right[1] = right[1][order]
    paired = metrics.compare_paired(*right)
    row = {"first": right[0].double().mean().item(), "second": right[1].double().mean().item(), **asdict(paired)}
    if guesses is not None:
        ours, theirs = guesses
        row["agreement"] = sum(a == theirs[place] for a, place in zip(ours, order, strict=True)) / len(order)
    return row


def describe_comparison(row: dict[str, Any]) -> str:
    """A row in a line, in percent and points."""
    low, high = row["ci95"]
    agreement = f", same answer {row['agreement']:.1%}" if "agreement" in row else ""
    return (
        f"{row['task']}: {row['first']:.2%} → {row['second']:.2%}, {100 * row['difference']:+.2f} points "
        f"[{100 * low:+.2f}, {100 * high:+.2f}], McNemar p {row['mcnemar_p']:.3g}, won {row['won']}, lost {row['lost']}, "
        f"n {row['n']}{agreement}"
    )


def beside_teacher(subject: Subject, student: Measured, teacher: Measured) -> dict[str, Any]:
    """What a student kept of its teacher on a classification task, and where it lost most."""
    assert student.scores is not None
    assert teacher.scores is not None
    theirs, ours = (torch.tensor(measured.samples["correct"]) for measured in (teacher, student))
    agreement = sum(a[0] == b[0] for a, b in zip(student.samples["top5"], teacher.samples["top5"], strict=True))
    divergence = 0.0
    for p, q in zip(teacher.scores.log_probabilities(), student.scores.log_probabilities(), strict=True):
        divergence += (p.exp() * (p - q)).sum().item()
    top1 = teacher.metrics["acc1"] or math.nan
    main, own = teacher.metrics[subject.metric], student.metrics[subject.metric]
    return {
        "main_metric": main,
        "acc1": top1,
        "retained": own / main if main and own is not None else None,
        "agreement": agreement / len(ours),
        "kl": divergence / len(ours),
        "ece": None if teacher.calibration is None else teacher.calibration.ece,
        "paired": asdict(metrics.compare_paired(theirs, ours)),
        "lost_classes": lost_classes(subject, student.recalls, teacher.recalls),
    }


def lost_classes(subject: Subject, ours: list[float], theirs: list[float]) -> list[dict[str, Any]]:
    """The classes whose recall fell most, worst first."""
    assert subject.data.classnames is not None
    fell = [
        (b - a, number) for number, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not math.isnan(a) and b > a
    ]
    worst = sorted(fell, key=lambda pair: (-pair[0], pair[1]))[:LOST_CLASSES]
    names = subject.data.classnames
    return [
        {"class": number, "name": names[number], "recall": ours[number], "teacher_recall": theirs[number]}
        for _, number in worst
    ]
