"""Zero-shot evaluation during training: results.jsonl and the best checkpoint."""

import time
from pathlib import Path
from typing import Any

import torch

from clipkd import distributed, files, progress
from clipkd.config.train import TrainConfig
from clipkd.evaluation.embed import Embedder
from clipkd.evaluation.measure import measure
from clipkd.evaluation.results import describe_result, result_row
from clipkd.evaluation.subjects import Subject
from clipkd.models import run_folder
from clipkd.models.encoder import Encoder
from clipkd.training import checkpoint

Rows = list[dict[str, Any]]


class Evaluator:
    """Evaluates the student and its moving average on every configured task."""

    def __init__(
        self, config: TrainConfig, subjects: list[Subject], encoders: dict[str, Encoder], device: torch.device
    ) -> None:
        """encoders: student, then ema where there is one."""
        self.config, self.subjects, self.encoders, self.device = config, subjects, encoders, device
        self.folder = Path(config.output)

    def is_due(self, step: int) -> bool:
        """Whether the configuration asks for an evaluation after this step."""
        every = self.config.evaluation.every_steps
        on_the_way = every > 0 and step > 0 and step % every == 0
        return bool(self.subjects) and (on_the_way or step == self.config.steps)

    def is_done(self, step: int) -> bool:
        """Whether results.jsonl has all rows of this step; the main process decides for all."""
        return distributed.from_main(lambda: len(self.rows_of(step)) >= len(self.subjects) * len(self.encoders))

    def rows_of(self, step: int | None) -> Rows:
        return [row for row in files.read_rows(self.folder / "results.jsonl") if row.get("step") == step]

    def evaluate(self, step: int) -> Rows:
        """Append one row per task and encoder to results.jsonl, and return them. Call on every process."""
        rows: Rows = []
        for subject in self.subjects:
            for weights, encoder in self.encoders.items():
                row = self.measure(encoder, subject)
                rows.append(row | {"model": str(self.folder), "weights": weights, "step": step})
        distributed.together(lambda: self.write(step, rows) if distributed.rank() == 0 else None)
        return rows

    def write(self, step: int, rows: Rows) -> None:
        """Call on the main process."""
        if self.is_best(rows) and run_folder.checkpoint_folder(self.folder, step).is_dir():
            progress.console.print(f"step {step} is the best so far: {checkpoint.keep_best(self.folder, step)}")
        for row in rows:
            files.append_row(self.folder / "results.jsonl", row)
            who = f"step {step}{', moving average' if row['weights'] == 'ema' else ''}"
            progress.console.print(f"{who}: {describe_result(row)}", soft_wrap=True, markup=False)

    def measure(self, encoder: Encoder, subject: Subject) -> dict[str, Any]:
        training, started = encoder.training, time.perf_counter()
        distributed.copy_from_main(encoder.buffers())  # BatchNorm's: each process has seen its own share
        embedder = Embedder(encoder.eval(), self.device, num_workers=self.config.data.num_workers)
        measured = measure(embedder, subject, title=f"evaluate {subject.name}")
        row = result_row(subject, embedder, measured, time.perf_counter() - started)
        encoder.train(training)
        return row

    def is_best(self, rows: Rows) -> bool:
        """Whether evaluation.best's metric is higher in these rows than in those of the checkpoint in RUN/best."""
        if self.config.evaluation.best is None:
            return False
        task, metric = parse_best(self.config.evaluation.best)
        weights = list(self.encoders)[-1]  # ema where there is one

        def best_of(found: Rows) -> float:
            own = [row["metrics"].get(metric) for row in found if (row["key"], row["weights"]) == (task, weights)]
            return max((value for value in own if value is not None), default=-1.0)

        return best_of(rows) > best_of(self.rows_of(checkpoint.best_step(self.folder)))


def parse_best(best: str) -> tuple[str, str]:
    """TASK or TASK:METRIC → task, metric."""
    task, _, metric = best.partition(":")
    return task, metric or "main_metric"
