"""Read evaluation data: CLIP_benchmark's webdataset folders, class folders, Hugging Face data sets."""

import io
import re
import warnings
import zipfile
from collections.abc import Iterator
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

OPENED = (*(f".{extension}" for extension in IMAGE_EXTENSIONS), ".bmp", ".tif", ".tiff", ".gif")
"""Suffixes of images in class folders: those of torchvision's ImageFolder, except NOT_OPENED."""

IMAGE_ORDER = ("webp", "png", "jpg", "jpeg")
NOT_OPENED = (".ppm", ".pgm", ".pbm")


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
    for name, lines in (("classnames.txt", classnames), ("zeroshot_classification_templates.txt", templates)):
        if not any(lines):
            raise ValueError(f"{root / name} is empty")
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
            suffix = path.suffix.lower()
            if any(part.startswith(".") for part in path.relative_to(folder).parts):
                continue
            if suffix in NOT_OPENED:
                raise ValueError(f"{path} is of a format that clipkd does not open; convert it, to PNG for example")
            if suffix in OPENED:
                pictures.append(Span(str(path.relative_to(folder)), path))
                labels.append(label)
    if not pictures:
        raise ValueError(
            f"{folder}: no image ({', '.join(OPENED)}) in its {len(classes)} class folders; a folder of several data sets "
            "takes --task with their tasks"
        )
    found = set(labels)
    if empty := [path.name for label, path in enumerate(classes) if label not in found]:
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
    wanted = label if kind in CLASS_KINDS else caption
    for option, column in (("image_column", image), ("label_column" if wanted == label else "caption_column", wanted)):
        if column not in rows.column_names:
            raise ValueError(f"{path} has no column {column!r}, only {rows.column_names}; set {option} in the task")
    feature = rows.features[wanted]
    names = getattr(feature, "names", None)
    rows = rows.select_columns([image, wanted]).cast_column(image, datasets.Image(decode=False))
    rows = rows.rename_columns({image: "image", wanted: "found"}) if (image, wanted) != ("image", "found") else rows
    pictures = [
        Row(f"row {number}", path, rows, number, Path(file) if file else None, size)
        for number, (file, size) in enumerate(lengths(rows))
    ]
    found = list(rows["found"])
    width = len(found[0]) if kind == "multilabel" and found and isinstance(found[0], list) else 0
    for number, value in enumerate(found):
        where = f"{path}, row {number}"
        if kind == "multilabel":
            found[number] = check_vector(value, width, where)
        elif kind != "classification":  # whose numbers are checked with the class names, which the task may give
            found[number] = check_captions(kind, [value] if isinstance(value, str) else value, where)
    return with_labels(EvaluationSet(path, kind, pictures, classnames=names), found)


def lengths(rows: Any) -> Iterator[tuple[str | None, int]]:
    """The path of every image that has no bytes, and its number of bytes, without reading images."""
    import pyarrow.compute

    compute: Any = pyarrow.compute  # its functions are unknown to type checkers
    for batch in rows.with_format("arrow").iter(10_000):
        images = batch["image"].combine_chunks()
        sizes = compute.binary_length(compute.struct_field(images, "bytes")).to_pylist()
        paths = compute.struct_field(images, "path").to_pylist()
        yield from ((path if size is None else None, size or 0) for path, size in zip(paths, sizes, strict=True))
