"""Load anything, run zero-shot tasks, write results in the schema others read."""

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from clipkd import distributed, metrics_log, models, progress, zeroshot
from clipkd.arguments import parse_into
from clipkd.data import ZeroShotSet, open_zeroshot_set
from clipkd.models import Encoder

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str | None = None
    """Name in the results; null takes the data folder's."""
    layout: Literal["webdataset", "imagefolder"] = "webdataset"
    """webdataset: CLIP_benchmark's layout; imagefolder: SPLIT/CLASS/*.jpg."""
    split: str = "test"
    """Folder of the split below the data folder."""
    prompts: Literal["data", "imagenet"] = "data"
    """Class names and templates: from the data folder, or OpenAI's for ImageNet (1,000 names, 80 templates)."""
    num_images: int | None = None
    """Images the split must have; null does not check."""


def load_task(path: str | None) -> Task:
    """A task YAML (see eval/); None is CLIP_benchmark's webdataset layout. Exits with one line if the file is wrong."""
    return parse_into(Task, [] if path is None else ["--config", path], "eval --task", "A zero-shot task.")


def open_task(task: Task, root: str | Path, preprocess: Callable[[Any], Tensor]) -> ZeroShotSet:
    """The task's images with class names and templates filled in.

    Raises: FileNotFoundError or ValueError naming what is missing, surplus or of another size than the task says.
    """
    images = open_zeroshot_set(task.layout, root, task.split, preprocess)
    if task.prompts == "imagenet":
        images.classnames, images.templates = models.imagenet_prompts()
        if images.num_classes != len(images.classnames):
            raise ValueError(
                f"{root} has {images.num_classes} classes; ImageNet has {len(images.classnames)} (synset ids)"
            )
    if images.classnames is None or images.templates is None:
        raise ValueError(f"{root}: the imagefolder layout names no classes; set prompts: imagenet in the task")
    if task.num_images not in (None, len(images)):
        raise ValueError(f"{root} has {len(images)} images in split {task.split!r}; the task expects {task.num_images}")
    return images


@torch.inference_mode()
def rank_images(
    encoder: Encoder,
    images: ZeroShotSet,
    *,
    device: torch.device,
    title: str = "evaluate",
    batch_size: int = 256,
    num_workers: int = 2,
    precision: Precision = "fp32",
) -> Int[Tensor, "n r"]:
    """The five best classes of every image, on every process: each encodes its share, every image exactly once."""
    assert images.classnames is not None
    assert images.templates is not None
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def encode_texts(texts: list[str]) -> Tensor:
        return encoder.encode_text(encoder.spec.tokenize(texts).to(device))

    share = range(distributed.rank(), len(images), distributed.world_size())
    loader = DataLoader(Subset(images, share), batch_size=batch_size, num_workers=num_workers)
    ranked: dict[int, list[int]] = {}
    with torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32"):
        classifier = zeroshot.build_classifier(encode_texts, images.classnames, images.templates)
        for pixels, _, positions in progress.track(loader, title, len(loader), visible=distributed.rank() == 0):
            features = encoder.encode_image(pixels.to(device))
            with torch.autocast(device.type, enabled=False):
                best = zeroshot.rank_classes(features, classifier)
            ranked.update(zip(positions.tolist(), best.tolist(), strict=True))
    merged = {position: row for part in distributed.gather_objects(ranked) for position, row in part.items()}
    assert len(merged) == len(images), f"{len(merged)} of {len(images)} images were evaluated"
    return torch.tensor([merged[position] for position in range(len(images))])


def evaluate(
    encoder: Encoder,
    task: Task,
    root: str | Path,
    *,
    device: torch.device,
    batch_size: int = 256,
    num_workers: int = 2,
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """One result row of a model on a task: its own preprocessing, CLIP's prompt ensemble, cosines in float32.

    `encoder` must be on `device`. Call on every process.
    """
    start = time.perf_counter()
    images = open_task(task, root, encoder.preprocess)
    name = task.name or Path(root).resolve().name
    ranked = rank_images(
        encoder,
        images,
        device=device,
        title=f"evaluate {name}",
        batch_size=batch_size,
        num_workers=num_workers,
        precision=precision,
    )
    score = zeroshot.score(ranked, torch.tensor(images.labels))
    assert images.classnames is not None
    row = result_row(name, encoder.name, score, len(images.classnames), precision, time.perf_counter() - start)
    return {**row, "weights_sha256": encoder.weights_sha256()}


def result_row(
    name: str, model: str, score: zeroshot.ZeroShotScore, num_classes: int, precision: str, seconds: float
) -> dict[str, Any]:
    """The fields of DataComp's eval_results.jsonl and of CLIP_benchmark's JSON, and what one needs to check them."""
    counts = asdict(score)
    metrics = {key: counts.pop(key) for key in ("acc1", "acc5", "mean_per_class_recall")}
    return {
        "key": name,
        "dataset": name,
        "model": model,
        "task": "zeroshot_classification",
        "metrics": {**metrics, "main_metric": metrics["acc1"]},
        "n": counts.pop("num_images"),
        **counts,
        "num_classes": num_classes,
        "language": "en",
        "precision": precision,
        "seconds": round(seconds, 2),
        "versions": {
            package: importlib.metadata.version(package) for package in ("clipkd", "torch", "open_clip_torch")
        },
    }


def describe_result(row: dict[str, Any]) -> str:
    """A result row in a line, in percent."""
    metrics = row["metrics"]
    return (
        f"{row['key']}: top-1 {metrics['acc1']:.2%}, top-5 {metrics['acc5']:.2%}, mean per class "
        f"{metrics['mean_per_class_recall']:.2%}, n {row['n']}"
    )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    model: str
    """An open_clip name, local-dir:FOLDER, hf-hub:REPO, a transformers CLIPModel folder, a run or checkpoint folder."""
    data: str
    """Folder of the labelled images, in the task's layout."""
    pretrained: str | None = None
    """Weights of an open_clip name: a tag or a file."""
    task: str | None = None
    """Task YAML, such as eval/imagenet.yaml; null reads CLIP_benchmark's webdataset layout (eval/webdataset.yaml)."""
    output: str = "results.jsonl"
    """File that the result line is added to."""
    weights: Literal["student", "ema"] = "student"
    """Which weights of a training checkpoint: the student's or their moving average."""
    batch_size: int = 256
    """Images per forward pass and process."""
    num_workers: int = 2
    """Loader processes per process; 0 loads in the main process."""
    precision: Precision = "fp32"
    """Autocast of the towers; the published protocol is fp32."""


def run(config: EvalConfig) -> dict[str, Any]:
    """`clipkd eval`: load, evaluate on every process, add one line to config.output, return it."""
    task = load_task(config.task)
    encoder = models.load(config.model, pretrained=config.pretrained, ema=config.weights == "ema")
    open_task(task, config.data, encoder.preprocess)
    state = distributed.join_processes()
    device = torch.device(state.device or "cpu")
    row = evaluate(
        encoder.to(device),
        task,
        config.data,
        device=device,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        precision=config.precision,
    )
    row |= {"model": config.model, "pretrained": config.pretrained, "weights": config.weights}
    if state.is_main_process:
        metrics_log.append(Path(config.output), row)
    return row
