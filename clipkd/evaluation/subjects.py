"""Tasks with their data: class names and templates filled in, sizes checked against the task."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clipkd import files
from clipkd.evaluation.layouts import open_evaluation_set
from clipkd.evaluation.sets import CLASS_KINDS, EvaluationSet, check_label, check_vector
from clipkd.evaluation.tasks import METRICS, Task, locate
from clipkd.models.imagenet import imagenet_prompts, imagenet_synsets

COMMON_NAMES = {"data", "dataset", "eval", "evaluation", "images", "test", "val", "validation", "wds", "zeroshot"}
"""Names of data folders that say nothing about the data: a task without a name takes the name of the parent too."""


@dataclass(frozen=True)
class Subject:
    """A task with its data."""

    task: Task
    name: str
    data: EvaluationSet
    metric: str

    @property
    def chance(self) -> float | None:
        """Main metric of a random guess; None if it does not follow from the data."""
        if self.task.chance is not None:
            return self.task.chance
        if self.data.kind == "classification":
            return (5 if self.metric == "acc5" else 1) / self.data.num_classes
        if self.data.kind == "retrieval" and self.metric.endswith("@1"):
            return 1 / len(self.data)
        return 0.5 if self.data.kind == "pairs" else None

    def prompts_sha256(self) -> str:
        return files.sha256_of([list(self.data.classnames or ()), list(self.data.templates or ())])


def open_subjects(tasks: tuple[str, ...], roots: tuple[str, ...], *, skip_missing: bool = False) -> list[Subject]:
    """Every task with its data opened; tasks, roots: see locate.

    Raises: FileNotFoundError naming the tasks without data; ValueError for data that differs from its task.
    """
    found = [open_subject(task, folder) for task, folder in locate(tasks, roots, skip_missing=skip_missing)]
    names = [subject.name for subject in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two tasks or data folders are called {twice[0]!r}; give each a task with another name")
    return found


def open_subject(task: Task, root: str | Path) -> Subject:
    """The task's data with class names and templates filled in.

    Raises: FileNotFoundError or ValueError naming what is missing or differs in size from the task.
    """
    columns = (task.image_column, task.label_column, task.caption_column)
    data = open_evaluation_set(
        root, layout=task.layout, split=task.split, configuration=task.configuration, kind=task.kind, columns=columns
    )
    if data.kind in CLASS_KINDS:
        data = with_prompts(task, data)
    for what, found, expected in (
        ("images", len(data), task.num_images),
        ("classes", data.num_classes, task.num_classes),
        ("captions", sum(map(len, data.captions)), task.num_captions),
    ):
        if expected not in (None, found):
            raise ValueError(f"{root} has {found} {what}; the task expects {expected} (or leave num_{what} out)")
    known = METRICS[data.kind]
    if task.metric not in (None, *known):
        raise ValueError(f"{root} holds a {data.kind} task; its metrics are {list(known)}, not {task.metric!r}")
    if task.metric == "acc5" and data.num_classes < 5:
        raise ValueError(f"{root} has {data.num_classes} classes, too few for the metric acc5")
    folder = Path(root).resolve()
    parent = (
        f"{folder.parent.name}/" if folder.name.lower() in COMMON_NAMES else ""
    )  # a/zeroshot and b/zeroshot are two
    name = task.name or parent + folder.name
    return Subject(task, name, data, task.metric or known[0])


def with_prompts(task: Task, data: EvaluationSet) -> EvaluationSet:
    """Raises: ValueError if class names or templates are missing, or do not fit the labels."""
    if task.prompts == "imagenet":
        data = with_imagenet_prompts(data)
    else:
        require_plain_order(data)
    classnames = task.classnames or data.classnames
    templates = task.templates or data.templates
    if classnames is None:
        raise ValueError(f"{data.root} names no classes; set prompts: imagenet or classnames in the task")
    if templates is None:
        raise ValueError(f"{data.root} has no templates; set templates in the task, such as ['a photo of a {{c}}.']")
    if data.folders and len(data.folders) != len(classnames):
        raise ValueError(f"{data.root} has {len(data.folders)} class folders, the task {len(classnames)} class names")
    if data.targets is not None:
        check_vector(data.targets[0], len(classnames), data.pictures[0].name)
    for label, picture in zip(data.labels, data.pictures, strict=False):
        check_label(label, len(classnames), picture.name)
    return replace(data, classnames=list(classnames), templates=list(templates))


def require_plain_order(data: EvaluationSet) -> None:
    """Raises: ValueError if the class folders' order is open: their names sort as numbers in another way than as text."""
    names, counts = list(data.folders), len(data.folders)
    if names != sorted(names) and [int(name) for name in names] not in ([*range(counts)], [*range(1, counts + 1)]):
        raise ValueError(
            f"{data.root}: the class folders {names[0]} … {names[-1]} sort differently as numbers and as text, and have gaps; "
            "write all names with equally many digits"
        )


def with_imagenet_prompts(data: EvaluationSet) -> EvaluationSet:
    """Class folders named by synset id or class number become those ImageNet classes, in ImageNet's order."""
    names, templates = imagenet_prompts()
    if not data.folders:
        return replace(data, classnames=names, templates=templates)
    synsets = {synset: number for number, synset in enumerate(imagenet_synsets())}
    numbers = [int(name) if name.isdecimal() else synsets.get(name, -1) for name in data.folders]
    if wrong := [name for name, number in zip(data.folders, numbers, strict=True) if not 0 <= number < len(names)]:
        raise ValueError(
            f"{data.root}: the folder {wrong[0]!r} ({len(wrong)} such) is no synset id of ImageNet-1k, such as n01440764"
        )
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{data.root}: two folders stand for the same ImageNet class; name them by synset id")
    order = np.argsort(numbers, kind="stable")
    rank = np.argsort(order)
    return replace(
        data,
        labels=[int(rank[label]) for label in data.labels],
        folders=[data.folders[place] for place in order],
        classnames=[names[numbers[place]] for place in order],
        templates=templates,
    )
