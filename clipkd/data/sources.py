"""Image-text pairs behind one interface: what a sample is, and how several sources make one data set."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from clipkd.config.data import DataConfig, SourceConfig
from clipkd.data.order import Mixture
from clipkd.data.skips import BadSample, Skip, Skips, exceeds

UNLABELLED = -1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MOST_SAMPLE_BYTES = 1 << 28
"""Of an image, caption or label: a table may name /dev/zero."""

MOST_CHARACTERS = 2000
"""Of a caption. A tokenizer keeps far less, but takes minutes over one word of a hundred thousand letters."""

NUM_PROBES = 8
"""Samples that are looked at before a run: an option is wrong if not one of them can be read."""

Track = Callable[[Iterable[Any], str, int], Iterator[Any]]
"""Shows progress: (items, title, their number) → the items."""


@dataclass(frozen=True)
class Pair:
    """One sample, still encoded."""

    key: str
    """Where it came from: shard and key, file or row."""
    image: bytes
    captions: tuple[str, ...]
    label: int = UNLABELLED


class PairSource(Protocol):
    shard_sizes: np.ndarray
    """Samples per shard; samples are numbered through the shards in order."""
    num_shards: int
    """Those that hold no usable sample included."""
    left_out: Skips
    """Samples that were found unusable without reading them."""
    damaged: list[Skip]
    """Shards that cannot be read to their end."""

    def fingerprint(self) -> str:
        """Changes when samples are added, removed or put in another order."""
        ...

    def parts(self) -> list[tuple[str, str]]:
        """The files that it is read from, each with a digest that changes with its samples or their order, labels aside."""
        ...

    def read(self, index: int) -> Pair:
        """Raises: BadSample."""
        ...

    def read_captions(self, index: int) -> tuple[str, ...]:
        """Those of `read`, without its image. Raises: BadSample."""
        ...


class PairSet:
    """All configured sources as one; ids count through them one after another."""

    def __init__(self, sources: Sequence[PairSource], configs: Sequence[SourceConfig]) -> None:
        self.sources, self.configs = list(sources), list(configs)
        counts = [int(source.shard_sizes.sum()) for source in sources]
        self.ends = np.cumsum(counts)
        self.left_out = Skips()
        for source in sources:
            self.left_out.merge(source.left_out)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, index: int) -> Pair:
        """Raises: BadSample."""
        source, number = self.find(index)
        return source.read(number)

    def read_captions(self, index: int) -> tuple[str, ...]:
        """Raises: BadSample."""
        source, number = self.find(index)
        return source.read_captions(number)

    def find(self, index: int) -> tuple[PairSource, int]:
        """Source of a sample, and its number there."""
        number = int(np.searchsorted(self.ends, index, "right"))
        return self.sources[number], index - (int(self.ends[number - 1]) if number else 0)

    def identity(self) -> list[dict[str, Any]]:
        """What a resumed run must find again, wherever it lies now."""
        return [
            {"pairs": int(s.shard_sizes.sum()), "fingerprint": s.fingerprint(), **about(c)}
            for s, c in zip(self.sources, self.configs, strict=True)
        ]

    def mixture(self, seed: int) -> Mixture:
        return Mixture(
            [source.shard_sizes for source in self.sources], weights=[c.weight for c in self.configs], seed=seed
        )

    def unusable(self) -> Skips:
        """What was found without reading samples: those left out, and damaged shards."""
        found = Skips(skip for source in self.sources for skip in source.damaged)
        found.merge(self.left_out)
        return found

    def describe(self) -> str:
        left_out = f"; left out: {unusable}" if (unusable := self.unusable()) else ""
        return f"{len(self)} pairs{left_out}"

    def require_usable(self, max_share: float) -> None:
        """Raises: ValueError if more is damaged than may be skipped, or not one of the first samples can be read."""
        damaged = [skip for source in self.sources for skip in source.damaged]
        num_shards = sum(source.num_shards for source in self.sources)
        if len(damaged) > max_share * num_shards:
            raise ValueError(
                f"{damaged[0].key} {damaged[0].message}; {len(damaged)} of {num_shards} shards are damaged: copy or write "
                "them again, or raise data.max_skipped to train on what is left"
            )
        num_left_out = self.left_out.counts.total()
        if exceeds(num_left_out, len(self) + num_left_out, max_share):
            first = self.left_out.examples[0]
            raise ValueError(
                f"{num_left_out} of {len(self) + num_left_out} samples cannot be used ({self.left_out}), such as "
                f"{first.key}: {first.message}; raise data.max_skipped to train on the others"
            )
        for source in self.sources:
            probe(source)


def about(config: SourceConfig) -> dict[str, Any]:
    """What a source's options say beyond where it lies."""
    names = ("format", "image_column", "caption_key", "label_key", "weight")
    return {name: getattr(config, name) for name in names}


