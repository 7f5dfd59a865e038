"""Image-text pairs behind one interface: a sample, a source of samples, and several sources as one data set."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from clipkd.config.data import SourceConfig
from clipkd.data.order import Mixture
from clipkd.data.skips import NO_SAMPLES, BadSample, Skip, Skips, exceeds

UNLABELLED = -1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_SAMPLE_BYTES = 1 << 28
"""Of an image, caption or label: a table may name /dev/zero."""

MAX_CHARACTERS = 2000
"""Of a caption. A tokenizer keeps far fewer, but takes minutes over one word of a hundred thousand letters."""

NO_CAPTION = ("",)
"""Captions of images alone."""

NUM_PROBES = 8
"""Samples that are read before a run: if none of them can be read, an option is wrong."""


@dataclass(frozen=True)
class Pair:
    """One sample, still encoded."""

    key: str
    """Shard and key, file or row."""
    image: bytes
    captions: tuple[str, ...]
    label: int = UNLABELLED


class PairSource(Protocol):
    shard_sizes: np.ndarray
    """Samples per shard, 0 for one without a usable sample; samples are numbered through the shards in order."""
    left_out: Skips
    """Samples that the index shows to be unusable."""
    damaged: list[Skip]
    """Shards that cannot be read to their end."""

    def parts(self) -> list[tuple[str, str]]:
        """The files of the source, each with a digest of its samples and their order; labels do not count."""
        ...

    def read(self, index: int, *, image: bool = True) -> Pair:
        """image: False leaves the image empty and does not read it. Raises: BadSample."""
        ...


class PairSet:
    """All configured sources as one; ids count through them one after another."""

    def __init__(self, sources: Sequence[PairSource], configs: Sequence[SourceConfig]) -> None:
        self.sources, self.configs = list(sources), list(configs)
        self.ends = np.cumsum([int(source.shard_sizes.sum()) for source in sources])
        self.damaged = [skip for source in sources for skip in source.damaged]
        self.left_out = Skips()
        for source in sources:
            self.left_out.merge(source.left_out)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, index: int, *, image: bool = True) -> Pair:
        """image: False leaves the image empty and does not read it. Raises: BadSample."""
        source, number = locate(self.ends, index)
        return self.sources[source].read(number, image=image)

    def identity(self) -> list[dict[str, Any]]:
        """Per source: content and options that a resumed run must find unchanged, wherever the files lie."""
        found = []
        for source, config in zip(self.sources, self.configs, strict=True):
            digests = "".join(digest for _, digest in source.parts())
            fingerprint = hashlib.sha256(digests.encode()).hexdigest()
            found.append({"pairs": int(source.shard_sizes.sum()), "fingerprint": fingerprint, **identity_of(config)})
        return found

    def mixture(self, seed: int) -> Mixture:
        sizes, weights = [s.shard_sizes for s in self.sources], [config.weight for config in self.configs]
        return Mixture(sizes, weights=weights, seed=seed)

    def unusable(self) -> Skips:
        """Damaged shards, and samples that the indexes show to be unusable."""
        found = Skips(self.damaged)
        found.merge(self.left_out)
        return found

    def describe(self) -> str:
        left_out = f"; left out: {unusable}" if (unusable := self.unusable()) else ""
        return f"{len(self)} pairs{left_out}"

    def require_usable(self, max_share: float) -> None:
        """Raises: ValueError if more is damaged than may be skipped, or none of the first samples can be read."""
        num_shards = sum(len(source.shard_sizes) for source in self.sources)
        if len(self.damaged) > max_share * num_shards:
            first = self.damaged[0]
            raise ValueError(
                f"{first.key} {first.message}; {len(self.damaged)} of {num_shards} shards are damaged: copy or write "
                "them again, or raise data.max_skipped to train on the others"
            )
        num_left_out = self.left_out.num_samples
        if exceeds(num_left_out, len(self) + num_left_out, max_share):
            first = next(skip for skip in self.left_out.examples if skip.cause not in NO_SAMPLES)
            raise ValueError(
                f"{num_left_out} of {len(self) + num_left_out} samples cannot be used ({self.left_out}), such as "
                f"{first.key}: {first.message}; raise data.max_skipped to train on the others"
            )
        for source in self.sources:
            probe(source)


def locate(ends: np.ndarray, index: int) -> tuple[int, int]:
    """Part that holds an index, and the index within that part; `ends` are the parts' cumulative lengths."""
    part = int(np.searchsorted(ends, index, "right"))
    return part, index - (int(ends[part - 1]) if part else 0)


def identity_of(config: SourceConfig) -> dict[str, Any]:
    """The options of a source except its location."""
    names = ("format", "image_column", "caption_key", "label_key", "weight")
    return {name: getattr(config, name) for name in names}


