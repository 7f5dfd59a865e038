"""What a tar holds, told to the end or with the reason why not: tarfile takes much damage for the end of an archive."""

import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

from webdataset.tariterators import base_plus_ext

T = TypeVar("T")

MOST_BYTES = 1 << 32
"""Of a member. A header may claim any size, negative ones too, which tarfile would follow in circles."""

MOST_HEADER_BYTES = 1 << 20
"""Of a long name or pax header, which tarfile reads into memory at once."""

EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class StrictMember(tarfile.TarInfo):
    """A member whose header is whole and says where its bytes are, or an error."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "StrictMember":
        member = super().frombuf(buf, encoding, errors)
        require_size(member, MOST_HEADER_BYTES if member.type in EXTENDED else MOST_BYTES)
        return member

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "StrictMember":  # type: ignore[override]
        try:
            member = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no end of archive at byte {tarfile_.offset}: {error}") from error
        require_size(member, MOST_BYTES)
        if member.issparse() or any(key.startswith("GNU.sparse") for key in member.pax_headers):
            raise tarfile.ReadError(f"{member.name} is stored sparsely")
        return member


def require_size(member: tarfile.TarInfo, most: int) -> None:
    if not 0 <= member.size <= most:
        raise tarfile.ReadError(f"{member.name} claims {member.size} bytes")


def walk(
    open_tar: Callable[[], AbstractContextManager[tarfile.TarFile]],
    take: Callable[[tarfile.TarFile, tarfile.TarInfo], T],
    damage: list[str],
) -> Iterator[tuple[str, T]]:
    """Name and what `take` makes of every file in a tar, as far as it can be read; what stops it is added to `damage`."""
    count = 0
    try:
        with open_tar() as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                if member.isreg():
                    taken = take(tar, member)
                    count += 1
                    yield member.name, taken
            require_end(tar)
    # Besides tarfile's own errors: absurd numbers, chains of headers, pipes that fail.
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError, RecursionError) as error:
        damage.append(f"is not a whole uncompressed tar ({error}, after {count} files)")


def require_end(tar: tarfile.TarFile) -> None:
    """Raises: ReadError if anything but zeros follows what tarfile took for the end, such as another tar."""
    assert tar.fileobj is not None
    while chunk := tar.fileobj.read(1 << 20):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"data behind the end of the archive at byte {tar.offset}")


def group_members(members: Iterable[tuple[str, T]]) -> Iterator[tuple[str, dict[str, T]]]:
    """(name, content) in file order → (key, {extension: content}) per sample.

    A sample ends where another key begins, or where one of its extensions comes again: then the key was written twice.
    """
    current: str | None = None
    parts: dict[str, T] = {}
    for name, content in members:
        key, extension = base_plus_ext(name)
        if key is None or extension is None:
            continue
        extension = extension.lower()
        if key != current or extension in parts:
            if current is not None:
                yield current, parts
            current, parts = key, {}
        parts[extension] = content
    if current is not None:
        yield current, parts
