"""Pairs from tables: Hugging Face data sets, and CSV or TSV files of image paths and captions."""

import base64
import contextlib
import csv
import hashlib
import io
import itertools
import json
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit

import numpy as np

from clipkd.config.data import SourceConfig
from clipkd.data.rows import load_rows
from clipkd.data.skips import BadSample, Skip, Skips
from clipkd.data.sources import MAX_SAMPLE_BYTES, NO_CAPTION, UNLABELLED, Pair, as_captions, as_label, locate
from clipkd.errors import short
from clipkd.files import expand_home, sha256
from clipkd.images import open_image

DELIMITERS = ",\t;"
"""Of a table, in the order in which they are tried."""

FIRST_ROWS = 20
"""Rows that tell the delimiter of a table without a header line."""

FEWEST_BASE64 = 64
"""Characters from which on a field may be an image."""

ROWS_PER_SHARD = 1 << 14
"""Rows that stay together when a table larger than a block is shuffled, since they lie together on disk."""


def split_evenly(num_rows: int) -> np.ndarray:
    """Sizes of the shards of a table."""
    return np.diff([*range(0, num_rows, ROWS_PER_SHARD), num_rows])


class HuggingFacePairs:
    """A Hugging Face data set with columns of images, of captions (a string or a list) and optionally of labels."""

    def __init__(self, config: SourceConfig) -> None:
        (self.path,) = config.paths
        self.config = config
        rows, self.folders = load_rows(self.path, config.split, config.configuration)
        columns = require_columns(config, self.path, rows.column_names)
        self.rows = with_encoded_images(rows.select_columns(columns), config.image_column, self.path)
        self.texts = self.rows.remove_columns(config.image_column)
        if not len(self.rows):
            raise ValueError(f"{self.path} holds no rows in split {config.split!r}")
        self.shard_sizes, self.left_out, self.damaged = split_evenly(len(self.rows)), Skips(), list[Skip]()

    def parts(self) -> list[tuple[str, str]]:
        from pyarrow.compute import struct_field  # type: ignore[attr-defined]

        digest = hashlib.sha256()  # the library's own fingerprint changes with the folder
        caption, image = self.config.caption_key, self.config.image_column
        if caption is None:
            for rows in self.rows.with_format("arrow").iter(10_000):  # without reading an image
                paths = struct_field(rows[image], "path").to_pylist()
                digest.update(json.dumps([path and Path(path).name for path in paths]).encode())
            return [(self.path, digest.hexdigest())]
        for rows in self.rows.select_columns([caption]).iter(10_000):
            digest.update(json.dumps(rows, default=str).encode())
        return [(self.path, digest.hexdigest())]

    def read(self, index: int, *, image: bool = True) -> Pair:
        key, config = f"{self.path} row {index}", self.config
        row = (self.texts if self.texts.column_names and not image else self.rows)[index]
        data = stored_image(row[config.image_column], self.folders, index, key) if image else b""
        label = as_label(row[config.label_key], key) if config.label_key else UNLABELLED
        captions = NO_CAPTION if config.caption_key is None else as_captions(row[config.caption_key], key)
        return Pair(key, data, captions, label)


def with_encoded_images(rows: Any, column: str, path: str) -> Any:
    """The rows with a column of images as {bytes, path}. Raises: ValueError if the column can hold no images."""
    import datasets

    kind, where = rows.features[column], f"{path}: the column {column!r} holds"
    if isinstance(kind, datasets.List | datasets.LargeList | list):
        raise ValueError(f"{where} lists; a pair has one image, so write a row for each")
    try:
        return rows.cast_column(column, datasets.Image(decode=False))
    except (ValueError, TypeError, NotImplementedError) as error:  # which of them depends on the kind of column
        raise ValueError(f"{where} {kind!r:.80}, not images") from error


def stored_image(image: Mapping[str, Any] | None, folders: Sequence[tuple[int, Path]], row: int, key: str) -> bytes:
    """The bytes of an image in row `row`. folders: as `load_rows` gives them. Raises: BadSample."""
    if image is None or (image["bytes"] is None and not image["path"]):
        raise BadSample(key, "no image", "has no image in its column")
    if image["bytes"] is not None:
        return image["bytes"]
    return read_image(image["path"], next((folder for end, folder in folders if row < end), None), key)


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
        columns = zip(columns_of(self.config), self.tables[number].columns, strict=True)
        values = {option: column[row].as_py() for option, column in columns}
        path = values["image_column"]
        key = f"{table} row {row}: {path}"
        if not path:
            raise BadSample(key, "no image", f"has no path in column {self.config.image_column!r}")
        data = read_image(path, Path(table).parent, key) if image else b""
        captions = as_captions(values["caption_key"], key) if "caption_key" in values else NO_CAPTION
        label = as_label(values["label_key"] or None, key) if "label_key" in values else UNLABELLED
        return Pair(key, data, captions, label)


