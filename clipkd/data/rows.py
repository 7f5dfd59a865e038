"""Rows of Hugging Face data sets. What a local path means is decided here: files are listed and passed by name.

`datasets` would take a local path for a pattern (`data[1]` opens `data1`), and words in file names for splits.
"""

import glob
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from clipkd.errors import short
from clipkd.files import expand_home, find_files
from clipkd.images import suffixes

BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
}
"""Ending of a table → the builder of datasets that reads it; of several kinds in a folder the first is taken."""

SPLITS = (("train", "training"), ("val", "valid", "validation", "dev"), ("test", "testing", "eval", "evaluation"))
"""Names of folders, and of files up to a number, that stand for a split; those of a group are one split."""


class Rows(NamedTuple):
    """A map-style data set, and where its tables lie."""

    rows: Any
    folders: list[tuple[int, Path]]
    """Number behind the last row of each table, and the folder that its paths are relative to; empty if unknown."""


def load_rows(path: str, split: str, configuration: str | None = None) -> Rows:
    """A split of a save_to_disk folder, a table, a folder of tables or image files, or a hub data set.

    Raises: FileNotFoundError or ValueError that names the data set.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    place = Path(expand_home(path))
    try:
        if not place.exists():
            require_hub_name(path)
            return Rows(datasets.load_dataset(path, configuration, split=split), [])
        if any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
            stored = datasets.load_from_disk(str(place))
            rows = stored[split] if isinstance(stored, datasets.DatasetDict) else stored
            return Rows(rows, [(len(rows), place)])
        return load_files(place, split, configuration)
    except (KeyError, ValueError, IndexError, OSError, DatasetsError) as error:
        if isinstance(error, FileNotFoundError) and str(error).startswith("no file or folder"):
            raise
        hint = "; set data.configuration" * ("Config name is missing" in str(error))
        reason = short(error)
        raise ValueError(f"cannot open the Hugging Face data set {path!r}, split {split!r}: {reason}{hint}") from error


def require_hub_name(path: str) -> None:
    """Raises: FileNotFoundError if a missing path cannot be the name of a data set on the hub."""
    first, slash, _ = path.partition("/")
    is_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) and Path(path).suffix not in BUILDERS
    if not is_name or (slash and Path(first).is_dir()):
        raise FileNotFoundError(f"no file or folder {path}")


def load_files(place: Path, split: str, configuration: str | None) -> Rows:
    """The tables or images of a local file or folder. Raises: ValueError that lists what there is."""
    import datasets

    wanted = dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+"))
    builder, files = list_files(place, list(wanted), configuration)
    escaped = {name: [glob.escape(str(file.absolute())) for file in found] for name, found in files.items()}
    if chained := [path for found in escaped.values() for path in found if "::" in path]:
        raise ValueError(
            f"datasets takes the '::' of {chained[0]} for a chain of files; rename it, or name a link to it"
        )
    rows = datasets.load_dataset(builder, data_files=escaped, split=split)
    return Rows(rows, table_folders(builder, [file for found in files.values() for file in found], len(rows)))


def table_folders(builder: str, files: list[Path], num_rows: int) -> list[tuple[int, Path]]:
    from pyarrow import parquet

    if len({file.parent for file in files}) == 1:
        return [(num_rows, files[0].parent)]
    if builder != "parquet":
        return []
    folders, end = [], 0
    for file in files:
        end += parquet.read_metadata(file).num_rows
        folders.append((end, file.parent))
    return folders if end == num_rows else []  # of a part of a split, such as train[:10%]


def list_files(place: Path, wanted: list[str], configuration: str | None) -> tuple[str, dict[str, list[Path]]]:
    """The builder, and the files of each wanted split; says which tables are left out."""
    if place.is_file():
        if place.suffix.lower() not in BUILDERS:
            raise ValueError(f"it is no table ({', '.join(BUILDERS)})")
        return BUILDERS[place.suffix.lower()], {wanted[0]: [place]}
    declared = read_configurations(place)
    if configuration in declared or (configuration is None and len(declared) == 1):
        options = declared[configuration or next(iter(declared))]
        if patterns := options.get("data_files"):
            return declared_files(place, patterns, wanted)
        place = place / options.get("data_dir", "")
    elif configuration is not None and (place / configuration).is_dir():
        place = place / configuration
    elif configuration is not None or declared:
        raise ValueError(f"it has the configurations {sorted(declared)[:20]}; set data.configuration to one of them")
    found, _ = find_files(str(place), lambda path: Path(path).suffix.lower() in (*BUILDERS, *suffixes()))
    builder, files = choose_builder(sorted(map(Path, found)))
    marks = {file: find_split(file.relative_to(place), wanted, named=builder != "imagefolder") for file in files}
    if not any(marks.values()):
        return builder, {wanted[0]: files}
    chosen = {name: [file for file in files if same_split(marks[file], name)] for name in wanted}
    if lacking := [name for name in wanted if not chosen[name]]:
        raise ValueError(f"it has no split {lacking[0]!r}, only {sorted(filter(None, set(marks.values())))}")
    if unmarked := [file.name for file in files if marks[file] is None]:
        warnings.warn(
            f"{place}: left out {len(unmarked)} of {len(files)} files that belong to no split, such as {unmarked[0]}",
            stacklevel=2,
        )
    return builder, chosen


def choose_builder(everything: list[Path]) -> tuple[str, list[Path]]:
    """The first kind of table there is, or images with the metadata files beside them."""
    images = [file for file in everything if file.suffix.lower() in suffixes()]
    metadata = [file for file in everything if images and file.stem == "metadata" and file.suffix.lower() in BUILDERS]
    tables = [file for file in everything if file not in metadata and file.suffix.lower() in BUILDERS]
    for builder in ("parquet", "arrow"):
        if found := [file for file in tables if BUILDERS[file.suffix.lower()] == builder]:
            return builder, found
    if images:
        return "imagefolder", [*images, *metadata]
    for builder in ("csv", "json"):
        if found := [file for file in tables if BUILDERS[file.suffix.lower()] == builder]:
            return builder, found
    raise ValueError(f"it holds neither images nor tables ({', '.join(BUILDERS)})")


def find_split(file: Path, wanted: list[str], *, named: bool) -> str | None:
    """The split that a folder or, if `named`, the file's name up to a number stands for, such as train-00000-of-00002."""
    words = "|".join(map(re.escape, [*wanted, *(word for group in SPLITS for word in group)]))
    stem = re.fullmatch(rf"({words})([-_.]?\d+(-of-\d+)?(-[0-9a-f]+)?)?", file.stem.lower()) if named else None
    folders = [part for part in file.parent.parts if re.fullmatch(words, part.lower())]
    return (folders or [stem[1] if stem else None])[0]


