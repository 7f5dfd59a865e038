"""A trained student → one folder that other people's software loads, with the proof that it gives the same answers."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from clipkd import checkpoint, metrics_log, models
from clipkd.data import Images
from clipkd.evaluation.tasks import Subject, as_tuple, open_subjects
from clipkd.export import hub
from clipkd.export.artefacts import FORMATS, FROM_ONNX, check_formats, remove_format, weight_files, write_formats
from clipkd.export.card import Source, write_card
from clipkd.export.open_clip import write_open_clip
from clipkd.export.parity import Job, prove
from clipkd.export.probes import NUM_IMAGES, cut_drawings, drawing_names, write_example, write_probes
from clipkd.models import Encoder
from clipkd.progress import console
from clipkd.requirements import require


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
    """Task YAMLs such as eval/imagenet.yaml that every artefact is evaluated on; needs `data`."""
    data: tuple[str, ...] | str = ()
    """Data of these tasks, as in `clipkd eval`; without `verify`, folders in CLIP_benchmark's layout to evaluate on."""
    license: str | None = None
    """Licence of the weights for the model card, such as apache-2.0; null says that none was stated."""
    force: bool = False
    """Replace an earlier export in `output`."""
    push_to_hub: str | None = None
    """Repository USER/NAME on the Hugging Face hub to upload the finished folder to."""
    private: bool = True
    """Whether a repository made for `push_to_hub` is private."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in FORMATS]
        require(not unknown, f"to has {', '.join(map(repr, unknown))}; choose from {', '.join(FORMATS)}")
        require(bool(self.formats), f"to is empty; choose from {', '.join(FORMATS)}")
        require(not self.tasks or bool(as_tuple(self.data)), "verify needs data: the folder of the task's data")

    @property
    def formats(self) -> tuple[str, ...]:
        """Each once, in the order of FORMATS."""
        named = {name.strip() for each in as_tuple(self.to) for name in each.split(",")} - {""}
        return tuple(sorted(named, key=lambda name: (*FORMATS, name).index(name)))

    @property
    def tasks(self) -> tuple[str, ...]:
        return as_tuple(self.verify)


def export(config: ExportConfig) -> list[dict[str, Any]]:
    """config.checkpoint → config.output, whole or not at all; returns the rows of its parity.json.

    Projections and scales that only training needs are left out. Every artefact is loaded by its own software before the
    folder gets its name; one that is not proven equal is left out of it, and its row's `error` says why.

    Raises: ValueError if the output exists, the student does not fit a format, or a format's software is missing;
        RuntimeError if no artefact is proven.
    """
    require(int(os.environ.get("WORLD_SIZE", "1")) == 1, "export runs on one process; start it without a launcher")
    output = Path(config.output)
    check_output(output, force=config.force)
    encoder, source = open_student(config)
    check_formats(encoder, config.formats)
    subjects = open_subjects(config.tasks, as_tuple(config.data)) if config.data else []
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_formats(encoder, temporary, config.formats, say)
        write_example(temporary / "example.png")
        rows = verify(config, encoder, temporary, subjects)
        for row in rows:
            files = weight_files(temporary, row["format"])
            row["files"] = {tower: path.stat().st_size for tower, path in files.items() if path.is_file()}
        for format in {*FROM_ONNX, *config.formats} - {row["format"] for row in rows if not row["error"]}:
            remove_format(temporary, format)
        metrics_log.write(temporary / "parity.json", about_parity(encoder, source, rows))
        write_card(temporary, encoder, source, rows, name=output.resolve().name, license=config.license)
        make_readable(temporary)
        replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if config.push_to_hub:
        hub.upload(output, config.push_to_hub, private=config.private)
    return rows


def check_output(output: Path, *, force: bool) -> None:
    if not output.exists():
        return
    if not force:
        raise ValueError(f"{output} exists already; remove it, choose another --output, or replace it with --force")
    ours = ("parity.json", "open_clip_config.json")
    if not output.is_dir() or not (any((output / name).is_file() for name in ours) or not any(output.iterdir())):
        raise ValueError(f"{output} is no earlier export, so --force leaves it alone; remove it yourself")


def open_student(config: ExportConfig) -> tuple[Encoder, Source]:
    """The student, and what is known of how it was made."""
    path = Path(config.checkpoint.removeprefix("local-dir:"))
    if not path.is_dir():
        raise ValueError(f"no checkpoint {config.checkpoint}; name a run folder, a checkpoint or a model folder")
    if not checkpoint.is_run(path):
        return models.load(config.checkpoint, ema=config.weights == "ema"), Source(config.checkpoint, "weights")
    folder = checkpoint.resolve(path)
    encoder = models.load(str(folder), ema=config.weights == "ema")
    state = checkpoint.read_state(folder)
    digest = encoder.weights_sha256()
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    teachers = state["identity"].get("teachers") or {}
    return encoder, Source(
        str(folder),
        config.weights,
        config=state["config"],
        step=state["step"],
        teachers=tuple(each["sha256"] for each in teachers.values()),
        results=tuple(row for row in metrics_log.read(run / "results.jsonl") if row.get("weights_sha256") == digest),
    )


def verify(config: ExportConfig, encoder: Encoder, folder: Path, subjects: list[Subject]) -> list[dict[str, Any]]:
    """The rows of parity.json. Raises: RuntimeError if no artefact is proven."""
    say("verifying " + ", ".join(config.formats))
    with tempfile.TemporaryDirectory(prefix="clipkd-export-") as name:
        work = Path(name)
        probes = write_probes(encoder, work / "probes", *(task_samples(subjects[0]) if subjects else drawings()))
        (work / "student").mkdir()
        write_open_clip(encoder, work / "student")
        job = Job(
            folder=str(folder.resolve()),
            probes=str(probes.folder),
            rows=str(work / "rows.jsonl"),
            student=str(work / "student"),
            tasks=config.tasks,
            data=as_tuple(config.data),
            results=str(work / "results"),
        )
        rows = prove(job, list(config.formats))
    if all(row["error"] for row in rows):
        raise RuntimeError(
            "no artefact could be proven: " + "; ".join(f"{row['format']}: {row['error']}" for row in rows)
        )
    return rows


def drawings() -> tuple[list[Image.Image], list[str]]:
    return cut_drawings(), drawing_names()


def task_samples(subject: Subject) -> tuple[list[Image.Image], list[str]]:
    """The first images of a task, with its class names or captions."""
    pictures = Images(subject.data.pictures[:NUM_IMAGES], preprocess=lambda image: image)
    images = [pictures[number][0] for number in range(len(pictures))]
    texts = subject.data.classnames or [text for captions in subject.data.captions[:NUM_IMAGES] for text in captions]
    return images, list(texts[: 4 * NUM_IMAGES])


def about_parity(encoder: Encoder, source: Source, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """parity.json."""
    packages = ("clipkd", "torch", "open_clip_torch")
    return {
        "source": {"checkpoint": source.checkpoint, "weights": source.weights, "step": source.step},
        "source_sha256": encoder.weights_sha256(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "artefacts": [{key: value for key, value in row.items() if key != "snippet_output"} for row in rows],
    }


def make_readable(folder: Path) -> None:
    """safetensors and others make files that only their owner can read."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def replace(temporary: Path, output: Path) -> None:
    """The finished folder gets its name; an earlier export goes only then."""
    before = output.with_name(output.name + ".before.tmp")
    shutil.rmtree(before, ignore_errors=True)
    if output.exists():
        os.replace(output, before)
    os.replace(temporary, output)
    shutil.rmtree(before, ignore_errors=True)


def describe_artefact(row: dict[str, Any]) -> str:
    """A row of parity.json in a line."""
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


def say(message: str) -> None:
    console.print(f"export: {message}")
