"""Logged steps and evaluations: metrics.jsonl, the trackers and the progress bar."""

import importlib.util
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from clipkd import distributed, files, progress
from clipkd.config.train import TrainConfig, flatten, to_dict
from clipkd.report.training import draw_run


class Recorder:
    """Writes one row per logged step. `bar` shows the latest one; as a context manager it closes bar and trackers."""

    def __init__(self, folder: Path, accelerator: Accelerator, *, steps: int, start: int, terms: list[str]) -> None:
        """terms: names of the loss terms, which the bar shows if there are several."""
        self.folder, self.accelerator, self.start, self.terms = folder, accelerator, start, terms
        self.bar = progress.Bar(folder.name, steps, done=start, visible=accelerator.is_main_process)

    def start_trackers(self, config: TrainConfig) -> None:
        """Open the trackers of log.trackers in the run folder; a resumed run continues its curves. Call on every process."""
        name, id_file = self.folder.resolve().name, self.folder / "wandb_id"
        if (
            self.accelerator.is_main_process
            and "wandb" in config.log.trackers
            and not (self.start and id_file.is_file())
        ):
            files.write_text(id_file, secrets.token_hex(8))
        options = flatten(to_dict(config)).items()
        each: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": self.start + 1}}
        if id_file.is_file():
            each["wandb"] = {"dir": str(self.folder), "name": name, "id": id_file.read_text(), "resume": "allow"}
        # Trackers take no lists.
        plain = {name: str(value) if isinstance(value, list) else value for name, value in options}
        self.accelerator.init_trackers("clipkd", config=plain, init_kwargs=each)

    def write(self, step: int, metrics: dict[str, Tensor], *, epoch: float, others: dict[str, float]) -> None:
        """Write the mean of each metric over the processes, then `others` as they are. Call on every process."""
        values = torch.stack([value.detach().float().to(self.accelerator.device) for value in metrics.values()])
        row = {"step": step, "epoch": epoch, "world_size": distributed.world_size()}
        row |= dict(zip(metrics, distributed.mean(values).tolist(), strict=True)) | others
        is_main = self.accelerator.is_main_process
        distributed.together(lambda: files.append_row(self.folder / "metrics.jsonl", row) if is_main else None)
        self.accelerator.log(row, step=step)
        self.bar.note = describe(row, self.terms)

    def track_results(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Send the metrics of an evaluation to the trackers, with the plots of `clipkd report` so far."""
        for row in rows:
            prefix = f"{row['key']}/{'ema/' if row['weights'] == 'ema' else ''}"
            known = {name: value for name, value in row["metrics"].items() if value is not None}
            self.accelerator.log({f"{prefix}{name}": value for name, value in known.items()}, step=step)
        self.track_plots(step)

    def track_plots(self, step: int) -> None:
        if not (
            self.accelerator.is_main_process and self.accelerator.trackers and importlib.util.find_spec("matplotlib")
        ):
            return
        plots = {f"report/{title}": pixels[np.newaxis] for title, pixels in draw_run(self.folder).items()}
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(plots, step=step, **layout)  # type: ignore[attr-defined]

    def __enter__(self) -> "Recorder":
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.__exit__(kind, value, traceback)
        if kind is None:
            self.track_plots(self.bar.done)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers.clear()


def describe(row: dict[str, Any], terms: list[str]) -> str:
    """One line: the loss, its terms, the divergence from the teacher, speed and skipped samples."""
    divergences = [name for name in row if name.endswith("_kl")]
    shown = ["loss", *(terms if len(terms) > 1 else []), *divergences]
    parts = [f"{name} {row[name]:.3g}" for name in shown]
    parts += [f"{row['images_per_second']:.3g} images/s", f"data wait {row['data_wait']:.0%}"]
    return ", ".join([*parts, f"{row['skipped']} skipped"] if row["skipped"] else parts)
