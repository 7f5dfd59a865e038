"""Logged steps: metrics.jsonl, the trackers and the progress bar."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from clipkd import distributed, files, progress


class Recorder:
    """Writes one row per logged step. `bar` shows the latest one."""

    def __init__(self, folder: Path, accelerator: Accelerator, *, steps: int, start: int, terms: list[str]) -> None:
        """terms: names of the loss terms, which the bar shows if there are several."""
        self.path, self.accelerator, self.terms = folder / "metrics.jsonl", accelerator, terms
        self.bar = progress.Bar(folder.name, steps, done=start, visible=accelerator.is_main_process)

    def write(self, step: int, metrics: dict[str, Tensor], *, epoch: float, others: dict[str, float]) -> None:
        """Write the mean of each metric over the processes, then `others` as they are. Call on every process."""
        values = torch.stack([value.detach().float().to(self.accelerator.device) for value in metrics.values()])
        row = {"step": step, "epoch": epoch, "world_size": distributed.world_size()}
        row |= dict(zip(metrics, distributed.mean(values).tolist(), strict=True)) | others
        if self.accelerator.is_main_process:
            files.append_row(self.path, row)
        self.accelerator.log(row, step=step)
        self.bar.note = describe(row, self.terms)


def describe(row: dict[str, Any], terms: list[str]) -> str:
    """One line: the loss, its terms, the divergence from the teacher, speed and skipped samples."""
    divergences = [name for name in row if name.endswith("_kl")]
    shown = ["loss", *(terms if len(terms) > 1 else []), *divergences]
    parts = [f"{name} {row[name]:.3g}" for name in shown]
    parts += [f"{row['images_per_second']:.3g} images/s", f"data wait {row['data_wait']:.0%}"]
    return ", ".join([*parts, f"{row['skipped']} skipped"] if row["skipped"] else parts)
