"""Read a YAML file by the types of a dataclass's fields: a word stays as it is written, whatever YAML makes of it."""

import dataclasses
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml

WORDS = {True: ("true", "yes", "on"), False: ("false", "no", "off")}


def read_yaml(path: Path, kind: type, nearest: Callable[[str], str | None]) -> dict[str, Any]:
    """Dotted option → value. nearest: a mistyped option → the one that was meant.

    Raises: ValueError naming the file, and the line of an option that does not exist or has another type.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} holds no options; write lines such as 'steps: 1000'")
    return Reader(path, nearest).section(root, kind)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Converts the nodes of one file."""

    path: Path
    nearest: Callable[[str], str | None]

    def fail(self, node: yaml.Node, message: str) -> NoReturn:
        raise ValueError(f"{self.path}, line {node.start_mark.line + 1}: {message}")

    def section(self, node: yaml.Node, kind: type, prefix: str = "") -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, at, value in self.leaves(node, kind, prefix):
            if name in values:
                self.fail(at, f"{name} stands twice")
            values[name] = value
        return values

    def leaves(self, node: yaml.Node, kind: Any, prefix: str) -> Iterator[tuple[str, yaml.Node, Any]]:
        """Dotted name, node and value of each option of a section; an empty section has none."""
        if is_null(node):
            return
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"{prefix[:-1]} is {written(node)}; its options stand below it, one on each line")
        yaml.constructor.SafeConstructor().flatten_mapping(node)  # <<: *anchor
        kinds = {field.name: field.type for field in dataclasses.fields(kind)}
        for key, value in node.value:
            *sections, name = str(key.value).split(".")
            own = kinds.get((*sections, name)[0])
            for part in (*sections, name)[1:]:  # optim.betas: …
                own = (
                    {f.name: f.type for f in dataclasses.fields(own)}.get(part)
                    if dataclasses.is_dataclass(own)
                    else None
                )
            full = f"{prefix}{key.value}"
            if own is None:
                near = self.nearest(full)
                self.fail(key, f"there is no option {full!r}" + (f" (did you mean {near!r}?)" if near else ""))
            if dataclasses.is_dataclass(own):
                yield from self.leaves(value, own, f"{full}.")
            else:
                yield full, key, self.value(value, own, full)

    def value(self, node: yaml.Node, kind: Any, name: str) -> Any:
        kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        if dataclasses.is_dataclass(kind):  # one of data.mix
            return self.section(node, kind)  # type: ignore[arg-type]
        if is_null(node) and type(None) in kinds:
            return None
        for each in kinds:
            if isinstance(node, yaml.SequenceNode) and get_origin(each) is tuple:
                items = get_args(each)
                items = items[:1] * len(node.value) if items[-1] is Ellipsis else items
                if len(items) == len(node.value):
                    return [self.value(item, own, name) for item, own in zip(node.value, items, strict=True)]
            if isinstance(node, yaml.ScalarNode) and (found := read_scalar(node, each)) is not None:
                return found
        quotes = "; if it is one, write it in quotes" if str in kinds and is_null(node) else ""
        self.fail(node, f"{name} is {written(node)}; it must be {' or '.join(map(describe, kinds))}{quotes}")


def is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def written(node: yaml.Node) -> str:
    """What the file says."""
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a group of options"


def read_scalar(node: yaml.ScalarNode, kind: Any) -> Any:
    """A word, number or truth value as it is written; None if it is none of this kind."""
    text = node.value
    if kind is str:
        return None if is_null(node) else text
    if get_origin(kind) is Literal:
        return text if text in get_args(kind) else None
    if kind is bool:
        return next((value for value, words in WORDS.items() if text.lower() in words), None)
    try:
        number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        return None
    if kind is int:  # steps: 1e5
        return int(text) if text.strip("+-").isdecimal() else int(number) if number.is_integer() else None
    return number if kind is float else None


def describe(kind: Any) -> str:
    names = {str: "a word", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return names.get(kind, f"a list of {len(get_args(kind))}" if Ellipsis not in get_args(kind) else "a list")
