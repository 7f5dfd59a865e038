"""The checkpoint that a run starts from, and whether it belongs to the same run."""

import json
from pathlib import Path
from typing import Any

from clipkd.config import train as configuration
from clipkd.config.train import TrainConfig
from clipkd.models import run_folder

RESUME_MAY_DIFFER = (
    *("output", "resume", "threads", "checkpoint.", "evaluation.", "log.", "data.num_workers", "data.max_skipped"),
    # These change numbers by rounding only (but for dropout's masks and a BatchNorm's parts).
    *("micro_batches", "objective.tile_size", "objective.compile"),
    # The identity compares the content of these.
    *("data.path", "data.mix", "teacher.models", "teacher.cache", "objective.closed_set.classes"),
)


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to start from; None is step 0.

    Raises: ValueError if the output already holds a run that this one would overwrite or mix with.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a folder")
    if config.resume == "latest":
        return run_folder.newest(output)
    saved = run_folder.whole_checkpoints(output)
    if config.resume is None:
        if saved:
            raise ValueError(
                f"{output} already holds a run, {saved[-1].name}; continue it with --resume latest or set --output"
            )
        return None
    resumed = run_folder.resolve(Path(config.resume))
    if saved and saved[-1].resolve() != resumed.resolve():
        raise ValueError(f"{output} holds {saved[-1].name} already; to go back to {resumed}, set another --output")
    return resumed


def require_same_run(folder: Path, state: dict[str, Any], config: TrainConfig, identity: dict[str, Any]) -> None:
    """Raises: ValueError naming the first option or part of the identity that differs from the checkpoint's."""
    flatten = configuration.flatten
    defaults = flatten(configuration.to_dict(TrainConfig()))  # for options that came after the checkpoint
    before, now = defaults | flatten(state["config"]), flatten(configuration.to_dict(config))
    before |= flatten(state["identity"])
    now |= flatten(json.loads(json.dumps(identity)))  # as it reads after a checkpoint: lists for tuples
    for key in sorted(before.keys() | now.keys(), key=lambda key: (not key.endswith(".pairs"), key)):  # counts say most
        if not key.startswith(RESUME_MAY_DIFFER) and before.get(key) != now.get(key):
            raise ValueError(
                f"{folder} was made with {key} = {before.get(key)}, now it is {now.get(key)}; "
                "a resumed run must keep it: change it back, or start another run"
            )
