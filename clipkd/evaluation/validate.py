"""`clipkd eval validate`: check data folders against their tasks."""

from dataclasses import dataclass

from clipkd.errors import require_least
from clipkd.evaluation.sets import Images
from clipkd.evaluation.subjects import Subject, open_subject
from clipkd.evaluation.tasks import as_tuple, locate


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    data: str
    """A data folder, or a folder of the data folders of several tasks."""
    task: tuple[str, ...] | str = ()
    """Tasks by name, task YAMLs, or folders of them; none checks the layout alone."""
    decode: int = 64
    """Images to decode, evenly spaced; 0 decodes all."""

    def __post_init__(self) -> None:
        require_least(self, decode=0)


def validate(config: ValidateConfig) -> list[str]:
    """Problems, at most one per data folder; prints a line for every folder without one.

    Raises: FileNotFoundError if there is no data folder at all.
    """
    problems = []
    for task, folder in locate(as_tuple(config.task), (config.data,), skip_missing=True):
        try:
            subject = open_subject(task, folder)
            images = Images(subject.data.pictures, lambda image: image)
            count = min(config.decode or len(images), len(images))
            for place in range(count):
                images[place * len(images) // count]
        except (ValueError, OSError) as error:
            problems.append(str(error))
        else:
            print(describe(subject), flush=True)
    return problems


def describe(subject: Subject) -> str:
    data = subject.data
    parts = [f"{len(data):,} images"]
    if data.templates is not None:
        parts.append(f"{data.num_classes:,} classes, {len(data.templates)} templates")
        if idle := data.num_classes - len(set(data.labels)) if data.labels else 0:
            parts.append(f"{idle} classes without images")
    if data.captions:
        parts.append(f"{sum(map(len, data.captions)):,} captions")
    return f"{data.root}: {data.kind} {subject.name}, {', '.join(parts)}, sha256 {data.sha256[:16]}"
