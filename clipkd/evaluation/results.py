"""Result files in the schemas of DataComp and CLIP_benchmark. A row is written last, after its samples."""

import collections
import importlib.metadata
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipkd import files
from clipkd.evaluation.embed import Embedder
from clipkd.evaluation.measure import Measured
from clipkd.evaluation.subjects import Subject

TASK_NAMES = {
    "classification": "zeroshot_classification",
    "multilabel": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
    "pairs": "image_caption_selection",
}
"""Names of the kinds in CLIP_benchmark."""

REQUIRED = {"id", "key", "model", "metrics", "main_metric_name", "ci95", "samples"}
"""Fields that tell clipkd's rows from those of other programs."""

RESULT_VERSION = 2
"""Raise it when the same model and data would give another row."""


def result_row(subject: Subject, embedder: Embedder, measured: Measured, seconds: float) -> dict[str, Any]:
    """The fields of DataComp's eval_results.jsonl and of CLIP_benchmark's JSON, with intervals, hashes and versions."""
    data = subject.data
    main = measured.metrics.get(subject.metric)
    return {
        "key": subject.name,
        "dataset": subject.task.title or subject.name,
        "model": embedder.encoder.name,
        "task": TASK_NAMES[data.kind],
        "metrics": {**measured.metrics, "main_metric": main},
        "main_metric_name": subject.metric,
        "ci95": {**measured.ci95, "main_metric": measured.ci95.get(subject.metric)},
        "chance": subject.chance,
        "n": len(data),
        **measured.counts,
        **({"num_classes": data.num_classes} if data.num_classes else {}),
        **({"calibration": measured.calibration} if measured.calibration else {}),
        "language": "en",
        "precision": embedder.precision,
        "preprocess_cfg": embedder.encoder.preprocess_config,
        "activation": embedder.encoder.activation,
        "logit_scale": embedder.encoder.logit_scale.item(),
        "seconds": round(seconds, 2),
        "id": result_id(subject, embedder),
        "weights_sha256": embedder.weights_sha256,
        "model_sha256": embedder.sha256,
        "data_sha256": data.sha256,
        "prompts_sha256": subject.prompts_sha256(),
        "data": data.root,
        "task_options": asdict(subject.task),
        "versions": {
            package: importlib.metadata.version(package) for package in ("clipkd", "torch", "open_clip_torch")
        },
    }


def result_id(subject: Subject, embedder: Embedder) -> str:
    """Identifies a result: equal for the same model, data (same place, unchanged), prompts and metric."""
    about = [RESULT_VERSION, subject.name, subject.metric, embedder.sha256, subject.data.stamps_sha256]
    return files.sha256_of([*about, subject.prompts_sha256()])[:32]


def describe_result(row: dict[str, Any]) -> str:
    """A row as one line, in percent, with the main metric's interval."""
    main, interval = row["metrics"]["main_metric"], row["ci95"]["main_metric"]
    parts = [f"{row['main_metric_name']} {main:.2%}"]
    if interval is not None:
        parts[0] += f" [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"
    shown = ("acc1", "acc5", "mean_per_class_recall", "image_retrieval_recall@1", "text_retrieval_recall@1")
    parts += [
        f"{name} {value:.2%}"
        for name in shown
        if name != row["main_metric_name"] and (value := row["metrics"].get(name)) is not None
    ]
    return f"{row['key']}: {', '.join(parts)}, n {row['n']}"


def label(row: dict[str, Any]) -> str:
    """Name of a model among several: with its weights, and with `ema` and the precision if they differ from the defaults."""
    if "label" in row:
        return row["label"]
    name = str(row["model"])
    if row.get("pretrained") and "@" not in name:
        name += f"@{row['pretrained']}"
    name += " (ema)" if row.get("weights") == "ema" else ""
    return name if row.get("precision", "fp32") == "fp32" else f"{name} ({row['precision']})"


@dataclass(frozen=True)
class Results:
    """eval_results.jsonl (DataComp), clip_benchmark/*.json, samples/*.parquet and cache/ in one folder."""

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "eval_results.jsonl"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def rows(self) -> list[dict[str, Any]]:
        """One row per model, weights, precision, task and data; rows of other programs are left out.

        Models of one name and different weights get a `label` with the beginning of the weights' hash.
        """
        rows = own_rows(files.read_rows(self.path))
        named = {(label(row), row.get("weights_sha256", "")) for row in rows}
        names = collections.Counter(name for name, _ in named)
        ours = [(row, name := label(row), f"{name} #{row.get('weights_sha256', '')[:8]}") for row in rows]
        return [row | {"label": longer} if names[name] > 1 else row for row, name, longer in ours]

    def find(self, id: str, model: str) -> dict[str, Any] | None:
        """A row of an earlier call whose samples still exist."""
        rows = [row for row in self.rows() if (row["id"], row["model"]) == (id, model)]
        return next((row for row in rows if (self.folder / row["samples"]).is_file()), None)

    def add(self, row: dict[str, Any], samples: dict[str, list[Any]]) -> dict[str, Any]:
        """Write the samples, CLIP_benchmark's file, then the row; replaces an older row of the same weights and data.

        Call on one process; others may add to the same folder.
        """
        name = file_name(f"{label(row)}--{row['key']}", row["id"])
        row = {**row, "samples": f"samples/{name}.parquet"}
        write_samples(self.folder / row["samples"], samples)
        benchmark = {field: row.get(field) for field in ("pretrained", "task", "metrics", "language")}
        benchmark |= {"dataset": row["key"], "model": str(row["model"]).partition("@")[0]}
        files.write_json(self.folder / "clip_benchmark" / f"{name}.json", benchmark)
        with files.exclusive(self.path):
            before = files.read_rows(self.path)
            replaced = [old for old in own_rows(before) if measured_thing(old) == measured_thing(row)]
            kept = [old for old in before if old not in replaced]
            files.write_rows(self.path, (*kept, row))
        for old in replaced:
            if old["samples"] != row["samples"]:
                (self.folder / old["samples"]).unlink(missing_ok=True)
                (self.folder / "clip_benchmark" / f"{Path(old['samples']).stem}.json").unlink(missing_ok=True)
        return row


def own_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.keys() >= REQUIRED]


def measured_thing(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is about. A name alone says little: of a run it means other weights after each checkpoint."""
    return (label(row), row["key"], row.get("weights_sha256"), row.get("data_sha256"), row.get("prompts_sha256"))


def file_name(text: str, id: str) -> str:
    """A safe file name, readable as far as possible and unique per result."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', text)[-120:]}-{files.sha256_of(text + id)[:12]}"


def write_samples(path: Path, samples: dict[str, list[Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    files.write_whole(path, lambda file: parquet.write_table(pyarrow.table(samples), file))


def read_samples(path: Path) -> dict[str, list[Any]]:
    """Raises: ValueError if the file is missing or damaged."""
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path).to_pydict()
    except (OSError, ArrowException) as error:
        raise ValueError(f"{path} is no complete table of samples ({error}); evaluate again") from error
