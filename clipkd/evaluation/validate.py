"""`clipkd eval ls` and `clipkd eval validate`: which tasks there are, and whether a data folder is what its task says."""

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from clipkd.errors import require
from clipkd.evaluation.sets import Images
from clipkd.evaluation.tasks import METRICS, Subject, as_tuple, find_data, find_task_files, load_task, open_subject


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    task: tuple[str, ...] | str = "eval"
    """Folder of task YAMLs, or some of them."""
    data: str | None = None
    """Folder of data folders: says which tasks have their data there."""


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    data: str
    """A data folder, or a folder of the data folders of several tasks."""
    task: tuple[str, ...] | str = ()
    """Task YAMLs, or a folder of them: what their data is checked against; none checks the layout alone."""
    decode: int = 64
    """Images to decode, evenly spaced; 0 decodes all."""

    def __post_init__(self) -> None:
        require(self.decode >= 0, f"decode is {self.decode}; it must be 0 or more")


def list_tasks(config: ListConfig) -> Table:
    """One line per task file: metric, sizes, chance level, and where its data is."""
    table = Table()
    headings = ["file", "task", "kind", "metric", "images", "classes", "chance %", *(["data"] if config.data else [])]
    for heading in headings:
        right = heading in ("images", "classes", "chance %")
        table.add_column(heading, justify="right" if right else "left", no_wrap=not right)
    for file in find_task_files(as_tuple(config.task)):
        task = load_task(file)
        if task.name is None:
            continue  # fits any data
        metric = task.metric or METRICS[task.kind or "classification"][0]
        numbers = ["" if value is None else f"{value:,}" for value in (task.num_images, task.num_classes)]
        chance = "" if task.chance is None else f"{100 * task.chance:.2f}"
        where = [find_data(task, file, config.data) or "–"] if config.data else []
        table.add_row(file.stem, task.name or "", task.kind or "", metric, *numbers, chance, *where)
    return table


def validate(config: ValidateConfig) -> list[str]:
    """Problems, one per data folder that has one; prints a line for each that has none.

    Raises: FileNotFoundError if there is no data folder at all.
    """
    files: list[Path | None] = list(find_task_files(as_tuple(config.task))) or [None]
    loaded = [(file, load_task(file)) for file in files]
    found = [(task, find_data(task, file, config.data)) for file, task in loaded]
    if len(found) == 1:
        found = [(found[0][0], found[0][1] or config.data)]
    if all(folder is None for _, folder in found):
        raise FileNotFoundError(f"{config.data} has no data folder for any of {len(found)} tasks")
    problems = []
    for task, folder in found:
        if folder is None:
            continue
        try:
            subject = open_subject(task, folder)
            decode_some(subject, config.decode)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        else:
            print(describe(subject), flush=True)
    return problems


def decode_some(subject: Subject, number: int) -> None:
    """Raises: ValueError naming the image that cannot be decoded."""
    images = Images(subject.data.pictures, lambda image: image)
    count = min(number or len(images), len(images))
    for place in range(count):
        images[place * len(images) // count]


def describe(subject: Subject) -> str:
    data = subject.data
    parts = [f"{len(data):,} images"]
    if data.classnames is not None and data.templates is not None:
        parts.append(f"{data.num_classes:,} classes, {len(data.templates)} templates")
        if idle := data.num_classes - len(set(data.labels)) if data.labels else 0:
            parts.append(f"{idle} classes without images")
    if data.captions:
        parts.append(f"{sum(map(len, data.captions)):,} captions")
    return f"{data.root}: {data.kind} {subject.name}, {', '.join(parts)}, sha256 {data.sha256[:16]}"
