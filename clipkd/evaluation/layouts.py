"""Read evaluation data: CLIP_benchmark's webdataset folders, class folders, Hugging Face data sets."""

import io
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from clipkd.data.sources import IMAGE_EXTENSIONS
from clipkd.data.tables import load_rows
from clipkd.data.tar_index import as_text, index_whole_tar
from clipkd.evaluation.sets import (
    CLASS_KINDS,
    EvaluationSet,
    Row,
    Span,
    check_captions,
    check_label,
    check_vector,
    with_labels,
)
from clipkd.evaluation.tasks import Kind, Layout

SUFFIXES = (*(f".{name}" for name in (*IMAGE_EXTENSIONS, "bmp", "tif", "tiff", "gif", "ppm", "pgm", "pbm")),)
"""Suffixes of images in class folders, as for torchvision's ImageFolder; a format that clipkd does not open is an error."""

IMAGE_ORDER = ("webp", "png", "jpg", "jpeg")


def open_evaluation_set(
    root: str | Path,
    *,
    layout: Layout | None = None,
    split: str | None = None,
    kind: Kind | None = None,
    columns: tuple[str, str, str] = ("image", "label", "caption"),
) -> EvaluationSet:
    """Open a data folder in one of the layouts.

    layout: None takes webdataset for a folder with tars in its split, else imagefolder. split: None takes test, or val of
    class folders. kind: None reads the folder's dataset_type.txt. columns: image, label and captions of a Hugging Face set.

    Raises: FileNotFoundError or ValueError naming the file that is missing or wrong.
    """
    if layout == "huggingface":
        return open_hugging_face(str(root), split or "test", kind or "classification", columns)
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no data folder {root}")
    if layout is None:
        inside = root / (split or "test")
        layout = "webdataset" if any(inside.glob("*.tar")) or (inside / "nshards.txt").is_file() else "imagefolder"
    if layout == "imagefolder":
        if kind not in (None, "classification"):
            raise ValueError(f"{root}: class folders hold a classification task, not {kind}")
        return open_imagefolder(root, split)
    return open_webdataset(root, split or "test", kind or find_kind(root))


def find_kind(root: Path) -> Kind:
    path = root / "dataset_type.txt"
    kind = path.read_text(encoding="utf-8", errors="replace").strip().lower() if path.is_file() else "classification"
    if kind not in ("retrieval", "multilabel", "classification"):
        raise ValueError(f"{path} says {kind[:50]!r}; known are retrieval and multilabel")
    return kind  # type: ignore[return-value]


def read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; the CLIP_benchmark layout needs it (eval/README.md)")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def read_prompts(root: Path) -> dict[str, Any]:
    """Class names, one of which may be blank (vtab/clevr_closest_object_distance has one), and templates."""
    classnames = read_lines(root / "classnames.txt")
    templates = read_lines(root / "zeroshot_classification_templates.txt")
    if not any(classnames):
        raise ValueError(f"{root / 'classnames.txt'} is empty")
    if wrong := [number for number, line in enumerate(templates, start=1) if "{c}" not in line]:
        path = root / "zeroshot_classification_templates.txt"
        raise ValueError(f"{path}: line {wrong[0]} has no {{c}}, where the class name goes")
    return {"classnames": classnames, "templates": templates}


def open_webdataset(root: Path, split: str, kind: Kind) -> EvaluationSet:
    """SPLIT/nshards.txt, SPLIT/0.tar… with KEY.webp (png, jpg) and KEY.cls, .npy or .txt; class names and templates in ROOT."""
    prompts = read_prompts(root) if kind in CLASS_KINDS else {}
    counted = read_lines(root / split / "nshards.txt")
    if len(counted) != 1 or not counted[0].isdecimal() or not int(counted[0]):
        raise ValueError(f"{root / split / 'nshards.txt'} must hold one number, the count of shards")
    shards = [root / split / f"{number}.tar" for number in range(int(counted[0]))]
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(f"no {missing[0]}, though {root / split / 'nshards.txt'} counts {len(shards)} shards")
    extension = {"classification": "cls", "multilabel": "npy"}.get(kind, "txt")
    num_classes = len(prompts.get("classnames", ()))
    samples = [(shard, *sample) for shard in shards for sample in read_shard(shard, extension)]
    found = [
        parse_member(kind, content, num_classes, f"{shard}: sample {span.key.split('/', 1)[1]}")
        for shard, span, content in samples
    ]
    return with_labels(EvaluationSet(str(root), kind, [span for _, span, _ in samples], **prompts), found)


