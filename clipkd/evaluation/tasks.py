"""Zero-shot tasks: the options of a task file, and where files and data are found. Imports no torch."""

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from clipkd.config import shipped
from clipkd.config.yaml_file import read_yaml
from clipkd.errors import require
from clipkd.files import expand_home

Kind = Literal["classification", "multilabel", "retrieval", "pairs"]
Layout = Literal["webdataset", "imagefolder", "huggingface"]

METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("acc1", "acc5", "mean_per_class_recall"),
    "multilabel": ("mean_average_precision",),
    "retrieval": (
        "mean_recall@1",
        *(f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)),
    ),
    "pairs": ("acc",),
}
"""Metrics of each kind of task; the first is the default main metric."""


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str | None = None
    """Key in the results; null takes the data folder's name."""
    title: str | None = None
    """Common name of the data set."""
    kind: Kind | None = None
    """classification, multilabel, retrieval (captions) or pairs (a true and a false caption); null asks the data folder."""
    layout: Layout | None = None
    """webdataset: CLIP_benchmark's; imagefolder: SPLIT/CLASS/*.jpg; huggingface: a hub name or a folder of parquet files; null takes one of the first two, by the files found."""  # noqa: E501
    split: str | None = None
    """Folder of the split below the data folder, or split of a Hugging Face set; null takes test, or val of class folders."""
    configuration: str | None = None
    """Configuration of a Hugging Face set that has several."""
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


def as_tuple(value: tuple[str, ...] | str) -> tuple[str, ...]:
    return tuple(filter(None, (value,) if isinstance(value, str) else value))


def load_task(path: str | Path | None) -> Task:
    """A task file; None is CLIP_benchmark's webdataset layout. Raises: ValueError naming the file and the wrong option."""
    if path is None:
        return Task()
    types = {field.name: field.type for field in fields(Task)}
    read = read_yaml(Path(path), Task, lambda name: next(iter(difflib.get_close_matches(name, types)), None))
    options: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in read.items()}
    try:
        return Task(**options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find_task_files(names: tuple[str, ...]) -> list[Path]:
    """Task files: of shipped tasks by name (`all` for every one), YAML files, and the YAML files of folders.

    Raises: ValueError for a name that is none of these.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if name == "all":
            found += shipped.task_files()
        elif path.is_dir() and (files := sorted(path.glob("*.yaml"))):
            found += files
        else:
            found.append(path if path.is_file() else shipped.task(name))
    return found


def find_data(task: Task, file: Path | None, root: str) -> str | None:
    """A task's data below a folder of several data sets, by the names that DataComp and CLIP_benchmark give them."""
    name = (task.name or "").removeprefix("fairness/").replace("/", "-")
    names = [name, *([file.stem] if file else [])]
    forms = [form for each in filter(None, names) for form in (f"wds_{each}_test", f"wds_{each}", each)]
    return next((str(Path(root) / form) for form in forms if (Path(root) / form).is_dir()), None)


def locate(tasks: tuple[str, ...], roots: tuple[str, ...], *, skip_missing: bool = False) -> list[tuple[Task, str]]:
    """Every task with its data folder.

    tasks: see find_task_files; none is CLIP_benchmark's layout. roots: data folders of one task; or one folder below which
    the data of several tasks is stored, under the tasks' names.
    Raises: FileNotFoundError naming the tasks without data.
    """
    if not roots:
        raise ValueError("data is empty; name a data folder")
    roots = tuple(map(expand_home, roots))
    files: list[Path | None] = list(find_task_files(tasks)) or [None]
    loaded = [load_task(file) for file in files]
    if len(files) == 1:
        return [(loaded[0], find_data(loaded[0], files[0], root) or root) for root in roots]
    if len(roots) != 1:
        raise ValueError("several tasks take one data folder, below which the data of all of them is stored")
    found = [(task, find_data(task, file, roots[0])) for file, task in zip(files, loaded, strict=True)]
    missing = [str(task.name) for task, folder in found if folder is None and task.name]  # others fit any data
    present = [(task, folder) for task, folder in found if folder is not None]
    if not present or (missing and not skip_missing):
        named = ", ".join(missing[:10]) + " …" * (len(missing) > 10)
        advice = ", or leave them out with --skip_missing" if present else "; eval/README.md names the folders"
        raise FileNotFoundError(
            f"{roots[0]} has no data folder for {named} ({len(missing)} of {len(files)} tasks){advice}"
        )
    return present
