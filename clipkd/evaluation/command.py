"""`clipkd eval`: evaluate models × tasks, except the results that an earlier call has written."""

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from clipkd import distributed, progress
from clipkd.config.paths import require_writable
from clipkd.errors import require, require_least
from clipkd.evaluation.compare import beside_teacher
from clipkd.evaluation.embed import Embedder, Precision
from clipkd.evaluation.measure import Measured, measure
from clipkd.evaluation.results import Results, describe_result, label, result_id, result_row
from clipkd.evaluation.subjects import Subject, open_subjects
from clipkd.evaluation.tasks import as_tuple
from clipkd.models import run_folder
from clipkd.models.cost import measure_cost
from clipkd.models.load import load_model


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    model: tuple[str, ...] | str
    """One or several of: an open_clip name with its weights (ViT-B-32@laion2b_s34b_b79k), local-dir:FOLDER, hf-hub:REPO, a transformers CLIPModel or SiglipModel folder, an exported student (one of its formats: hf:FOLDER, onnx:FOLDER, onnx-fp16:FOLDER, onnx-int8:FOLDER), a run or checkpoint folder."""  # noqa: E501
    data: tuple[str, ...] | str
    """Data folders of one task; or a folder of the data folders of several tasks; or the name of a Hugging Face data set."""
    task: tuple[str, ...] | str = ()
    """Tasks by name (imagenet1k; all), task YAMLs, or folders of them; none reads CLIP_benchmark's webdataset layout."""
    teacher: str | None = None
    """A model that the others are compared with: share kept, agreement, divergence, classes that lost most."""
    output: str = "results"
    """Folder of the results: eval_results.jsonl, clip_benchmark/, samples/, cache/. Results in it are kept."""
    weights: Literal["student", "ema"] = "student"
    """Which weights of a training checkpoint: the student's or their moving average."""
    batch_size: int = 256
    """Images per forward pass and process."""
    num_workers: int = 2
    """Loader processes per process; 0 loads in the main process."""
    precision: Precision = "fp32"
    """Autocast of the towers; the published protocol is fp32."""
    cache: bool = True
    """Keep image features and classifiers in OUTPUT/cache (2 kB per image and model at width 512)."""
    skip_missing: bool = False
    """Leave out tasks without a folder below `data`, instead of stopping."""

    def __post_init__(self) -> None:
        require(bool(self.models), "model is empty; name one or several")
        require_least(self, batch_size=1, num_workers=0)

    @property
    def models(self) -> tuple[str, ...]:
        return as_tuple(self.model)


def run(config: EvalConfig) -> list[dict[str, Any]]:
    """Evaluate every model on every task, on every process that was launched; returns the rows.

    Raises: FileNotFoundError or ValueError before the first evaluation if a model or a data folder cannot be used; later
        if an image cannot be decoded. Finished rows stay.
    """
    require_writable("output", Path(config.output))
    distributed.join_processes()
    subjects = distributed.together(
        lambda: open_subjects(as_tuple(config.task), as_tuple(config.data), skip_missing=config.skip_missing)
    )
    harness = distributed.together(lambda: Harness(config))
    return [row for subject in subjects for row in harness.evaluate(subject)]


class Harness:
    """The loaded models and the results folder."""

    def __init__(self, config: EvalConfig) -> None:
        """Raises: ValueError or OSError if a model cannot be loaded, or the output not be written."""
        self.config, self.results = config, Results(Path(config.output))
        self.device = torch.device(distributed.join_processes().device or "cpu")
        # The teacher first, with its usual weights, and each model once. A run's newest checkpoint is fixed now, because
        # training may continue.
        weights = dict.fromkeys([config.teacher] if config.teacher else [], "student")
        self.weights: dict[str, str] = weights | dict.fromkeys(config.models, config.weights)
        self.checkpoints = {n: run_folder.resolve(Path(n)) for n in self.weights if run_folder.is_run(Path(n))}
        self.embedders = {
            name: Embedder(
                load_model(str(self.checkpoints.get(name, name)), ema=weights == "ema").to(self.device),
                self.device,
                batch_size=config.batch_size,
                num_workers=config.num_workers,
                precision=config.precision,
                cache=self.results.cache if config.cache else None,
            )
            for name, weights in self.weights.items()
        }
        for name, embedder in self.embedders.items():
            if distributed.rank() == 0:
                progress.console.print(f"{name}: {embedder.encoder.describe_inputs()}", soft_wrap=True, markup=False)
        self.costs: dict[str, Any] = {}
        self.results.folder.mkdir(parents=True, exist_ok=True)

    def evaluate(self, subject: Subject) -> list[dict[str, Any]]:
        """A row of each model, the teacher's first."""
        rows: list[dict[str, Any]] = []
        teacher: Measured | None = None
        for name in self.embedders:
            of = self.config.teacher if name != self.config.teacher else None
            row = self.find(subject, name, teacher=of)
            before = row is not None
            if row is None:
                row, measured = self.measure(subject, name)
                if name == self.config.teacher:
                    teacher = measured
                if of is not None:
                    teacher = teacher or measure(self.embedders[of], subject, title=f"{subject.name}: teacher")
                    row["teacher"] = {"model": of, "model_sha256": self.embedders[of].sha256}
                    row["teacher"] |= beside_teacher(subject, measured, teacher)
                row = distributed.from_main(functools.partial(self.results.add, row, measured.samples))
            if distributed.rank() == 0:
                print(describe_row(row) + " (evaluated before)" * before, flush=True)
            rows.append(row)
        return rows

    def find(self, subject: Subject, name: str, *, teacher: str | None) -> dict[str, Any] | None:
        """A row of an earlier call, compared with that teacher if there is one.

        Raises: ValueError if the processes are about to evaluate different things.
        """
        embedder = self.embedders[name]
        if len(set(distributed.gather_objects((embedder.sha256, subject.data.sha256)))) > 1:
            raise ValueError(f"the processes have different data of {subject.name} or weights of {name}; share both")
        row = distributed.from_main(lambda: self.results.find(result_id(subject, embedder), name))
        if row is None or teacher is None:
            return row
        return row if (row.get("teacher") or {}).get("model_sha256") == self.embedders[teacher].sha256 else None

    def measure(self, subject: Subject, name: str) -> tuple[dict[str, Any], Measured]:
        embedder = self.embedders[name]
        started = time.perf_counter()
        measured = measure(embedder, subject, title=f"{subject.name}: {name.rpartition('/')[2]}")
        row = result_row(subject, embedder, measured, time.perf_counter() - started)
        row |= {"model": name, "pretrained": name.partition("@")[2] or None, "weights": self.weights[name]}
        if name in self.checkpoints:
            row["checkpoint"] = str(self.checkpoints[name])
        if name not in self.costs:  # on one process, while the others leave it the cores
            self.costs[name] = distributed.from_main(lambda: measure_cost(embedder.encoder, self.device))
        return {**row, "cost": self.costs[name]}, measured


def describe_row(row: dict[str, Any]) -> str:
    """A row as one line, with the share that the student keeps of its teacher's metric."""
    line = f"{label(row)}  {describe_result(row)}"
    if beside := row.get("teacher"):
        line += f"; {beside['retained']:.1%} of {beside['model']}" if beside["retained"] is not None else ""
        if "agreement" in beside:
            line += f", same answer {beside['agreement']:.1%}, KL {beside['kl']:.3g}"
    return line
