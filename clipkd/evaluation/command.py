"""`clipkd eval`: models × tasks → results, going on where an earlier call ended."""

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from clipkd import distributed
from clipkd.errors import require
from clipkd.evaluation.compare import beside_teacher
from clipkd.evaluation.embed import Embedder, Precision
from clipkd.evaluation.measure import Measured, measure
from clipkd.evaluation.results import Results, describe_result, label, result_id, result_row
from clipkd.evaluation.tasks import Subject, as_tuple, open_subjects
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
    """Task YAMLs such as eval/imagenet.yaml, or a folder of them; none reads CLIP_benchmark's webdataset layout."""
    teacher: str | None = None
    """A model that the others are shown beside: share kept, agreement, divergence, classes that lost most."""
    pretrained: str | None = None
    """Weights of an open_clip name, where `model` is one without @: a tag or a file."""
    output: str = "results"
    """Folder of the results: eval_results.jsonl, clip_benchmark/, samples/, cache/. What is there is not evaluated again."""
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
    """Leave out tasks whose data is not below `data`, instead of refusing."""

    def __post_init__(self) -> None:
        require(bool(self.models), "model is empty; name what to evaluate")
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}; it must be 1 or more")
        require(self.num_workers >= 0, f"num_workers is {self.num_workers}; it must be 0 or more")
        require(
            self.pretrained is None or len(self.models) == 1,
            "pretrained goes with one model; write NAME@WEIGHTS where there are several",
        )

    @property
    def models(self) -> tuple[str, ...]:
        return as_tuple(self.model)


def run(config: EvalConfig) -> list[dict[str, Any]]:
    """Evaluate every model on every task, on every process that was launched; returns the rows.

    Raises: FileNotFoundError or ValueError before anything is evaluated if a model or a data folder cannot be used; later
        if an image cannot be decoded. Rows that are finished stay.
    """
    distributed.join_processes()
    subjects = distributed.together(
        lambda: open_subjects(as_tuple(config.task), as_tuple(config.data), skip_missing=config.skip_missing)
    )
    harness = distributed.together(lambda: Harness(config))
    return [row for subject in subjects for row in harness.evaluate(subject)]


class Harness:
    """Models at the ready, and the results that there are."""

    def __init__(self, config: EvalConfig) -> None:
        """Raises: ValueError or OSError if a model cannot be loaded, or the output not be written."""
        self.config, self.results = config, Results(Path(config.output))
        self.device = torch.device(distributed.join_processes().device or "cpu")
        names = [*([config.teacher] if config.teacher else []), *config.models]
        self.checkpoints = {name: find_checkpoint(name) for name in names}
        self.embedders = {name: self.load(name) for name in names}  # the teacher first, and once
        self.costs: dict[str, Any] = {}
        self.results.folder.mkdir(parents=True, exist_ok=True)

    def load(self, name: str) -> Embedder:
        config, own = self.config, name in self.config.models
        encoder = load_model(
            str(self.checkpoints[name] or name),
            pretrained=config.pretrained if own else None,
            ema=config.weights == "ema" and own,
        )
        return Embedder(
            encoder.to(self.device),
            self.device,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            precision=config.precision,
            cache=self.results.cache if config.cache else None,
        )

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
                row = distributed.together(functools.partial(self.keep, row, measured))
            if distributed.rank() == 0:
                print(describe_row(row) + " (evaluated before)" * before, flush=True)
            rows.append(row)
        return rows

    def keep(self, row: dict[str, Any], measured: Measured) -> dict[str, Any]:
        return self.results.add(row, measured.samples) if distributed.rank() == 0 else row

    def find(self, subject: Subject, name: str, *, teacher: str | None) -> dict[str, Any] | None:
        """A row of an earlier call, beside that teacher if one is wanted; what the main process finds holds for all.

        Raises: ValueError if the processes are about to evaluate different things.
        """
        id = result_id(subject, self.embedders[name])
        if len(set(distributed.gather_objects((self.embedders[name].sha256, subject.data.sha256)))) > 1:
            raise ValueError(f"the processes have different data of {subject.name} or weights of {name}; share both")
        row = self.results.find(id, name)
        if row is not None and teacher is not None:
            row = row if (row.get("teacher") or {}).get("model_sha256") == self.embedders[teacher].sha256 else None
        return distributed.gather_objects(row)[0]

    def measure(self, subject: Subject, name: str) -> tuple[dict[str, Any], Measured]:
        config, embedder = self.config, self.embedders[name]
        started = time.perf_counter()
        measured = measure(embedder, subject, title=f"{subject.name}: {name.rpartition('/')[2]}")
        row = result_row(subject, embedder, measured, time.perf_counter() - started)
        own = name in config.models
        row |= {"model": name, "pretrained": (config.pretrained if own else None) or name.partition("@")[2] or None}
        row |= {"weights": config.weights if own else "student"}
        if folder := self.checkpoints[name]:
            row["checkpoint"] = str(folder)
        if name not in self.costs:  # one process alone, so that the others do not take its cores
            cost = measure_cost(embedder.encoder, self.device) if distributed.rank() == 0 else None
            self.costs[name] = distributed.gather_objects(cost)[0]
        return {**row, "cost": self.costs[name]}, measured


def find_checkpoint(model: str) -> Path | None:
    """Of a run, the checkpoint to evaluate: fixed now, as training may go on."""
    return run_folder.resolve(Path(model)) if Path(model).is_dir() and run_folder.is_run(Path(model)) else None


def describe_row(row: dict[str, Any]) -> str:
    """A row in a line, with what the student kept of its teacher."""
    line = f"{label(row)}  {describe_result(row)}"
    if beside := row.get("teacher"):
        line += f"; {beside['retained']:.1%} of {beside['model']}" if beside["retained"] is not None else ""
        if "agreement" in beside:
            line += f", same answer {beside['agreement']:.1%}, KL {beside['kl']:.3g}"
    return line
