"""Where a run starts from, and whether what it resumes is the same run."""

import json
from pathlib import Path
from typing import Any

from clipkd import checkpoint
from clipkd import config as configuration
from clipkd.config import TrainConfig

RESUME_MAY_DIFFER = (
    *("output", "resume", "threads", "checkpoint.", "evaluation.", "log.", "data.num_workers", "data.max_skipped"),
    # Compared by what they hold, not by where it lies.
    *("data.path", "data.mix", "teacher.model", "teacher.pretrained", "ensemble", "objective.closed_set.classes"),
)


def find_checkpoint(config: TrainConfig) -> Path | None:
    """Where to start from: None is step 0.

    Raises: ValueError if the output already holds a run that this one would overwrite or mix with.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a folder")
    saved = checkpoint.whole_checkpoints(output)
    if config.resume == "latest":
        return saved[-1] if saved else None
    if config.resume is None:
        if saved:
            raise ValueError(
                f"{output} already holds a run, {saved[-1].name}; continue it with --resume latest or set --output"
            )
        return None
    resumed = checkpoint.resolve(Path(config.resume))
    if saved and saved[-1].resolve() != resumed.resolve():
        raise ValueError(f"{output} holds {saved[-1].name} already; to go back to {resumed}, set another --output")
    return resumed


def require_same_run(folder: Path, state: dict[str, Any], config: TrainConfig, identity: dict[str, Any]) -> None:
    """Raises: ValueError naming the first thing that would make the resumed run another run."""
    defaults = flatten(configuration.to_dict(TrainConfig()))  # for options that came after the checkpoint
    before, now = defaults | flatten(state["config"]), flatten(configuration.to_dict(config))
    before |= flatten(state["identity"])
    now |= flatten(json.loads(json.dumps(identity)))  # as it reads after a checkpoint: lists for tuples
    for key in sorted(before.keys() | now.keys()):
        if not key.startswith(RESUME_MAY_DIFFER) and before.get(key) != now.get(key):
            raise ValueError(
                f"{folder} was made with {key} = {before.get(key)}, now it is {now.get(key)}; "
                "a resumed run must keep it: change it back, or start another run"
            )


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{a: {b: 1}} → {a.b: 1}; lists become text, as trackers want it."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value) if isinstance(value, list) else value
    return flat
