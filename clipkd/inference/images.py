"""Files and folders → features of every image that can be decoded, a batch in memory at a time."""

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from clipkd import progress
from clipkd.inference.index import Entry, Index, read_stamp
from clipkd.inference.runtime import Student
from clipkd.models.onnx_student import IMAGE_FORMATS

T = TypeVar("T")

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Of the files that a folder is searched for, in upper or lower case."""

MAX_PIXELS = 1 << 26
"""Of an image, as in training: a few kilobytes can claim to be gigabytes of pixels."""

MOST_THREADS = 4
"""That decode side by side; each holds one whole image."""


class Unusable(NamedTuple):
    """An image without features."""

    reason: str


def find_images(names: Iterable[str]) -> dict[str, bool]:
    """Paths of images → whether they were named themselves, not found in a folder. What is hidden is left out.

    Raises: ValueError if a name is neither file nor folder, or a folder holds no images.
    """
    found: dict[str, bool] = {}
    for name in names:
        if os.path.isdir(name):
            inside = [path for path in walk(name) if path.lower().endswith(ENDINGS)]
            if not inside:
                raise ValueError(f"{name} holds no images ({', '.join(ENDINGS)}); name another folder, or files")
            for path in inside:
                found.setdefault(path, False)
        elif os.path.isfile(name):
            found[name] = True
        else:
            raise ValueError(f"no image or folder {name}")
    once = {os.path.realpath(path): path for path in reversed(found)}  # one file under two names is one image
    return {path: own for path, own in found.items() if once[os.path.realpath(path)] == path}


def walk(top: str) -> Iterator[str]:
    """All files in and below a folder, in order of their names."""
    for folder, folders, files in os.walk(top, onerror=lambda error: tell(f"left out: {error}")):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (os.path.join(folder, name) for name in sorted(files) if not name.startswith("."))
        # No pipes, which would wait for a writer; what a broken link stood for is named later.
        yield from (path for path in paths if os.path.isfile(path) or os.path.islink(path))


def encode_images(
    student: Student, named: Mapping[str, bool], *, index: str | None, batch_size: int
) -> dict[str, np.ndarray]:
    """Path → features. Those that an index has are taken from it; it is written even if the encoding is stopped.

    named: as find_images finds them.
    Raises: ValueError for an image that was named itself and cannot be decoded, or if no image can be.
    """
    known = Index.read(Path(index), student.image_sha256()) if index is not None else Index()
    done = {path: entry for path in named if (entry := known.find(path))}
    new = [path for path in named if path not in done]
    try:
        for path, found in encode_files(student, new, batch_size):
            if isinstance(found, Entry):
                done[path] = found
            elif named[path]:
                raise ValueError(f"{path}: {found.reason}")
            else:
                tell(f"left out: {path}: {found.reason}")
    finally:
        known.write(done)
    if not done:
        raise ValueError(f"none of {len(named)} images can be decoded; the lines above say why")
    if index is not None:
        encoded = sum(path in done for path in new)
        tell(f"{len(done)} images: {encoded} encoded, {len(done) - encoded} from {index}")
    return {path: done[path].feature for path in named if path in done}


def encode_files(student: Student, paths: Sequence[str], batch_size: int) -> Iterator[tuple[str, Entry | Unusable]]:
    def load(path: str) -> tuple[tuple[int, int], np.ndarray] | Unusable:
        try:
            stamp = read_stamp(path)  # before the content: a file that changes meanwhile is encoded again
            return stamp, student.preprocess(open_image(path))
        except Exception as error:  # whatever a reader stumbles over, it is in this file
            return Unusable(" ".join(str(error).split()) or type(error).__name__)

    count = -(-len(paths) // batch_size)
    parts = progress.track(batches(paths, batch_size), f"{batch_size} images at a time", count, visible=count > 1)
    # The warnings are of metadata, which nobody reads, and of sizes, which open_image looks at.
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in parts:
            loaded = dict(zip(part, pool.map(load, part), strict=True))
            good = {path: found for path, found in loaded.items() if not isinstance(found, Unusable)}
            yield from ((path, found) for path, found in loaded.items() if isinstance(found, Unusable))
            if good:
                features = student.encode_pixels(np.stack([pixels for _, pixels in good.values()]))
                for (path, (stamp, _)), feature in zip(good.items(), features, strict=True):
                    yield path, Entry(stamp, feature)


def open_image(path: str) -> Image.Image:
    """A file → RGB, transparent pixels white as in training, 16 bits scaled to 8.

    Raises: ValueError if it is no image of these formats or claims too many pixels, or whatever Pillow does.
    """
    try:
        image = Image.open(path, formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"it is no image, or none of {', '.join(IMAGE_FORMATS)}") from None
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has {image.width} × {image.height} pixels, more than {MAX_PIXELS}")
        if image.mode.startswith("I;16"):  # Pillow would clip them
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def tell(message: str) -> None:
    print(f"clipkd predict: {printable(message)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """File names may hold bytes that are no text."""
    return text.encode(errors="replace").decode()