def same_split(one: str | None, other: str) -> bool:
    return one == other or any(one in group and other in group for group in SPLITS)


def read_configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """Configurations that the header of README.md declares."""
    try:
        header = (folder / "README.md").read_text(encoding="utf-8", errors="replace").split("---\n")
        declared = yaml.safe_load(header[1])["configs"] if len(header) > 2 and not header[0].strip() else []
        return {str(options["config_name"]): options for options in declared}
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return {}


def declared_files(folder: Path, patterns: Any, wanted: list[str]) -> tuple[str, dict[str, list[Path]]]:
    """Files of a configuration: a pattern, a list of them, or a list of {split, path}."""
    patterns = patterns if isinstance(patterns, list) else [patterns]
    rules = [each if isinstance(each, dict) else {"split": "train", "path": each} for each in patterns]
    found: dict[str, list[Path]] = {}
    for name in wanted:
        paths = [rule["path"] for rule in rules if same_split(rule.get("split"), name)]
        each = [path for path in paths for path in ([path] if isinstance(path, str) else path)]
        found[name] = sorted(
            {folder / file for path in each for file in glob.glob(path, root_dir=folder, recursive=True)}
        )
        if not found[name]:
            raise ValueError(f"it has no split {name!r}, only {sorted({str(rule.get('split')) for rule in rules})}")
    return choose_builder([file for files in found.values() for file in files])[0], found