def probe(source: PairSource) -> None:
    """Raises: BadSample, a wrong key or column in all likelihood, if not one of the first samples can be read."""
    first: BadSample | None = None
    for index in range(min(NUM_PROBES, int(source.shard_sizes.sum()))):
        try:
            source.read(index)
            return
        except BadSample as bad:
            first = first or bad
    assert first is not None
    raise first


def make_pair(key: str, image: bytes, caption: bytes, label: bytes | None, config: SourceConfig) -> Pair:
    """Members of a webdataset sample → Pair. Raises: BadSample."""
    captions = member_captions(key, caption, config)
    if label is None or config.label_key is None:
        return Pair(key, image, captions)
    value = read_member(label, config.label_key, "cls", key, "data.label_key")
    return Pair(key, image, captions, as_label(value, key))


def member_captions(key: str, caption: bytes, config: SourceConfig) -> tuple[str, ...]:
    """Raises: BadSample."""
    return as_captions(read_member(caption, config.caption_key, "txt", key, "data.caption_key"), key)


def read_member(content: bytes, name: str, extension: str, where: str, option: str) -> Any:
    """The text of a member, if the name is its extension, else that key of its json. `option` set the name."""
    kind = option.split(".")[1].removesuffix("_key")
    try:
        if name == extension:
            return content.decode("utf-8")
        values = json.loads(content)
        if isinstance(values, dict) and name in values:
            return values[name]
        held = f"only {sorted(values)[:20]}" if isinstance(values, dict) else f"it is a {type(values).__name__}"
        raise BadSample(where, f"no {kind}", f"its json has no key {name!r}, {held}; see {option}")
    except BadSample:
        raise
    except (ValueError, RecursionError) as error:
        raise BadSample(where, f"unreadable {kind}", f"its {kind} cannot be read ({error})") from error


def as_captions(value: Any, where: str) -> tuple[str, ...]:
    captions = (value,) if isinstance(value, str) else value
    if not isinstance(captions, list | tuple) or not all(isinstance(caption, str) for caption in captions):
        message = f"expected a caption or a list of captions, got {type(value).__name__}"
        raise BadSample(where, "no caption", message)
    captions = tuple(caption.strip()[:MOST_CHARACTERS].strip() for caption in captions if caption.strip())
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:  # half of an emoji, such as a json that was cut by characters can hold
        raise BadSample(where, "unreadable caption", f"its caption cannot be read ({error})") from error
    if not captions:
        raise BadSample(where, "empty caption", "every caption is empty")
    return captions


def as_label(value: Any, where: str) -> int:
    """A class number; −1 for a sample without one."""
    if value is None:
        return UNLABELLED
    if isinstance(value, str | int) and re.fullmatch(r"-1|\d{1,18}", str(value).strip()):
        return int(value)
    raise BadSample(
        where,
        "wrong label",
        f"its label is {value!r}; it must be a class number from 0 on, or null; see data.label_key",
    )


def is_remote(path: str) -> bool:
    return "://" in path or path.startswith("pipe:")


def configured_sources(config: DataConfig) -> list[SourceConfig]:
    """`data` itself and what `data.mix` adds. Raises: ValueError if one names no path."""
    sources = [config, *config.mix]
    for number, source in enumerate(sources):
        if not source.paths:
            name = "data.path" if number == 0 else f"data.mix[{number - 1}].path"
            raise ValueError(f"{name} is empty; set it to a folder of shards, a table or a Hugging Face data set")
    return sources
