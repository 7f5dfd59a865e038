"""Read evaluation data: CLIP_benchmark's webdataset folders, class folders, Hugging Face data sets."""

import io
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from clipkd.data.rows import load_rows
from clipkd.data.tables import with_encoded_images
from clipkd.data.tar_index import as_text, index_whole_tar
from clipkd.evaluation.sets import CLASS_KINDS, EvaluationSet, Row, Span, with_labels
from clipkd.evaluation.tasks import Kind, Layout
from clipkd.files import describe_left_out, expand_home, find_files, is_hidden
from clipkd.images import is_image

IMAGE_ORDER = ("webp", "png", "jpg", "jpeg")


def open_evaluation_set(
    root: str | Path,
    *,
    layout: Layout | None = None,
    split: str | None = None,
    configuration: str | None = None,
    kind: Kind | None = None,
    columns: tuple[str, str, str] = ("image", "label", "caption"),
) -> EvaluationSet:
    """Open a data folder in one of the layouts.

    layout: None takes webdataset for a folder with tars in its split, else imagefolder. split: None takes test, or val, or
    the folder itself. kind: None reads the folder's dataset_type.txt. columns: image, label and captions of a Hugging Face set.

    Raises: FileNotFoundError or ValueError naming the file that is missing or wrong.
    """
    if layout == "huggingface":
        return open_hugging_face(str(root), split or "test", configuration, kind or "classification", columns)
    root = Path(expand_home(str(root)))
    if not root.is_dir():
        raise FileNotFoundError(f"no data folder {root}")
    if layout is None:
        layout = "webdataset" if find_shard_folder(root, split) else "imagefolder"
    if layout == "imagefolder":
        if kind not in (None, "classification"):
            raise ValueError(f"{root}: class folders hold a classification task, not {kind}")
        return open_imagefolder(root, split)
    return open_webdataset(root, split, kind or find_kind(root))


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


def find_shard_folder(root: Path, split: str | None) -> Path | None:
    """The folder of the split that holds tars or nshards.txt: test or val by default, or ROOT if it has no folders."""
    own = [] if any(path.is_dir() and not is_hidden(path.name) for path in root.iterdir()) else [root]
    folders = [root / split] if split else [root / "test", root / "val", *own]
    return next((path for path in folders if find_tars(path) or (path / "nshards.txt").is_file()), None)


def find_tars(folder: Path) -> list[Path]:
    """Tars of a folder; those called by numbers in numeric order."""
    tars = {path.stem: path for path in folder.glob("*.tar") if not is_hidden(path.name)}
    return [tars[name] for name in name_order(tars)]


def name_order(names: Iterable[str]) -> list[str]:
    """Sorted as text; as numbers if all of them are."""
    names = sorted(names)
    return sorted(names, key=int) if all(map(str.isdecimal, names)) else names


def find_shards(folder: Path) -> list[Path]:
    """0.tar… as nshards.txt counts them, or without it every tar. Raises: FileNotFoundError or ValueError if one is missing."""
    counts = folder / "nshards.txt"
    if not counts.is_file():
        tars = find_tars(folder)
        numbers = [int(tar.stem) for tar in tars if tar.stem.isdecimal()]
        if gaps := set(range(max(numbers, default=0))) - {*numbers, 0}:
            raise FileNotFoundError(f"no {folder / str(min(gaps))}.tar, though there is a {max(numbers)}.tar")
        return tars
    counted = read_lines(counts)
    if len(counted) != 1 or not counted[0].isdecimal() or not int(counted[0]):
        raise ValueError(f"{counts} must hold one number, the count of shards")
    shards = [folder / f"{number}.tar" for number in range(int(counted[0]))]
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(f"no {missing[0]}, though {counts} counts {len(shards)} shards")
    return shards


def open_webdataset(root: Path, split: str | None, kind: Kind) -> EvaluationSet:
    """SPLIT/nshards.txt, SPLIT/0.tar… with KEY.webp (png, jpg) and KEY.cls, .npy or .txt; class names and templates in ROOT."""
    prompts = read_prompts(root) if kind in CLASS_KINDS else {}
    folder = find_shard_folder(root, split)
    if folder is None:
        raise FileNotFoundError(
            f"no tars in {root / (split or 'test')}; the CLIP_benchmark layout needs them (eval/README.md)"
        )
    shards = find_shards(folder)
    extension = {"classification": "cls", "multilabel": "npy"}.get(kind, "txt")
    samples = [sample for shard in shards for sample in read_shard(shard, extension)]
    found = [parse_member(kind, content, span.name) for span, content in samples]
    return with_labels(EvaluationSet(str(root), kind, [span for span, _ in samples], **prompts), found)


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