def read_shard(shard: Path, extension: str) -> list[tuple[Span, bytes]]:
    """The image of every sample, and the content of its member with that extension."""
    index = index_whole_tar(shard)
    keys = [as_text(key) for key in index.keys]
    image_offset, image_size = index.select(IMAGE_ORDER[:1])
    for other in IMAGE_ORDER[1:]:  # of a sample with several, the one that CLIP_benchmark takes
        places, sizes = index.select((other,))
        image_offset = np.where(image_size < 0, places, image_offset)
        image_size = np.where(image_size < 0, sizes, image_size)
    offset, size = index.select((extension,))
    if (bad := np.flatnonzero((image_size < 0) | (size < 0))).size:
        raise ValueError(f"{shard}: sample {keys[bad[0]]} has no image or no .{extension} ({bad.size} such)")
    samples = []
    with shard.open("rb") as file:
        for row, key in enumerate(keys):
            file.seek(int(offset[row]))
            span = Span(f"{shard.stem}/{key}", shard, int(image_offset[row]), int(image_size[row]))
            samples.append((span, file.read(int(size[row]))))
    return samples


def parse_member(kind: Kind, content: bytes, num_classes: int, where: str) -> Any:
    if kind == "classification":
        if not re.fullmatch(rb"-?\d{1,9}", content.strip()):
            raise ValueError(f"{where} has the label {content[:20]!r}, not a number")
        return check_label(int(content), num_classes, where)
    if kind == "multilabel":
        try:
            vector = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{where}: its .npy cannot be read ({error})") from error
        return check_vector(vector, num_classes, where)
    try:
        return check_captions(kind, content.decode("utf-8").splitlines(), where)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: its captions are not UTF-8 ({error})") from error


def open_imagefolder(root: Path, split: str | None) -> EvaluationSet:
    """ROOT/SPLIT/CLASS/*.jpg, class index = order of the sorted folder names; ROOT may hold the classes itself."""
    splits = [root / name for name in ((split,) if split else ("val", "test"))]
    folder = next((path for path in splits if path.is_dir()), root)
    if split and folder == root and any((root / name).is_dir() for name in ("train", "val", "test")):
        raise FileNotFoundError(f"no split {splits[0]}")
    if any(root.glob("*.parquet")) or any(root.glob("data/*.parquet")):
        raise ValueError(f"{root} holds parquet files; set layout: huggingface in a task (eval/README.md)")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder} has no class folders; sort the images into one folder per class (synset id)")
    pictures, labels = [], []
    for label, class_folder in enumerate(classes):
        for path in sorted(class_folder.rglob("*")):
            key = path.relative_to(folder)
            if path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in key.parts):
                pictures.append(Span(str(key), path))
                labels.append(label)
    if not pictures:
        raise ValueError(
            f"{folder}: no image ({', '.join(SUFFIXES)}) in its {len(classes)} class folders; a folder of several data sets "
            "takes --task with their tasks"
        )
    if empty := [classes[label].name for label in sorted(set(range(len(classes))) - set(labels))]:
        warnings.warn(f"{folder}: {len(empty)} class folders hold no image, such as {empty[0]}", stacklevel=2)
    prompts = read_prompts(root) if (root / "classnames.txt").is_file() else {}
    if prompts and len(prompts["classnames"]) != len(classes):
        count = len(prompts["classnames"])
        raise ValueError(f"{root / 'classnames.txt'} has {count} lines, {folder} {len(classes)} class folders")
    names = [path.name for path in classes]
    return EvaluationSet(str(root), "classification", pictures, labels, folders=names, **prompts)


def open_hugging_face(path: str, split: str, kind: Kind, columns: tuple[str, str, str]) -> EvaluationSet:
    """Rows with an image column and one of labels (a ClassLabel, or 0/1 per class) or of captions."""
    import datasets

    rows = load_rows(path, split)
    image, label, caption = columns
    wanted, option = (label, "label_column") if kind in CLASS_KINDS else (caption, "caption_column")
    for column, name in ((image, "image_column"), (wanted, option)):
        if column not in rows.column_names:
            raise ValueError(f"{path} has no column {column!r}, only {rows.column_names}; set {name} in the task")
    names = getattr(rows.features[wanted], "names", None)
    rows = rows.select_columns([image, wanted]).cast_column(image, datasets.Image(decode=False))
    rows = rows.rename_columns({image: "image", wanted: "found"}) if (image, wanted) != ("image", "found") else rows
    pictures = [Row(f"row {number}", path, rows, number) for number in range(len(rows))]
    found = list(rows["found"])
    if kind == "multilabel":
        width = np.size(found[0]) if found else 0
        found = [check_vector(value, width, f"{path}, row {number}") for number, value in enumerate(found)]
    elif kind != "classification":  # whose numbers are checked with the class names, which the task may give
        texts = ([value] if isinstance(value, str) else value for value in found)
        found = [check_captions(kind, value, f"{path}, row {number}") for number, value in enumerate(texts)]
    return with_labels(EvaluationSet(path, kind, pictures, classnames=names), found)
