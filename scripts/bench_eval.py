"""Images per second of a zero-shot evaluation: `clipkd eval` and a plain loop of open_clip's own functions.

    python scripts/bench_eval.py --output eval/results/eval_speed.jsonl

Both get the same open_clip model with random weights, the same JPEGs (made here), class names, templates, batch size and
loader processes, round by round in one run, so that a busy machine slows both alike. The plain loop is what people write:
torchvision's ImageFolder, open_clip's transform, build_zero_shot_classifier, and accuracy batch by batch. Both are timed
from the loaded model on: clipkd with its hashes, results and per-sample tables (the measurement of its cost left out), then
a second time with the features in its cache. The counts of right images must be equal.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from clipkd import distributed
from clipkd.evaluation.command import EvalConfig, Harness
from clipkd.evaluation.subjects import open_subjects

SIZE = (500, 375)


def write_data(folder: Path, num_images: int, num_classes: int) -> None:
    """Class folders with class names and templates beside them, as clipkd's imagefolder layout reads them."""
    from bench_data import draw_photo  # beside this file

    rng = np.random.default_rng(0)
    for number in range(num_images):
        path = folder / "test" / f"class{number % num_classes:04d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw_photo(SIZE, rng))
    (folder / "classnames.txt").write_text("".join(f"thing number {number}\n" for number in range(num_classes)))
    templates = [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    (folder / "task.yaml").write_text("layout: imagefolder\nname: bench\n")


def write_model(folder: Path, name: str) -> None:
    """An open_clip folder with random weights."""
    torch.manual_seed(0)
    model: Any = open_clip.create_model(name)
    folder.mkdir()
    config = {
        "model_cfg": open_clip.get_model_config(name),
        "preprocess_cfg": open_clip.get_model_preprocess_cfg(model),
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    tensors = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")


@torch.no_grad()
def plain_loop(model_folder: Path, data: Path, options: argparse.Namespace) -> tuple[int, float, float]:
    """Right images, seconds of the classifier, seconds of the images."""
    device = torch.device(options.device)
    made: Any = open_clip.create_model_and_transforms(f"local-dir:{model_folder}", device=device)
    model, _, preprocess = made
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model_folder}")
    names = (data / "classnames.txt").read_text().splitlines()
    started = time.perf_counter()
    classifier = open_clip.build_zero_shot_classifier(
        model, tokenizer, names, open_clip.OPENAI_IMAGENET_TEMPLATES[: options.templates], device=device
    )
    built = time.perf_counter()
    images = ImageFolder(str(data / "test"), preprocess)
    right = 0
    for pixels, labels in DataLoader(images, batch_size=options.batch_size, num_workers=options.workers):
        features = model.encode_image(pixels.to(device), normalize=True)
        right += int(((features @ classifier).argmax(dim=1).cpu() == labels).sum())
    return right, built - started, time.perf_counter() - built


def with_clipkd(model_folder: Path, data: Path, output: Path, options: argparse.Namespace) -> tuple[int, float]:
    """Right images, and seconds of all that the command does once the model is loaded."""
    name = f"local-dir:{model_folder}"
    config = EvalConfig(
        model=name, data=str(data), output=str(output), batch_size=options.batch_size, num_workers=options.workers
    )
    harness = Harness(config)
    harness.costs[name] = None
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        (subject,) = open_subjects((str(data / "task.yaml"),), (str(data),))
        (row,) = harness.evaluate(subject)
    return row["num_correct1"], time.perf_counter() - started


def table(results: Path) -> str:
    """Markdown, one line per model."""
    lines = [
        "| model | open_clip loop, images/s | clipkd, images/s | clipkd is | from its cache |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in map(json.loads, results.read_text(encoding="utf-8").splitlines()):
        rates = [statistics.median(row[key]) for key in ("plain", "clipkd", "cached")]
        lines.append(
            f"| {row['model']} | {rates[0]:.0f} | {rates[1]:.0f} | {row['clipkd_ratio']:.2f} × | {rates[2]:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("eval/results/eval_speed.jsonl"))
    parser.add_argument("--models", nargs="+", default=["ViT-S-32-alt", "ViT-S-16-alt"], help="open_clip names")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--templates", type=int, default=8, help="prompts per class")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="loader processes of each")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.device = str(distributed.join_processes().device or "cpu")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        write_data(data, options.images, options.classes)
        path = data / "zeroshot_classification_templates.txt"
        path.write_text("\n".join(path.read_text().splitlines()[: options.templates]) + "\n")
        for name in options.models:
            folder = Path(temporary) / name.replace("/", "-")
            write_model(folder, name)
            rates: dict[str, list[float]] = {"plain": [], "clipkd": [], "cached": []}
            for number in range(options.rounds):
                right, building, encoding = plain_loop(folder, data, options)
                rates["plain"].append(options.images / (building + encoding))
                output = Path(temporary) / f"{folder.name}-{number}"
                counted, seconds = with_clipkd(folder, data, output, options)
                assert counted == right, f"clipkd counts {counted} right images, the plain loop {right}"
                rates["clipkd"].append(options.images / seconds)
                (output / "eval_results.jsonl").unlink()
                rates["cached"].append(options.images / with_clipkd(folder, data, output, options)[1])
            ratio = statistics.median(a / b for a, b in zip(rates["clipkd"], rates["plain"], strict=True))
            print(f"{name}: " + ", ".join(f"{k} {statistics.median(v):.1f} images/s" for k, v in rates.items()))
            print(f"  clipkd is {ratio:.2f} × the plain loop, classifier of {options.classes} classes included")
            rows.append(
                {
                    "model": name,
                    **{key: [round(value, 2) for value in values] for key, values in rates.items()},
                    "clipkd_ratio": round(ratio, 3),
                    "num_images": options.images,
                    "num_classes": options.classes,
                    "num_templates": options.templates,
                    "batch_size": options.batch_size,
                    "num_workers": options.workers,
                    "device": options.device,
                    "cores": os.cpu_count(),
                    "machine": platform.machine(),
                    "versions": {"torch": torch.__version__, "open_clip_torch": open_clip.__version__},
                }
            )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"→ {options.output}")


if __name__ == "__main__":
    main()
