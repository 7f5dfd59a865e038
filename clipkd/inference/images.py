"""Find images in files and folders and encode those that can be decoded, batch by batch."""

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from clipkd import progress
from clipkd.files import describe_left_out, expand_home, find_files
from clipkd.images import is_image, open_image, to_rgb
from clipkd.inference.index import Entry, Index, read_stamp
from clipkd.inference.runtime import Student

T = TypeVar("T")

MAX_THREADS = 4
"""Images decoded at the same time."""


def find_images(names: Iterable[str]) -> dict[str, bool]:
    """List image files once each: path → whether it was named itself, not found in a folder.

    Raises: ValueError if a name is neither file nor folder, or a folder holds no images.
    """
    first: dict[str, str] = {}  # real path → the name it was first found by
    names = [expand_home(name) for name in names]
    named = {os.path.realpath(name) for name in names if os.path.isfile(name)}
    for name in names:
        if not (os.path.isfile(name) or os.path.isdir(name)):
            raise ValueError(f"no image or folder {name}")
        paths, left_out = find_files(name, is_image) if os.path.isdir(name) else ([name], [])
        if not paths:
            found = f" ({describe_left_out(left_out)})" if left_out else ""
            raise ValueError(f"{name} holds no images that Pillow knows{found}; name another folder, or files")
        if left_out:
            report(f"left out: {describe_left_out(left_out)}")
        for path in paths:
            first.setdefault(os.path.realpath(path), path)
    return {path: real in named for real, path in first.items()}


def encode_images(
    student: Student, named: Mapping[str, bool], *, index: str | None, batch_size: int
) -> dict[str, np.ndarray]:
    """Path → features, from the index where it has them. The index is written even if encoding is interrupted.

    named: as `find_images` returns it.
    Raises: ValueError if an image that was named itself, or every image, cannot be decoded.
    """
    known = Index.read(Path(index), student.image_sha256()) if index is not None else Index()
    done = {path: entry for path in named if (entry := known.find(path))}
    new = [path for path in named if path not in done]
    try:
        for path, result in encode_files(student, new, batch_size):
            if isinstance(result, Entry):
                done[path] = result
            elif named[path]:
                raise ValueError(f"{path}: {result}")
            else:
                report(f"left out: {path}: {result}")
    finally:
        known.write(done)
    if not done:
        raise ValueError(f"none of {len(named)} images can be decoded; the lines above say why")
    if index is not None:
        encoded = sum(path in done for path in new)
        report(f"{len(done)} images: {encoded} encoded, {len(done) - encoded} from {index}")
    return {path: done[path].feature for path in named if path in done}


def encode_files(student: Student, paths: Sequence[str], batch_size: int) -> Iterator[tuple[str, Entry | str]]:
    """Yield each path with its entry, or with the reason why it cannot be decoded."""

    def load(path: str) -> tuple[tuple[int, int], np.ndarray] | str:
        try:
            stamp = read_stamp(path)  # before the content: a file that changes meanwhile is encoded again
            with open_image(path) as image:
                return stamp, student.preprocess(to_rgb(image))
        except Exception as error:  # readers raise anything on a damaged file
            return " ".join(str(error).split()) or type(error).__name__

    count = -(-len(paths) // batch_size)
    parts = progress.track(batches(paths, batch_size), f"{batch_size} images at a time", count, visible=count > 1)
    # Pillow's warnings are ignored here once: catch_warnings in open_image is not safe in threads.
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in parts:
            loaded = list(zip(part, pool.map(load, part), strict=True))
            yield from ((path, result) for path, result in loaded if isinstance(result, str))
            good = [(path, *result) for path, result in loaded if not isinstance(result, str)]
            if good:
                features = student.encode_pixels(np.stack([pixels for *_, pixels in good]))
                require_finite(features, [path for path, *_ in good])
                for (path, stamp, _), feature in zip(good, features, strict=True):
                    yield path, Entry(stamp, feature)


def require_finite(features: np.ndarray, names: Sequence[str]) -> None:
    """Raises: ValueError naming the first image or text whose features are not finite."""
    for name, row in zip(names, features, strict=True):
        if not np.isfinite(row).all():
            raise ValueError(
                f"the features of {name} are not finite: the model's weights are damaged, or overflow in this format"
            )


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def report(message: str) -> None:
    print(f"clipkd predict: {printable(message)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Replace what UTF-8 cannot encode: file names may hold arbitrary bytes."""
    return text.encode(errors="replace").decode()
