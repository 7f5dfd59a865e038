"""Pairs from tables: Hugging Face data sets, and CSV or TSV files of image paths and captions."""

import csv
import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipkd.config.data import SourceConfig
from clipkd.data.skips import BadSample, Skip, Skips
from clipkd.data.sources import MAX_SAMPLE_BYTES, UNLABELLED, Pair, as_captions, as_label, locate
from clipkd.errors import short
from clipkd.files import sha256

ROWS_PER_SHARD = 1 << 14
"""Rows that stay together when a table larger than a block is shuffled, since they lie together on disk."""


def split_evenly(num_rows: int) -> np.ndarray:
    """Sizes of the shards of a table."""
    return np.diff([*range(0, num_rows, ROWS_PER_SHARD), num_rows])


class HuggingFacePairs:
    """A Hugging Face data set with columns of images, of captions (a string or a list) and optionally of labels."""

    def __init__(self, config: SourceConfig) -> None:
        import datasets

        (self.path,) = config.paths
        self.config = config
        rows = load_rows(self.path, config.split)
        columns = require_columns(config, self.path, rows.column_names)
        self.rows = rows.select_columns(columns).cast_column(config.image_column, datasets.Image(decode=False))
        self.texts = self.rows.remove_columns(config.image_column)
        if not len(self.rows):
            raise ValueError(f"{self.path} holds no rows in split {config.split!r}")
        self.shard_sizes, self.left_out, self.damaged = split_evenly(len(self.rows)), Skips(), list[Skip]()

    def parts(self) -> list[tuple[str, str]]:
        digest = hashlib.sha256()  # the library's own fingerprint changes with the folder
        for rows in self.rows.select_columns([self.config.caption_key]).iter(10_000):
            digest.update(json.dumps(rows, default=str).encode())
        return [(self.path, digest.hexdigest())]

    def read(self, index: int, *, image: bool = True) -> Pair:
        key, config = f"{self.path} row {index}", self.config
        row = (self.rows if image else self.texts)[index]
        data = self.stored_image(row[config.image_column], key) if image else b""
        label = as_label(row[config.label_key], key) if config.label_key else UNLABELLED
        return Pair(key, data, as_captions(row[config.caption_key], key), label)

    def stored_image(self, image: Mapping[str, Any] | None, key: str) -> bytes:
        """Raises: BadSample."""
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise BadSample(key, "no image", f"has no image in column {self.config.image_column!r}")
        return image["bytes"] if image["bytes"] is not None else read_file(Path(image["path"]), key)


class TablePairs:
    """CSV or TSV files with columns of image paths and captions; paths are relative to the file's folder."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self.tables = [read_table(Path(path), config) for path in config.paths]
        self.ends = np.cumsum([len(table) for table in self.tables])
        self.shard_sizes, self.left_out, self.damaged = split_evenly(int(self.ends[-1])), Skips(), list[Skip]()

    def parts(self) -> list[tuple[str, str]]:
        """Digests of the complete files."""
        return [(path, sha256(Path(path))) for path in self.config.paths]

    def read(self, index: int, *, image: bool = True) -> Pair:
        number, row = locate(self.ends, index)
        table = self.config.paths[number]
        path, caption, *label = (column[row].as_py() for column in self.tables[number].columns)
        key = f"{table} row {row}: {path}"
        if not path:
            raise BadSample(key, "no image", f"has no path in column {self.config.image_column!r}")
        data = read_file(Path(table).parent / path, key) if image else b""
        return Pair(key, data, as_captions(caption, key), as_label(label[0] or None, key) if label else UNLABELLED)


def read_file(path: Path, key: str) -> bytes:
    """The bytes of an image file. Raises: BadSample."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_SAMPLE_BYTES:
            raise OSError(f"{path} is no file of at most {MAX_SAMPLE_BYTES} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise BadSample(key, "no image", f"the image file cannot be read ({error})") from error


def read_table(path: Path, config: SourceConfig) -> Any:
    """The configured columns of a CSV or TSV file, all text. Without a header line, columns are numbered from 0.

    Raises: FileNotFoundError, or ValueError that names the existing columns, a row with too many or too few fields, or
        the line of an unclosed quote.
    """
    from pyarrow import ArrowInvalid, string
    from pyarrow import csv as arrow_csv

    if not path.is_file():
        raise FileNotFoundError(f"no file {path} (data.path)")
    columns = list(columns_of(config).values())
    numbered = all(column.isdecimal() for column in columns)
    # A .tsv has no quoting: with it, a caption that begins with a quote would swallow the next rows.
    tabs = path.suffix.lower() == ".tsv"
    quoting = {"quote_char": False} if tabs else {"newlines_in_values": True}
    parse = arrow_csv.ParseOptions(delimiter="\t" if tabs else ",", **quoting)
    options = arrow_csv.ReadOptions(autogenerate_column_names=numbered, use_threads=False)  # errors then number rows
    try:
        with arrow_csv.open_csv(path, read_options=options, parse_options=parse) as reader:
            names = reader.schema.names
        wanted = [f"f{column}" for column in columns] if numbered else columns
        require_columns(config, str(path), [name.removeprefix("f") for name in names] if numbered else names)
        convert = arrow_csv.ConvertOptions(
            column_types=dict.fromkeys(wanted, string()), include_columns=wanted, strings_can_be_null=False
        )
        table = arrow_csv.read_csv(path, read_options=options, parse_options=parse, convert_options=convert)
    except (ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable table: {short(error)}") from error
    if not len(table):
        raise ValueError(f"{path} holds no rows")
    if not tabs:
        require_closed_quotes(path, len(table) + (not numbered))
    return table


def require_closed_quotes(path: Path, num_rows: int) -> None:
    """Raises: ValueError if a stray quote has made Arrow take the rows after it for part of a caption."""
    with path.open("rb") as file:
        if sum(1 for line in file if line.strip()) <= num_rows:
            return  # no field spans lines
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader, last = csv.reader(file, strict=True), 0
        try:
            for _ in reader:
                last = reader.line_num
        except csv.Error as error:
            raise ValueError(
                f"{path}: the quotes of the row at line {last + 1} do not match ({error}); double the quotes within a field"
            ) from error


def columns_of(config: SourceConfig) -> dict[str, str]:
    """Option → column, in the order in which a source reads them."""
    options = {"image_column": config.image_column, "caption_key": config.caption_key, "label_key": config.label_key}
    return {option: column for option, column in options.items() if column is not None}


def require_columns(config: SourceConfig, path: str, names: list[str]) -> list[str]:
    """The columns that a source reads. Raises: ValueError that names the existing ones if one is missing."""
    wanted = columns_of(config)
    hint = " (in a table without a header line: the column's number, from 0)" if config.format == "csv" else ""
    for option, column in wanted.items():
        if column not in names:
            raise ValueError(f"{path} has no column {column!r}, only {names}; set data.{option}{hint}")
    return list(wanted.values())


def load_rows(path: str, split: str) -> Any:
    """A map-style split of a hub data set, of a save_to_disk folder, or of a folder of parquet, arrow or image files."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        if Path(path).is_dir() and any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            stored = datasets.load_from_disk(path)
            return stored[split] if isinstance(stored, datasets.DatasetDict) else stored
        return datasets.load_dataset(path, split=split)
    except (KeyError, ValueError, IndexError, OSError, DatasetsError) as error:
        raise ValueError(f"cannot open the Hugging Face data set {path!r}, split {split!r}: {error}") from error