def parse_member(kind: Kind, content: bytes, where: str) -> Any:
    if kind == "classification":
        if not re.fullmatch(rb"-?\d{1,9}", content.strip()):
            raise ValueError(f"{where} has the label {content[:20]!r}, not a number")
        return int(content)
    try:
        return np.load(io.BytesIO(content)) if kind == "multilabel" else content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: its captions are not UTF-8 ({error})") from error
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{where}: its .npy cannot be read ({error})") from error


def open_imagefolder(root: Path, split: str | None) -> EvaluationSet:
    """ROOT/SPLIT/CLASS/*.jpg, class index = order of the sorted folder names; ROOT may hold the classes itself."""
    splits = [root / name for name in ((split,) if split else ("val", "test"))]
    folder = next((path for path in splits if path.is_dir()), root)
    if split and folder == root and any((root / name).is_dir() for name in ("train", "val", "test")):
        raise FileNotFoundError(f"no split {splits[0]}")
    if any(root.glob("*.parquet")) or any(root.glob("data/*.parquet")):
        raise ValueError(f"{root} holds parquet files; set layout: huggingface in a task (eval/README.md)")
    names = name_order(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    classes = [folder / name for name in names]
    if not classes:
        raise ValueError(f"{folder} has no class folders; sort the images into one folder per class (synset id)")
    pictures, labels, left_out = [], [], list[tuple[str, str]]()
    for label, class_folder in enumerate(classes):
        images, others = find_files(str(class_folder), is_image)
        pictures += [Span(str(path.relative_to(folder)), path) for path in sorted(map(Path, images))]
        labels += [label] * len(images)
        left_out += others
    if unreadable := [path for path, cause in left_out if cause not in ("hidden", "no image")]:
        raise ValueError(f"{folder}: cannot be read: {describe_left_out(left_out)}; mend or remove {unreadable[0]}")
    if not pictures:
        raise ValueError(
            f"{folder}: no image in its {len(classes)} class folders; a folder of several data sets takes --task with their "
            "tasks"
        )
    if left_out:
        warnings.warn(f"{folder}: left out {describe_left_out(left_out)}", stacklevel=2)
    if empty := [classes[label].name for label in sorted(set(range(len(classes))) - set(labels))]:
        warnings.warn(f"{folder}: {len(empty)} class folders hold no image, such as {empty[0]}", stacklevel=2)
    prompts = read_prompts(root) if (root / "classnames.txt").is_file() else {}
    if prompts and len(prompts["classnames"]) != len(classes):
        count = len(prompts["classnames"])
        raise ValueError(f"{root / 'classnames.txt'} has {count} lines, {folder} {len(classes)} class folders")
    return EvaluationSet(str(root), "classification", pictures, labels, folders=names, **prompts)


def open_hugging_face(
    path: str, split: str, configuration: str | None, kind: Kind, columns: tuple[str, str, str]
) -> EvaluationSet:
    """Rows with an image column and one of labels (a ClassLabel, or 0/1 per class) or of captions."""
    rows, folders = load_rows(path, split, configuration)
    image, label, caption = columns
    wanted, option = (label, "label_column") if kind in CLASS_KINDS else (caption, "caption_column")
    for column, name in ((image, "image_column"), (wanted, option)):
        if column not in rows.column_names:
            raise ValueError(f"{path} has no column {column!r}, only {rows.column_names}; set {name} in the task")
    names = getattr(rows.features[wanted], "names", None)
    rows = with_encoded_images(rows.select_columns([image, wanted]), image, path)
    rows = rows.rename_columns({image: "image", wanted: "found"}) if (image, wanted) != ("image", "found") else rows
    pictures = [Row(f"row {number}", path, rows, number, folders) for number in range(len(rows))]
    found: list[Any] = list(rows["found"])
    if names and (ordered := name_order(names)) != names == sorted(names):  # made from the names of class folders
        places = {number: ordered.index(name) for number, name in enumerate(names)}
        found, names = [places.get(number, number) for number in found], ordered
    if kind not in CLASS_KINDS:
        found = [[value] if isinstance(value, str) else value for value in found]
    return with_labels(EvaluationSet(path, kind, pictures, classnames=names), found)
