"""`clipkd predict`: open_clip's probabilities and ranking, without torch from ONNX files; an index; damaged images."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tests.e2e.conftest import Run, refused

LABELS = ("a grinning face", "two dogs", "a red car", "money")
QUERY = "a drawing of a red heart"
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen images of several formats, modes and sizes, some in a folder within the folder."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "inner").mkdir()
    rng = np.random.default_rng(0)
    modes = ("RGB", "L", "RGBA", "P", "CMYK", "LA")
    for number in range(14):
        mode = modes[number % len(modes)]
        ending = {"RGBA": "webp", "CMYK": "jpg", "RGB": "JPG"}.get(mode, "png")
        image = Image.fromarray(rng.integers(0, 255, (7, 5, 4), dtype=np.uint8), "RGBA").resize((40 + 9 * number, 61))
        image.convert(mode).save(folder / ("inner" if number % 3 else "") / f"{number:02d}.{ending}")
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("[0-9]*"))


@torch.inference_mode()
def open_clip_features(model: Path, paths: Sequence[str], texts: Sequence[str]) -> tuple:
    """The model, and unit-norm features, by open_clip alone."""
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{model}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of the transparency of a palette
        images = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in paths])  # type: ignore[operator]
    clip.eval()
    return clip, clip.encode_image(images, normalize=True), clip.encode_text(tokenize(list(texts)), normalize=True)


def rows_of(done: subprocess.CompletedProcess[str]) -> list[dict]:
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("kind", "runtime"), [("softmax", "torch"), ("sigmoid", "onnx")])
def test_probabilities_equal_open_clips(
    clipkd: Run, written: dict[str, Path], pictures: Path, kind: str, runtime: str
) -> None:
    options = ("--labels", *LABELS, "--format", runtime, "--json", "--batch_size", 4, "--template", "a photo of {c}")
    rows = rows_of(clipkd("predict", written[kind], pictures, *options))
    paths = files(pictures)
    assert sorted(row["image"] for row in rows) == paths
    assert len(paths) == 14
    clip, images, texts = open_clip_features(written[kind], paths, [f"a photo of {label}" for label in LABELS])
    logits = clip.logit_scale.exp() * images @ texts.T
    expected = logits.softmax(dim=1) if kind == "softmax" else (logits + clip.logit_bias).sigmoid()
    by_path = {path: dict(zip(LABELS, row.tolist(), strict=True)) for path, row in zip(paths, expected, strict=True)}
    for row in rows:
        found = {each["label"]: each["probability"] for each in row["labels"]}
        assert found == pytest.approx(by_path[row["image"]], abs=5e-4)  # a blended grey level may round otherwise
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert (row["runtime"], row["probabilities"]) == (runtime, kind)


@pytest.mark.parametrize(
    "runtime", ["onnx", "onnx-int8", *(pytest.param(r, marks=SLOW) for r in ("onnx-fp16", "torch"))]
)
def test_a_search_ranks_as_brute_force_does(
    clipkd: Run, written: dict[str, Path], pictures: Path, runtime: str
) -> None:
    arguments = ("predict", written["softmax"], pictures, "--query", QUERY, "--format", runtime, "--top", 14)
    rows = rows_of(clipkd(*arguments, "--json"))
    paths = files(pictures)
    _, images, texts = open_clip_features(written["softmax"], paths, [QUERY])
    expected = dict(zip(paths, (images @ texts[0]).tolist(), strict=True))
    within = {"onnx": 3e-4, "torch": 3e-4, "onnx-fp16": 5e-3, "onnx-int8": 5e-2}[runtime]
    assert {row["image"]: row["cosine"] for row in rows} == pytest.approx(expected, abs=within)
    cosines = [row["cosine"] for row in rows]
    assert cosines == sorted(cosines, reverse=True)
    assert [row["rank"] for row in rows] == list(range(1, 15))
    alone = rows_of(clipkd("predict", written["softmax"], paths[5], *arguments[3:], "--json"))
    assert alone[0]["cosine"] == pytest.approx(
        next(row["cosine"] for row in rows if row["image"] == paths[5]), abs=5e-4 if runtime == "onnx-fp16" else 1e-5
    )  # an image does not depend on its neighbours
    if within == 3e-4:
        assert [row["image"] for row in rows] == sorted(expected, key=lambda path: -expected[path])
    lines = clipkd(*arguments).stdout.splitlines()
    assert lines[0].startswith(runtime)
    assert lines[1:] == [f"{row['cosine']:.4f}  {row['image']}" for row in rows]


def test_text_output_states_the_meaning_of_the_probability(
    clipkd: Run, written: dict[str, Path], pictures: Path
) -> None:
    image = files(pictures)[0]
    for kind, labels, headline in (
        ("softmax", LABELS, "onnx: probability among these 4 labels (softmax)"),
        ("sigmoid", ("money",), "onnx: probability of each label on its own (sigmoid)"),
    ):
        first, line = clipkd("predict", written[kind], image, "--labels", *labels, "--top", 2).stdout.splitlines()
        assert first == headline
        assert line.startswith(image)
        assert line.count("%") == min(2, len(labels))


def test_onnx_files_need_neither_torch_nor_what_imports_it(written: dict[str, Path], pictures: Path) -> None:
    heavy = {"torch", "torchvision", "open_clip", "transformers", "timm", "datasets"}
    code = f"import sys\nfrom clipkd.cli import main\nmain()\nprint(sorted({heavy!r} & sys.modules.keys()))"
    arguments = ["predict", written["softmax"], pictures, "--query", QUERY, "--index", pictures.parent / "light.npz"]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert len(done.stdout.splitlines()) == 7
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_index_avoids_encoding_unchanged_images_again(
    clipkd: Run, written: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    folder, index = tmp_path / "pictures", tmp_path / "kept" / "index.npz"
    shutil.copytree(pictures, folder)

    def search(*options: object, query: str = QUERY, where: Path = folder) -> tuple[list[dict], str]:
        arguments = ("predict", written["softmax"], where, "--query", query, "--top", 99)
        done = clipkd(*arguments, "--json", *options)
        return rows_of(done), done.stderr

    plain, said = search()
    assert said == ""
    assert search("--index", index) == (plain, f"clipkd predict: 14 images: 14 encoded, 0 from {index}\n")
    content = index.read_bytes()
    assert search("--index", index) == (plain, f"clipkd predict: 14 images: 0 encoded, 14 from {index}\n")
    assert search("--index", index, query="two dogs")[0] == search(query="two dogs")[0]
    assert index.read_bytes() == content
    touched, deleted, *_ = files(folder)
    shutil.copyfile(files(pictures)[-1], touched)
    os.unlink(deleted)
    shutil.copyfile(files(pictures)[3], folder / "99.png")
    changed, said = search("--index", index)
    assert "14 images: 2 encoded, 12 from" in said
    # Two images and fourteen are batches of different shapes, so their features agree to rounding only.
    expected = {row["image"]: row["cosine"] for row in search()[0]}
    assert {row["image"]: row["cosine"] for row in changed} == pytest.approx(expected, abs=1e-6)
    assert "0 encoded" in search("--index", index, where=Path(os.path.relpath(folder / "inner")))[1]
    assert "0 encoded, 14 from" in search("--index", index)[1]


def test_an_index_survives_errors_other_models_and_damage(
    clipkd: Run, written: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    good, bad, index = files(pictures)[0], tmp_path / "bad.png", tmp_path / "index.npz"
    bad.write_bytes(b"nothing that Pillow knows")
    options = ("--query", QUERY, "--index", index, "--batch_size", 1)
    assert clipkd("predict", written["softmax"], good, bad, *options, check=False).returncode == 2
    assert "0 encoded, 1 from" in clipkd("predict", written["softmax"], good, *options).stderr
    whole = index.read_bytes()
    for format, content in (("onnx-int8", whole), ("onnx", whole[: len(whole) // 2]), ("onnx", b"my notes")):
        index.write_bytes(content)
        refused = clipkd("predict", written["softmax"], good, *options, "--format", format, check=False)
        assert refused.returncode == 2
        assert f"{index} is " in refused.stderr
        assert "name another --index" in refused.stderr
        assert index.read_bytes() == content


def test_undecodable_images_are_named_and_left_out(
    clipkd: Run, written: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copyfile(files(pictures)[0], folder / "good.jpg")
    (folder / "cut.jpg").write_bytes(Path(files(pictures)[0]).read_bytes()[:900])
    (folder / "empty.png").touch()
    (folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n")
    Image.new("1", (9000, 9000)).save(folder / "vast.png")
    (folder / "gone.png").symlink_to(folder / "nothing")
    bad = {
        "cut.jpg": "truncated",
        "empty.png": "no such format",
        "script.png": "no such format",
        "vast.png": "9000 × 9000",
    }
    bad["gone.png"] = "No such file"
    search = ("predict", written["softmax"])
    done = clipkd(*search, folder, "--query", QUERY, "--json")
    assert [row["image"] for row in rows_of(done)] == [str(folder / "good.jpg")]
    assert len(done.stderr.splitlines()) == len(bad)
    for name, reason in bad.items():
        (line,) = [line for line in done.stderr.splitlines() if name in line]
        assert line.startswith(f"clipkd predict: left out: {folder / name}: ")
        assert reason in line
    named = clipkd(*search, folder / "good.jpg", folder / "cut.jpg", "--query", "x", check=False)
    assert (named.returncode, named.stdout, len(named.stderr.splitlines())) == (2, "", 1)
    assert f"error: {folder / 'cut.jpg'}: " in named.stderr
    (folder / "good.jpg").unlink()
    nothing = clipkd(*search, folder, "--query", QUERY, check=False)
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert nothing.stderr.splitlines()[-1].endswith("none of 5 images can be decoded; the lines above say why")


def test_a_file_name_that_is_not_utf8_is_found(
    clipkd: Run, written: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9 \xff.png")
    shutil.copyfile(files(pictures)[1], name)
    options = ("predict", written["softmax"], tmp_path, "--query", QUERY, "--index", tmp_path / "index.npz")
    assert "caf? ?.png" in clipkd(*options).stdout
    (row,) = rows_of(clipkd(*options, "--json"))
    assert os.fsencode(row["image"]) == name
    assert "0 encoded, 1 from" in clipkd(*options).stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{model}", "{images}", "--labels", "a", "b", "--query", "c"), ("either --labels", "--query")),
        (("{model}", "{images}", "--labels", "a", "b", "a"), ("labels has 'a' more than once",)),
        (("{model}", "{images}", "--labels", "a"), ("labels has only 'a'", "100 %", "--query")),
        (("{model}", "{images}", "--query", "a", "--template", "photo"), ("template is 'photo'", "{c}")),
        (("{model}", "/no/such.jpg", "--query", "a"), ("no image or folder /no/such.jpg",)),
        (("{model}", "{model}/onnx", "--query", "a"), ("onnx holds no images", "no image")),
        (("/no/such/model", "{images}", "--query", "a"), ("/no/such/model", "no such folder")),
        (("{images}", "{images}", "--query", "a"), ("no model that clipkd knows", "open_clip_config.json")),
        (("onnx:{model}", "{images}", "--query", "a", "--format", "torch"), ("names its format", "--format torch")),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("{") else "",
)
def test_wrong_input_is_one_line(
    clipkd: Run, written: dict[str, Path], pictures: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    line = refused(clipkd, "predict", arguments, model=written["softmax"], images=pictures)
    assert all(word in line for word in words), line


def test_a_folder_without_weights_for_torch_or_with_another_tokenizer_says_so(
    clipkd: Run, written: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(written["softmax"] / "onnx", tmp_path / "onnx")
    done = clipkd("predict", tmp_path, pictures, "--query", QUERY, "--format", "torch", check=False)
    assert done.returncode == 2
    assert f"{tmp_path} has no weights for torch, only onnx, onnx-fp16, onnx-int8" in done.stderr
    tokenizer = (written["softmax"] / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(tokenizer.replace('"Lowercase"', '"NFC"'), encoding="utf-8")
    done = clipkd("predict", tmp_path, pictures, "--query", QUERY, check=False)
    assert done.returncode == 2
    assert "it is not the one that the towers were exported with" in done.stderr
