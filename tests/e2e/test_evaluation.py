"""`clipkd eval` against eval/cross_check.py, which shares no code with it: counts, classifiers, a student beside its teacher."""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cross_check
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clipkd.evaluation.results import read_samples
from tests.data.samples import encode, write_tar
from tests.e2e.conftest import SMALL, Run, write_model

Sample = dict[str, bytes]
SETTINGS = [(16, 0, 1), (5, 2, 2)]
"""Batch size, workers, processes."""
NAMES = ["sea lion", "red car", "{c} of a", "sea lion", "", " tall tree ", "50% blue", "Ångström", "cat"]
TEMPLATES = ["a photo of a {c}.", "{c}", "a drawing of {c}, {c}"]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft spots on a colour."""
    rng = np.random.default_rng([seed, width, height])
    spots = rng.integers(0, 90, (height // 9 + 2, width // 9 + 2, 3)) + rng.integers(0, 166, 3)
    return Image.fromarray(spots.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def pictures(number: int) -> list[Sample]:
    return [{"png": encode(noise(40, 37, seed), "PNG")} for seed in range(number)]


def sizes() -> list[Sample]:
    """Sizes and colour spaces, and moving pictures."""
    shapes = [(1, 7), (333, 201), (47, 50), (32, 32), (31, 90)]
    samples = [{"png": encode(noise(*shape, seed), "PNG")} for seed in range(3) for shape in shapes]
    samples += [{"jpg": encode(noise(51, 40, seed).convert("CMYK"), "JPEG")} for seed in range(4)]
    samples += [{"jpeg": encode(noise(33, 47, seed).convert("L"), "JPEG")} for seed in range(4)]
    frames = {"save_all": True, "append_images": [noise(40, 47, 99)], "lossless": True}
    return samples + [{"webp": encode(noise(40, 47, seed), "WEBP", **frames)} for seed in range(4)]


def modes() -> list[Sample]:
    """Palettes, 1 bit, colours below transparent pixels; not 16 bits, which open_clip clips to white."""
    samples: list[Sample] = []
    for seed in range(5):
        picture, other = noise(47, 50, seed), np.asarray(noise(47, 50, seed + 50).convert("L"))
        hole = Image.fromarray(other > 128).convert("L")
        odd = [picture.quantize(6), picture.convert("1"), picture.convert("LA"), picture.convert("RGBA")]
        for image in odd[2:]:
            image.putalpha(hole)
        samples += [{"png": encode(image, "PNG")} for image in odd]
    return samples


def write_data(
    root: Path, shards: Sequence[Sequence[Mapping[str, bytes]]], *, kind: str = "", names: Sequence[str] = ()
) -> Path:
    """CLIP_benchmark's webdataset layout."""
    (root / "test").mkdir(parents=True, exist_ok=True)
    if names:
        (root / "classnames.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    if kind:
        (root / "dataset_type.txt").write_text(f"{kind}\n")
    (root / "test" / "nshards.txt").write_text(f"{len(shards)}\n")
    for number, shard in enumerate(shards):
        files = [(f"s{n:04}.{extension}", part) for n, one in enumerate(shard) for extension, part in one.items()]
        write_tar(root / "test" / f"{number}.tar", files)
    return root


def with_labels(samples: Sequence[Sample], labels: Sequence[int]) -> list[Sample]:
    return [{**sample, "cls": str(label).encode()} for sample, label in zip(samples, labels, strict=True)]


def labelled(samples: list[Sample], classes: int) -> list[Sample]:
    return with_labels(samples, [(7 * place + place // 5) % classes for place in range(len(samples))])


def vector(row: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, row)
    return buffer.getvalue()


def captioned(captions: list[list[str]]) -> list[Sample]:
    images = pictures(len(captions))
    return [{**image, "txt": "\n".join(own).encode()} for image, own in zip(images, captions, strict=True)]


def write_bench(root: Path, *names: str) -> Path:
    """Data folders of these names, or of all, and in tasks/ a YAML of each."""
    odd, targets = labelled(sizes(), 9), np.random.default_rng(0).integers(0, 2, (14, 6))
    objects = [{**sample, "npy": vector(row)} for sample, row in zip(pictures(14), targets, strict=True)]
    texts = [[f"{name} {(3 * place + number) % 11}" for number, name in enumerate(NAMES[:5])] for place in range(13)]
    told = captioned([*texts[:4], [*texts[4], "one more cat"], *texts[5:]])
    pairs = captioned([[f"{n} cats and {n % 7} dogs", f"{n % 7} cats and {n} dogs"] for n in range(19)])
    sets = {
        "sizes": ("", 9, [odd[:17], odd[17:18], odd[18:]]),
        "modes": ("", 6, [labelled(modes(), 6)]),
        "twice": ("", 6, [[one | {"jpg": encode(noise(40, 37, 50), "JPEG")} for one in labelled(pictures(10), 6)]]),
        "few": ("", 3, [labelled(pictures(11), 3)]),
        "objects": ("multilabel", 6, [objects[:5], objects[5:]]),
        "captions": ("retrieval", 0, [told[:12], told[12:]]),
        "pairs": ("", 0, [pairs]),
    }
    (root / "tasks").mkdir(parents=True)
    for name in names or sets:
        kind, classes, shards = sets[name]
        write_data(root / name, shards, kind=kind, names=NAMES[:classes])
        (root / "tasks" / f"{name}.yaml").write_text(f"name: {name}\n" + "kind: pairs\n" * (name == "pairs"))
    return root


def rows_of(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (results / "eval_results.jsonl").read_text().splitlines()]


def count(oracle: Any, data: Path, save: Path | None = None) -> dict[str, Any]:
    return cross_check.measure(oracle, data, "test", "pairs" if data.name == "pairs" else None, "webdataset", save)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def student(clipkd: Run, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    clipkd("train", *SMALL, "--data.path", data / "pairs", "--steps", 60, "--output", folder / "run")
    return write_model(folder)


@pytest.fixture(scope="module")
def oracle(student: Path) -> Any:
    return cross_check.Model(f"local-dir:{student}", None)


@pytest.fixture(scope="module")
def runs(clipkd: Run, bench: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Results of all tasks in every setting."""
    folders = [tmp_path_factory.mktemp("runs") / "results" for _ in SETTINGS]
    for folder, (batch_size, workers, processes) in zip(folders, SETTINGS, strict=True):
        options = ("--batch_size", batch_size, "--num_workers", workers, "--output", folder)
        clipkd("eval", "--model", student, "--task", bench / "tasks", "--data", bench, *options, processes=processes)
    return folders


def test_the_oracle_shares_no_code() -> None:
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", Path(cross_check.__file__).read_text(), re.MULTILINE))
    assert {"open_clip", "torch", "PIL"} <= imported
    assert "clipkd" not in imported


@pytest.mark.parametrize("name", ["sizes", "modes", "twice", "few", "objects", "captions", "pairs"])
def test_counts_and_classifiers_are_those_of_open_clip_in_every_setting(
    runs: list[Path], bench: Path, oracle: Any, name: str, tmp_path: Path
) -> None:
    counts = count(oracle, bench / name, tmp_path / "classifier")
    assert sum(counts.values()) > counts["n"]
    for results in runs:
        (row,) = [row for row in rows_of(results) if row["key"] == name]
        assert cross_check.first_difference(counts, row) is None
        assert row["precision"] == "fp32"
        assert row["metrics"]["main_metric"] == row["metrics"][row["main_metric_name"]]
        if "num_correct1" in counts:
            assert row["metrics"]["acc1"] == counts["num_correct1"] / counts["n"]
            assert row["metrics"]["acc5"] == (None if name == "few" else counts["num_correct5"] / counts["n"])
        if "num_captions" in counts:
            assert row["metrics"]["image_retrieval_recall@5"] == counts["num_images_found@5"] / counts["num_captions"]
            assert row["metrics"]["text_retrieval_recall@5"] == counts["num_texts_found@5"] / counts["n"]
        if "num_classes" in row:
            expected = load_file(tmp_path / "classifier")["classifier"]
            cached = [load_file(path)["features"] for path in (results / "cache").glob("classifier-*")]
            assert min((found - expected).abs().max() for found in cached if found.shape == expected.shape) < 1e-6
    if name in ("sizes", "modes", "twice"):
        samples = cross_check.read_samples(bench / name / "test", "classification")
        expected = torch.stack([oracle.image(image) for image, _ in samples]).float()
        cached = [load_file(path)["features"] for path in (runs[0] / "cache").glob("images-*")]
        (found,) = [features for features in cached if features.shape == expected.shape]
        assert [place for place, gap in enumerate((found - expected).abs().amax(dim=1)) if gap > 1e-5] == []


def guesses(model: Any, data: Path) -> tuple[list[int], torch.Tensor]:
    """By open_clip alone: the best class of each image, and the log-probabilities."""
    classifier = model.classifier(cross_check.read_lines(data / "classnames.txt"), TEMPLATES).double()
    images = torch.stack([model.image(image) for image, _ in cross_check.read_samples(data / "test", "classification")])
    best = [cross_check.ranked(classifier, image)[0] for image in images]
    return best, (model.clip.logit_scale.exp().double() * images @ classifier.T).log_softmax(dim=1)


def calibration_error(confidence: list[float], correct: list[bool]) -> float:
    bins: dict[int, list[float]] = {}
    for sure, right in zip(confidence, correct, strict=True):
        bins.setdefault(math.ceil(15 * sure), []).append(right - sure)
    return sum(abs(sum(gaps)) for gaps in bins.values()) / len(correct)


def test_a_student_beside_its_teacher_and_compare(
    clipkd: Run, bench: Path, student: Path, teacher: Path, oracle: Any, runs: list[Path], tmp_path: Path
) -> None:
    data, results = bench / "sizes", tmp_path / "results"
    arguments = ("--teacher", student, "--data", data, "--output", results, "--num_workers", 0)
    clipkd("eval", "--model", teacher, f"local-dir:{student}", *arguments)
    good, bad, same = rows_of(results)
    assert [row["model"] for row in (good, bad, same)] == [str(student), str(teacher), f"local-dir:{student}"]
    assert "teacher" not in good
    assert [same["teacher"][name] for name in ("kl", "agreement", "lost_classes")] == [0, 1, []]
    tables = [read_samples(results / row["samples"]) for row in (good, bad)]
    labels, n = tables[0]["label"], len(tables[0]["label"])
    other = cross_check.Model(f"local-dir:{teacher}", None)
    (first, p), (second, q) = (guesses(model, data) for model in (oracle, other))
    assert [[five[0] for five in table["top5"]] for table in tables] == [first, second]
    right = [[guess == label for guess, label in zip(side, labels, strict=True)] for side in (first, second)]
    found, hits = bad["teacher"], [sum(side) for side in right]
    assert found["agreement"] == sum(a == b for a, b in zip(first, second, strict=True)) / n
    assert found["retained"] == (pytest.approx(hits[1] / hits[0]) if hits[0] else None)
    assert found["paired"]["won"] - found["paired"]["lost"] == hits[1] - hits[0]
    assert found["kl"] == pytest.approx((p.exp() * (p - q)).sum().item() / n, rel=1e-3)
    assert found["kl"] > 0
    for row, correct, logs in ((good, right[0], p), (bad, right[1], q)):
        expected = calibration_error(logs.exp().amax(dim=1).tolist(), correct)
        assert row["calibration"]["ece"] == pytest.approx(expected, rel=1e-4)

    lines = clipkd("eval", "compare", *runs, "--max_drop", 0).stdout.splitlines()
    assert {line.partition(":")[0] for line in lines} == {row["key"] for row in rows_of(runs[0])}
    assert all("+0.00 points" in line for line in lines)
    words = ("--second_model", teacher, "--max_drop", 100)
    failed = clipkd("eval", "compare", runs[0], results, *words, check=False)
    assert (failed.returncode, f"few was evaluated in {runs[0]} alone" in failed.stderr) == (1, True)
