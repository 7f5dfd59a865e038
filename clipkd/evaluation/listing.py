"""`clipkd eval ls`: the table of tasks. Imports no torch."""

from dataclasses import dataclass

from rich.table import Table

from clipkd.evaluation.tasks import METRICS, as_tuple, find_data, find_task_files, load_task


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    task: tuple[str, ...] | str = "all"
    """Tasks by name, task YAMLs, or folders of them; all lists every shipped task."""
    data: str | None = None
    """Folder of data folders: adds a column with the data folder of each task."""


def list_tasks(config: ListConfig) -> Table:
    """One line per task file: metric, sizes, chance level, and where its data is."""
    table = Table()
    for heading in ("file", "task", "kind", "metric", "images", "classes", "chance %", *["data"] * bool(config.data)):
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
        table.add_row(file.stem, task.name, task.kind or "", metric, *numbers, chance, *where)
    return table
