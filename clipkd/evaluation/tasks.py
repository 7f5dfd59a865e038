"""Zero-shot tasks: what a YAML of eval/ says, and the data that it is about."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clipkd.config.parse import parse_into
from clipkd.errors import require
from clipkd.evaluation.layouts import open_evaluation_set
from clipkd.evaluation.sets import CLASS_KINDS, EvaluationSet, Kind, Layout, check_label, check_vector
from clipkd.models.load import imagenet_prompts, imagenet_synsets

METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("acc1", "acc5", "mean_per_class_recall"),
    "multilabel": ("mean_average_precision",),
    "retrieval": (
        "mean_recall@1",
        *(f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)),
    ),
    "pairs": ("acc",),
}
"""Of each kind; the first is the usual main metric."""


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str | None = None
    """Key in the results; null takes the data folder's name."""
    title: str | None = None
    """What people call the data set."""
    kind: Kind | None = None
    """classification, multilabel, retrieval (captions) or pairs (a true and a false caption); null asks the data folder."""
    layout: Layout | None = None
    """webdataset: CLIP_benchmark's; imagefolder: SPLIT/CLASS/*.jpg; huggingface: a hub name or a folder of parquet files; null takes one of the first two, by what lies there."""  # noqa: E501
    split: str | None = None
    """Folder of the split below the data folder, or split of a Hugging Face set; null takes test, or val of class folders."""
    prompts: str = "data"
    """Class names and templates: data takes the data folder's, imagenet OpenAI's for ImageNet (80 templates)."""
    classnames: tuple[str, ...] = ()
    """Class names in place of the data's."""
    templates: tuple[str, ...] = ()
    """Templates in place of the data's, with {c} where the class name goes."""
    metric: str | None = None
    """Main metric; null takes acc1, mean_average_precision, mean_recall@1 or acc."""
    num_images: int | None = None
    """Images that the split must have; null does not check."""
    num_classes: int | None = None
    """Classes that the data must have; null does not check."""
    num_captions: int | None = None
    """Captions that the split must have; null does not check."""
    chance: float | None = None
    """Main metric of a guesser, in [0, 1]; null computes it where it follows from the number of classes or images."""
    image_column: str = "image"
    """Image column of a Hugging Face data set."""
    label_column: str = "label"
    """Its labels: class numbers, or for multilabel a list of zeros and ones."""
    caption_column: str = "caption"
    """Its captions: a list of strings."""

    def __post_init__(self) -> None:
        require(self.prompts in ("data", "imagenet"), f"prompts is {self.prompts!r}; choose data or imagenet")
        for template in self.templates:
            require("{c}" in template, f"template {template!r} has no {{c}}, where the class name goes")
        known = METRICS[self.kind] if self.kind else sum(METRICS.values(), ())
        require(self.metric is None or self.metric in known, f"metric is {self.metric!r}; choose from {list(known)}")


@dataclass(frozen=True)
class Subject:
    """A task with its data: what a model is evaluated on."""

    task: Task
    name: str
    data: EvaluationSet
    metric: str

    @property
    def chance(self) -> float | None:
        """Main metric of a guesser."""
        if self.task.chance is not None:
            return self.task.chance
        if self.data.kind == "classification":
            return (5 if self.metric == "acc5" else 1) / self.data.num_classes
        return {"pairs": 0.5, "retrieval": 1 / len(self.data) if self.metric.endswith("@1") else None}.get(
            self.data.kind
        )

    def prompts_sha256(self) -> str:
        prompts = [list(self.data.classnames or ()), list(self.data.templates or ())]
        return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def as_tuple(value: tuple[str, ...] | str) -> tuple[str, ...]:
    return tuple(filter(None, (value,) if isinstance(value, str) else value))


def load_task(path: str | Path | None) -> Task:
    """A task YAML (see eval/); None is CLIP_benchmark's webdataset layout. Exits with one line if the file is wrong."""
    arguments = [] if path is None else ["--config", str(path)]
    return parse_into(Task, arguments, f"eval --task {path or ''}".strip(), "A zero-shot task.")


def find_task_files(names: tuple[str, ...]) -> list[Path]:
    """YAML files, and all those of folders. Raises: FileNotFoundError."""
    found: list[Path] = []
    for path in map(Path, names):
        files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"no task {path}; name a YAML of eval/ or a folder of them (clipkd eval ls)")
        found += files
    return found


def find_data(task: Task, file: Path | None, root: str) -> str | None:
    """A task's data below a folder of several data sets, by the names that DataComp and CLIP_benchmark give them."""
    name = (task.name or "").removeprefix("fairness/").replace("/", "-")
    names = [name, *([file.stem] if file else [])]
    forms = [form for each in filter(None, names) for form in (f"wds_{each}_test", f"wds_{each}", each)]
    return next((str(Path(root) / form) for form in forms if (Path(root) / form).is_dir()), None)


