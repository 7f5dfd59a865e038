"""Read the samples of a tar and raise on damage, which `tarfile` mistakes for the end of the archive."""

import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

from webdataset.tariterators import base_plus_ext

from clipkd.data.sources import IMAGE_EXTENSIONS
from clipkd.files import is_hidden

T = TypeVar("T")

MAX_MEMBER_BYTES = 1 << 32
"""A header may claim any size; `tarfile` would follow a negative one in circles."""

MAX_HEADER_BYTES = 1 << 20
"""Of a long name or a pax header, which `tarfile` reads into memory at once."""

HEADER_TYPES = b"LKxgX"
"""Types of members that extend the next header: GNU long names, pax and Solaris headers."""


class DamagedTar(ValueError):
    """A tar that cannot be read to its end or holds no samples. The message continues a sentence about the tar."""


class StrictMember(tarfile.TarInfo):
    """A tar member with a complete header and a plausible size. Raises: ReadError for any other."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "StrictMember":
        member = super().frombuf(buf, encoding, errors)
        require_size(member, MAX_HEADER_BYTES if member.type in HEADER_TYPES else MAX_MEMBER_BYTES)
        return member

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "StrictMember":  # type: ignore[override]
        try:
            member = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no end of archive at byte {tarfile_.offset}: {error}") from error
        require_size(member, MAX_MEMBER_BYTES)
        if member.issparse() or any(key.startswith("GNU.sparse") for key in member.pax_headers):
            raise tarfile.ReadError(f"{member.name} is stored sparsely")
        return member


def require_size(member: tarfile.TarInfo, most: int) -> None:
    if not 0 <= member.size <= most:
        raise tarfile.ReadError(f"{member.name} claims {member.size} bytes")


def require_end(tar: tarfile.TarFile) -> None:
    """Raises: ReadError if anything but zeros follows the end of the archive, such as another tar."""
    assert tar.fileobj is not None
    while chunk := tar.fileobj.read(1 << 20):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"data behind the end of the archive at byte {tar.offset}")


Open = Callable[[], AbstractContextManager[tarfile.TarFile]]
Take = Callable[[tarfile.TarFile, tarfile.TarInfo], T | None]


def read_files(open_tar: Open, take: Take[T]) -> Iterator[tuple[str, T]]:
    """Iterate over the files and hard links of a tar: name and `take(tar, member)`, unless that is None.

    Raises: DamagedTar after the last good file.
    """
    count, given = 0, False
    try:
        with open_tar() as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                if (member.isreg() or member.islnk()) and (taken := take(tar, member)) is not None:
                    count, given = count + 1, True
                    yield member.name, taken
                    given = False
            require_end(tar)
    # Besides tarfile's own errors: absurd numbers, chains of headers, pipes that fail.
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError, RecursionError) as error:
        if given:  # closed by the consumer, which a program behind a pipe reports as a failure
            return
        raise DamagedTar(f"is not a complete uncompressed tar ({error}, after {count} files)") from error


def split_at_last_dot(key: str, parts: dict[str, T]) -> list[tuple[str, dict[str, T]]]:
    """The samples among the files that share a name up to its first dot.

    They are one, unless none of its files is an image, but some would be by the suffix behind the last dot alone:
    `www.host.com_1.jpg` is then the image of `www.host.com_1`.
    """
    suffixes = {extension: extension.rpartition(".")[2] for extension in parts}
    if not any(suffix in IMAGE_EXTENSIONS for suffix in suffixes.values()) or any(e in parts for e in IMAGE_EXTENSIONS):
        return [(key, parts)]
    found: dict[str, dict[str, T]] = {}
    for extension, suffix in suffixes.items():
        found.setdefault(f"{key}.{extension}".removesuffix(f".{suffix}"), {})[suffix] = parts[extension]
    return list(found.items())


def read_samples(open_tar: Open, take: Take[T]) -> Iterator[tuple[str, dict[str, T], bool]]:
    """Iterate over the samples of a tar: consecutive files of one key, i.e. of one name without extensions.

    Yields: the key, {lower-case extension: `take(tar, member)`}, and whether an earlier sample has the same key. A
        repeated extension begins another sample. A hidden file comes as its name without any parts.
    Raises: DamagedTar after the last readable sample, if the tar is damaged or holds no samples.
    """
    keys: set[str] = set()
    key: str | None = None
    parts: dict[str, T] = {}
    damage: DamagedTar | None = None

    def finish() -> Iterator[tuple[str, dict[str, T], bool]]:
        for own_key, own_parts in split_at_last_dot(key or "", parts):
            yield own_key, own_parts, own_key in keys
            keys.add(own_key)

    try:
        for name, taken in read_files(open_tar, take):
            if is_hidden(name):
                yield name, {}, False
                continue
            new_key, extension = base_plus_ext(name)
            if new_key is None or extension is None:
                continue
            extension = extension.lower()
            if key is not None and (new_key != key or extension in parts):
                yield from finish()
                parts = {}
            key = new_key
            parts[extension] = taken
    except DamagedTar as error:
        damage = error
    if key is not None:
        yield from finish()
    if damage is not None:
        raise damage
    if key is None:
        raise DamagedTar("holds no samples")
