"""Load the student to export and collect where it comes from."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clipkd import files
from clipkd.config.train import split_weights
from clipkd.models import run_folder
from clipkd.models.encoder import Encoder
from clipkd.models.load import load_model


@dataclass(frozen=True)
class Source:
    """Origin of a student, without paths of this machine; of a bare model folder only its name is known."""

    checkpoint: str
    weights: str
    config: dict[str, Any] | None = None
    """Resolved configuration of the training run."""
    step: int | None = None
    teachers: tuple[str, ...] = ()
    """SHA-256 of each teacher's weights."""
    results: tuple[dict[str, Any], ...] = ()
    """Evaluations of these weights during training."""


def open_student(name: str, *, ema: bool) -> tuple[Encoder, Source]:
    """Raises: ValueError if there is no such run, checkpoint or open_clip folder, or it is damaged."""
    path = Path(name.removeprefix("local-dir:"))
    if not path.is_dir():
        raise ValueError(f"no checkpoint {name}; name a run folder, a checkpoint or a model folder")
    if not run_folder.is_run(path):
        return load_model(name, ema=ema), Source(path.resolve().name, "weights")
    folder = run_folder.resolve(path).resolve()
    encoder = load_model(str(folder), ema=ema)
    state = run_folder.read_state(folder)
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    teachers = state["identity"].get("teachers") or {}
    digest = encoder.weights_sha256()
    return encoder, Source(
        f"{run.name}/{folder.relative_to(run)}",
        "ema" if ema else "student",
        config=publishable(state["config"]),
        step=state["step"],
        teachers=tuple(each["sha256"] for each in teachers.values()),
        results=tuple(row for row in files.read_rows(run / "results.jsonl") if row.get("weights_sha256") == digest),
    )


PARENTS = re.compile(r"^(local-dir:)?(?:~|\.{1,2})?/(?:.*/)?(?=[^/]+/?$)")
"""The parent folders of a path that is absolute or begins with a dot."""


def publishable(value: Any) -> Any:
    """Remove private parts from options: parent folders of paths, commands, credentials and queries of URLs."""
    if isinstance(value, dict):
        return {key: publishable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [publishable(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("pipe:"):
        return "pipe:…"
    if "://" in value:
        address = urlsplit(value)
        return f"{address.scheme}://{address.hostname or ''}{address.path}"
    return "@".join(PARENTS.sub(r"\1", part) for part in split_weights(value) if part is not None)