def probe(source: PairSource) -> None:
    """Raises: BadSample if none of the first samples can be read: most likely a key or column is wrong."""
    bad: list[BadSample] = []
    for index in range(min(NUM_PROBES, int(source.shard_sizes.sum()))):
        try:
            source.read(index)
            return
        except BadSample as error:
            bad.append(error)
    raise bad[0]


def member_extensions(config: SourceConfig) -> list[tuple[str, ...]]:
    """Extensions of a webdataset sample's image, its caption (of images alone the image again) and any configured label."""
    caption = IMAGE_EXTENSIONS if config.caption_key is None else ("txt" if config.caption_key == "txt" else "json",)
    label = [] if config.label_key is None else [("cls" if config.label_key == "cls" else "json",)]
    return [IMAGE_EXTENSIONS, caption, *label]


def missing_member(key: str, extensions: tuple[str, ...]) -> Skip:
    """Why a webdataset sample without a member of these extensions cannot be used."""
    if extensions == IMAGE_EXTENSIONS:
        return Skip(key, "no image", f"has no {', '.join(f'.{name}' for name in extensions)}")
    return Skip(key, "no caption", f"has no .{extensions[0]}; see data.caption_key")


def dotted_pairs(extensions: Iterable[str], wanted: Sequence[tuple[str, ...]]) -> list[str]:
    """Pairs that a sample hides because their names continue its own behind a dot: `v2` for a.jpg, a.v2.jpg, a.v2.txt.

    wanted: extensions of an image and of its caption, as `member_extensions` gives them.
    """
    if wanted[1] == IMAGE_EXTENSIONS:
        return []  # images alone: each would be a pair, also the mask beside an image
    stems: list[dict[str, None]] = [
        {ext.rpartition(".")[0]: None for ext in extensions if "." in ext and ext.rpartition(".")[2] in names}
        for names in wanted[:2]
    ]
    return [stem for stem in stems[0] if stem in stems[1]]


def several_dots(key: str, stem: str) -> Skip:
    return Skip(
        f"{key}.{stem}", "several dots", f"it belongs to {key} by webdataset's rule of the first dot; rename it"
    )


def make_pair(key: str, members: Sequence[bytes | None], config: SourceConfig) -> Pair:
    """Members of a webdataset sample, as `member_extensions` lists them, → Pair. Raises: BadSample."""
    for content, extensions in zip(members[:2], member_extensions(config), strict=False):
        if content is None:
            raise BadSample(*missing_member(key, extensions))
    image, caption, *label = members
    assert image is not None
    captions = NO_CAPTION
    if config.caption_key is not None:
        captions = as_captions(read_member(caption, config.caption_key, "caption", key), key)
    if not label or label[0] is None:
        return Pair(key, image, captions)
    return Pair(key, image, captions, as_label(read_member(label[0], config.label_key, "label", key), key))


def read_member(content: bytes | None, name: str | None, kind: str, where: str) -> Any:
    """The text of a .txt or .cls member, otherwise the value of a key in a .json. Raises: BadSample."""
    assert content is not None
    try:
        if name == {"caption": "txt", "label": "cls"}[kind]:
            return content.decode("utf-8")
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSample(where, f"unreadable {kind}", f"its {kind} cannot be read ({error})") from error
    if isinstance(values, dict) and name in values:
        return values[name]
    held = f"only {sorted(values)[:20]}" if isinstance(values, dict) else f"it is a {type(values).__name__}"
    raise BadSample(where, f"no {kind}", f"its json has no key {name!r}, {held}; see data.{kind}_key")


def as_captions(value: Any, where: str) -> tuple[str, ...]:
    """A caption or a list of captions, stripped, cut to MAX_CHARACTERS, empty ones dropped. Raises: BadSample."""
    captions = (value,) if isinstance(value, str) else value
    if not isinstance(captions, list | tuple) or not all(isinstance(caption, str) for caption in captions):
        message = f"expected a caption or a list of captions, got {type(value).__name__}"
        raise BadSample(where, "no caption", message)
    captions = tuple(caption.strip()[:MAX_CHARACTERS].strip() for caption in captions if caption.strip())
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:  # half of an emoji, left by a JSON writer that cut text at UTF-16 units
        raise BadSample(where, "unreadable caption", f"its caption cannot be read ({error})") from error
    if not captions:
        raise BadSample(where, "empty caption", "every caption is empty")
    return captions


def as_label(value: Any, where: str) -> int:
    """A class number; −1 for a sample without a label. Raises: BadSample."""
    if value is None:
        return UNLABELLED
    if isinstance(value, str | int) and re.fullmatch(r"-1|\d{1,18}", str(value).strip()):
        return int(value)
    message = f"its label is {value!r}; it must be a class number from 0 on, or null; see data.label_key"
    raise BadSample(where, "wrong label", message)
