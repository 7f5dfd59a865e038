"""`clipkd export`: write a student in several formats, prove their parity, and describe the result in a model card."""

import importlib.metadata
import json
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clipkd import files
from clipkd.config.paths import require_writable
from clipkd.errors import RunStopped, require
from clipkd.evaluation.subjects import open_subjects
from clipkd.evaluation.tasks import as_tuple
from clipkd.export.artefacts import FORMATS, check_formats, keep_formats, write_formats, write_open_clip
from clipkd.export.card import Source, open_student, write_card
from clipkd.export.parity import check_parity
from clipkd.export.probes import cut_drawings, drawing_names, write_example, write_probes
from clipkd.models.encoder import Encoder

ALSO_OURS = {"bench.json", ".gitattributes"}
"""Files that `clipkd bench` and the hub add to an export."""

RUN_FOLDERS = ("checkpoints", "best")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    checkpoint: str
    """A run folder (its newest checkpoint), one checkpoint of it, or an open_clip folder."""
    to: tuple[str, ...] | str = "open_clip"
    """Formats, as a list or with commas: open_clip, hf (transformers), onnx, onnx-fp16, onnx-int8, immich, executorch."""
    output: str
    """Folder to write; must not exist yet, unless `force` is given."""
    weights: Literal["student", "ema"] = "student"
    """The student's weights or their moving average."""
    verify: tuple[str, ...] | str = ()
    """Tasks, by name (imagenet1k) or as YAML files, to evaluate every artefact on; needs `data`."""
    data: tuple[str, ...] | str = ()
    """Data of these tasks, as in `clipkd eval`; without `verify`, folders in CLIP_benchmark's layout to evaluate on."""
    license: str | None = None
    """Licence of the weights for the model card, such as apache-2.0; null means not stated."""
    force: bool = False
    """Replace an earlier export in `output`."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in FORMATS]
        require(not unknown, f"to has {', '.join(map(repr, unknown))}; choose from {', '.join(FORMATS)}")
        require(bool(self.formats), f"to is empty; choose from {', '.join(FORMATS)}")
        valid = self.license is None or re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license) is not None
        require(valid, f"license is {self.license!r}; the hub knows licences by identifiers such as apache-2.0 or mit")
        require(not self.verify or bool(as_tuple(self.data)), "verify needs data: the folder of the task's data")

    @property
    def formats(self) -> tuple[str, ...]:
        """Each once, in the order of FORMATS."""
        named = {name.strip() for each in as_tuple(self.to) for name in each.split(",")} - {""}
        return tuple(sorted(named, key=lambda name: (*FORMATS, name).index(name)))


def export(config: ExportConfig) -> list[dict[str, Any]]:
    """Write config.output, complete or not at all; returns the rows of its parity.json.

    Every artefact is loaded by its own software before the folder gets its name. One whose parity cannot be shown is left
    out; the `error` of its row is the reason.

    Raises: ValueError if the output exists, the student does not fit a format, or a format's software is missing;
        RunStopped if no artefact remains.
    """
    require(int(os.environ.get("WORLD_SIZE", "1")) == 1, "export runs on one process; start it without a launcher")
    output = Path(config.output)
    check_output(output, Path(config.checkpoint.removeprefix("local-dir:")), force=config.force)
    encoder, source = open_student(config.checkpoint, ema=config.weights == "ema")
    check_formats(encoder, config.formats)
    if config.data:  # wrong data is found before anything is written
        open_subjects(as_tuple(config.verify), as_tuple(config.data))
    with files.write_folder(output) as folder:
        errors = write_formats(encoder, folder, config.formats)
        write_example(folder / "example.png")
        written = [format for format in config.formats if format not in errors]
        proven = verify(config, encoder, folder, folder.with_name("work"), written)
        rows = [proven.get(format) or {"format": format, "error": errors[format]} for format in config.formats]
        kept = [row["format"] for row in rows if not row["error"]]
        if not kept:
            reasons = "; ".join(f"{row['format']}: {row['error']}" for row in rows)
            raise RunStopped(f"no artefact could be proven: {reasons}")
        keep_formats(folder, kept, own_tokenizer="hf_tokenizer_name" in (encoder.model_config or {})["text_cfg"])
        for row in rows:
            weights = {} if row["error"] else FORMATS[row["format"]].weights
            row["files"] = {tower: (folder / name).stat().st_size for tower, name in weights.items()}
        write_card(folder, encoder, source, rows, name=output.resolve().name, license=config.license)
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        files.write_json(folder / "parity.json", describe_parity(encoder, source, rows) | {"files": names})
    return rows


def check_output(output: Path, source: Path, *, force: bool) -> None:
    """Raises: ValueError if the output exists and may not be replaced, or overlaps with the source."""
    if output.is_symlink():
        raise ValueError(f"{output} is a link; name the folder that it points to, or another --output")
    here, there = output.resolve(), source.resolve()
    if here == there or here in there.parents:
        raise ValueError(f"{output} contains the student to export ({source}); choose another --output")
    if there in here.parents and ((there / "state.json").is_file() or here.relative_to(there).parts[0] in RUN_FOLDERS):
        raise ValueError(f"{output} is among a run's checkpoints, which training deletes; choose another --output")
    if not output.exists():
        return require_writable("output", output)
    if not force:
        raise ValueError(f"{output} exists already; remove it, choose another --output, or replace it with --force")
    if not output.is_dir():
        raise ValueError(f"{output} is no folder; choose another --output")
    present = {str(path.relative_to(output)) for path in output.rglob("*") if not path.is_dir()}
    try:
        written = {"parity.json", *json.loads((output / "parity.json").read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        written = set()
    if others := sorted(present - written - ALSO_OURS):
        raise ValueError(
            f"{output} holds files that no export of clipkd has written ({others[0]}, {len(others)} such), so --force "
            "does not replace it; remove it yourself or choose another --output"
        )


def verify(
    config: ExportConfig, encoder: Encoder, folder: Path, work: Path, formats: list[str]
) -> dict[str, dict[str, Any]]:
    """Format → its row of parity.json. work: a folder for temporary files."""
    (work / "student").mkdir(parents=True)
    write_probes(encoder, work / "probes", cut_drawings(), drawing_names())
    write_open_clip(encoder, work / "student")
    sigmoid, tasks, data = encoder.logit_bias is not None, as_tuple(config.verify), as_tuple(config.data)
    return check_parity(folder, work, formats, sigmoid=sigmoid, tasks=tasks, data=data)


def describe_parity(encoder: Encoder, source: Source, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of parity.json, without the list of files."""
    packages = ("clipkd", "torch", "open_clip_torch")
    return {
        "source": {"checkpoint": source.checkpoint, "weights": source.weights, "step": source.step},
        "source_sha256": encoder.weights_sha256(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "artefacts": [{key: value for key, value in row.items() if key != "snippet_output"} for row in rows],
    }


def describe_artefact(row: dict[str, Any]) -> str:
    """A row of parity.json as one line."""
    if row["error"]:
        return f"{row['format']}: left out, {row['error']}"
    differences = ", ".join(f"{tower}s within {row[tower]['max_abs_difference']:.1e}" for tower in ("image", "text"))
    cosine = min(row[tower]["min_cosine"] for tower in ("image", "text"))
    size = sum(row["files"].values()) / 1e6
    line = f"{row['format']}: {differences}, cosine ≥ {cosine:.5f}, {row['argmax_flips']} of {row['num_images']} answers changed"
    for result in row["zero_shot"] or []:
        own, student = (result[name]["main_metric"] for name in ("metrics", "student_metrics"))
        line += f"; {result['task']} {result['metric']} {own:.2%} (student {student:.2%})"
    return f"{line}; {size:.1f} MB"