def open_subjects(tasks: tuple[str, ...], roots: tuple[str, ...], *, skip_missing: bool = False) -> list[Subject]:
    """Every task with its data.

    tasks: YAMLs or folders of them. roots: data folders, for one task or none; or one folder below which the data of
    several tasks lie, under the tasks' names.
    Raises: FileNotFoundError naming the tasks without data; ValueError for data that are not what their task says.
    """
    if not roots:
        raise ValueError("data is empty; name a data folder")
    files: list[Path | None] = list(find_task_files(tasks)) or [None]
    loaded = [(file, load_task(file)) for file in files]
    if len(files) == 1:
        ((file, task),) = loaded
        pairs = [(task, find_data(task, file, root) or root) for root in roots]
    else:
        if len(roots) != 1:
            raise ValueError("several tasks take one data folder, below which the data of all of them lie")
        root = roots[0]
        where = [(file, task, find_data(task, file, root)) for file, task in loaded]
        missing = [str(file) for file, task, folder in where if folder is None and task.name]  # others fit any data
        named = ", ".join(missing[:10]) + " …" * (len(missing) > 10)
        if all(folder is None for *_, folder in where):
            raise FileNotFoundError(
                f"{root} has no data folder for any task ({named}); see eval/README.md for their names"
            )
        if missing and not skip_missing:
            raise FileNotFoundError(
                f"{root} has no data folder for {named} ({len(missing)} of {len(files)} tasks); see `clipkd eval ls "
                f"--data {root}`, or leave them out with --skip_missing"
            )
        pairs = [(task, folder) for _, task, folder in where if folder is not None]
    found = [open_subject(task, folder) for task, folder in pairs]
    names = [subject.name for subject in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two tasks or data folders are called {twice[0]!r}; give each a name: in a task of its own")
    return found


def open_subject(task: Task, root: str | Path) -> Subject:
    """The task's data with class names and templates filled in.

    Raises: FileNotFoundError or ValueError naming what is missing, surplus or of another size than the task says.
    """
    columns = (task.image_column, task.label_column, task.caption_column)
    data = open_evaluation_set(root, layout=task.layout, split=task.split, kind=task.kind, columns=columns)
    if data.kind in CLASS_KINDS:
        data = with_prompts(task, data)
    for what, found, expected in (
        ("images", len(data), task.num_images),
        ("classes", data.num_classes, task.num_classes),
        ("captions", sum(map(len, data.captions)), task.num_captions),
    ):
        if expected not in (None, found):
            raise ValueError(
                f"{root} has {found} {what}; the task expects {expected} (leave num_{what} out to take what there is)"
            )
    known = METRICS[data.kind]
    if task.metric not in (None, *known):
        raise ValueError(
            f"{root} holds a {data.kind} task, whose metrics are {list(known)}; the task asks for {task.metric!r}"
        )
    if task.metric == "acc5" and data.num_classes < 5:
        raise ValueError(f"{root} has {data.num_classes} classes, too few for the metric acc5")
    name = task.name or Path(root).resolve().name
    return Subject(task, name, data, task.metric or known[0])


def with_prompts(task: Task, data: EvaluationSet) -> EvaluationSet:
    """Raises: ValueError if class names or templates are missing, or do not fit the labels."""
    if task.prompts == "imagenet":
        data = with_imagenet_prompts(data)
    classnames = task.classnames or data.classnames
    templates = task.templates or data.templates
    if classnames is None:
        raise ValueError(
            f"{data.root} names no classes; set prompts: imagenet, or classnames and templates, in the task"
        )
    if templates is None:
        raise ValueError(f"{data.root} has no templates; set templates in the task, such as ['a photo of a {{c}}.']")
    if data.folders and len(data.folders) != len(classnames):
        raise ValueError(f"{data.root} has {len(data.folders)} class folders, the task {len(classnames)} class names")
    if data.targets is not None:
        check_vector(data.targets[0], len(classnames), f"{data.root}, {data.pictures[0].key}")
    for label, picture in zip(data.labels, data.pictures, strict=False):
        check_label(label, len(classnames), f"{picture.where}: sample {picture.key}")
    return replace(data, classnames=list(classnames), templates=list(templates))


def with_imagenet_prompts(data: EvaluationSet) -> EvaluationSet:
    """Class folders become the ImageNet classes whose synset ids or numbers they bear, in ImageNet's order."""
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
        raise ValueError(
            f"{data.root}: two class folders stand for the same ImageNet class; name them all by synset id"
        )
    order = np.argsort(numbers, kind="stable")
    rank = np.argsort(order)
    return replace(
        data,
        labels=[int(rank[label]) for label in data.labels],
        folders=[data.folders[place] for place in order],
        classnames=[names[numbers[place]] for place in order],
        templates=templates,
    )