def read_image(value: str, folder: Path | None, key: str) -> bytes:
    """The image that a field of a table names: a path relative to the table, a file:// address, or base64 text.

    Raises: BadSample.
    """
    address = urlsplit(value) if "://" in value[:20] else None
    if address and address.scheme != "file":
        message = f"names a URL ({value[:80]}); download the images, for example with img2dataset, and name the files"
        raise BadSample(key, "no image", message)
    name = unquote(address.path) if address else expand_home(value)
    path = Path(name) if folder is None else folder / name
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_SAMPLE_BYTES:
            raise OSError(f"{path} is no file of at most {MAX_SAMPLE_BYTES} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        if (content := from_base64(value)) is not None:
            return content
        hint = "; write its folders with /" if "\\" in value else ""
        hint = hint or ("; it is not relative to a table" if folder is None and not path.is_absolute() else "")
        message = f"the image file cannot be read ({short(error)}{hint})"
        raise BadSample(key, "no image", message) from error


def from_base64(text: str) -> bytes | None:
    """An image written as base64; None if the text is none."""
    text = text.partition(";base64,")[2] if text.startswith("data:image/") else text
    if len(text) < FEWEST_BASE64:
        return None
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
        open_image(content)
    except ValueError:  # no base64, or no image
        return None
    return content


def read_table(path: Path, config: SourceConfig) -> Any:
    """The configured columns of a CSV or TSV file, all text. Without a header line, columns are numbered from 0.

    Commas, tabs or semicolons; UTF-8 or UTF-16; also compressed (.gz, .bz2, .zst, .lz4).
    Raises: FileNotFoundError, or ValueError that names the existing columns, a row with too many or too few fields, or
        the line of an unclosed quote.
    """
    import pyarrow
    from pyarrow import csv as arrow_csv

    if not path.is_file():
        raise FileNotFoundError(f"no file {path} (data.path)")
    columns = list(columns_of(config).values())
    numbered = all(column.isdecimal() for column in columns)
    # A .tsv has no quoting: with it, a caption that begins with a quote would swallow the next rows.
    quoted = ".tsv" not in map(str.lower, path.suffixes)
    try:
        with pyarrow.input_stream(path) as stream:
            encoding = "utf-16" if stream.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        delimiter, names = find_columns(path, encoding, columns, DELIMITERS if quoted else "\t")
        require_columns(config, str(path), names)
        wanted = [f"f{column}" for column in columns] if numbered else columns
        with pyarrow.input_stream(path) as stream:
            table = arrow_csv.read_csv(
                stream,
                read_options=arrow_csv.ReadOptions(
                    autogenerate_column_names=numbered,
                    use_threads=False,  # errors then number rows
                    encoding="utf8" if encoding == "utf-8-sig" else encoding,
                ),
                parse_options=arrow_csv.ParseOptions(
                    delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
                ),
                convert_options=arrow_csv.ConvertOptions(
                    column_types=dict.fromkeys(wanted, pyarrow.string()),
                    include_columns=wanted,
                    strings_can_be_null=False,
                ),
            )
        if quoted and len(table):
            require_closed_quotes(path, encoding, delimiter, len(table) + (not numbered))
    except (pyarrow.ArrowInvalid, UnicodeError, OSError, csv.Error) as error:
        raise ValueError(f"{path} is no readable table: {short(error)}") from error
    if not len(table):
        raise ValueError(f"{path} holds no rows")
    return table


@contextlib.contextmanager
def open_text(path: Path, encoding: str) -> Iterator[TextIO]:
    """A table as text, unpacked if its name says that it is compressed."""
    import pyarrow

    with (
        pyarrow.input_stream(path) as stream,
        io.TextIOWrapper(io.BufferedReader(stream), encoding=encoding, newline="") as text,  # type: ignore[arg-type]
    ):
        yield text


def find_columns(path: Path, encoding: str, columns: list[str], delimiters: str) -> tuple[str, list[str]]:
    """The delimiter under which a table has the columns, and all their names; else the one that gives the most columns.

    Without a header line, the first rows must also be equally long: a caption may hold other delimiters.
    """
    numbered = all(column.isdecimal() for column in columns)
    found: list[tuple[str, list[str]]] = []
    for delimiter in delimiters:
        with open_text(path, encoding) as text, contextlib.suppress(csv.Error):
            quoting = csv.QUOTE_MINIMAL if len(delimiters) > 1 else csv.QUOTE_NONE
            reader = filter(None, csv.reader(text, delimiter=delimiter, quoting=quoting))
            rows = list(itertools.islice(reader, FIRST_ROWS if numbered else 1))
            if not rows:
                raise ValueError(f"{path} holds no rows")
            names = [*map(str, range(len(rows[0])))] if numbered else rows[0]
            if set(columns) <= set(names) and len({len(row) for row in rows}) == 1:
                return delimiter, names
            found.append((delimiter, names))
    if not found:
        raise ValueError(f"{path} is no readable table: its first row has no end")
    return max(found, key=lambda each: len(each[1]))


def require_closed_quotes(path: Path, encoding: str, delimiter: str, num_rows: int) -> None:
    """Raises: ValueError if a stray quote has made Arrow take the rows after it for part of a caption."""
    with open_text(path, encoding) as text:
        if sum(1 for line in text if line.strip()) <= num_rows:
            return  # no field spans lines
    with open_text(path, encoding) as text:
        reader, last = csv.reader(text, strict=True, delimiter=delimiter), 0
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
            shown = str([name[:40] for name in names[:20]]) + " …" * (len(names) > 20)
            raise ValueError(f"{path} has no column {column!r}, only {shown}; set data.{option}{hint}")
    return list(wanted.values())
