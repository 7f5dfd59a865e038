"""Command-line arguments and YAML → the dataclasses of each command, with errors that say what to do."""

import argparse
import dataclasses
import difflib
import functools
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_origin

import jsonargparse
from docstring_parser import parse_from_object

from clipkd.config.objective import ObjectiveConfig
from clipkd.config.shipped import recipe
from clipkd.config.train import TeacherConfig, TrainConfig, to_yaml
from clipkd.config.yaml_file import read_yaml

C = TypeVar("C")

# The docstring under each field is its help.
jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse with errors of one line, which name the nearest known option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split())
        options = {option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")}
        for word in re.findall(r"[\w.]*\w", message):
            if (
                ("accept" in message or "unrecognized" in message)
                and word not in options
                and (near := nearest_option(word, options))
            ):
                message += f"; did you mean {near!r}?"
                break
        # The parser of a nested list has no name of its own.
        command = self.prog if self.prog.startswith("clipkd") else "clipkd"
        self.exit(2, f"{command}: error: {message} (--help lists the options)\n")


def nearest_option(word: str, options: set[str]) -> str | None:
    """The option meant by a mistyped one, which a message may give in full or from its group on."""
    tails = {option.split(".", 1)[1]: option for option in options if "." in option}
    tails |= {option: option for option in options}
    near = difflib.get_close_matches(word, tails, n=1, cutoff=0.75)
    return tails[near[0]] if near else None


def parse(arguments: list[str], command: str = "train") -> TrainConfig:
    """Parse the arguments of `clipkd train`: --config FILE (stackable), then dotted overrides.

    Exits with one line and status 2 if they are wrong; command: the name that the line begins with.
    """
    return parse_into(TrainConfig, arguments, command, "Train a student, with or without a teacher.")


def parse_into(
    kind: type[C], arguments: list[str], command: str, description: str, *, positional: tuple[str, ...] = ()
) -> C:
    """Parse the arguments of one command into its dataclass, whose fields and docstrings are the options and their help.

    positional: fields that are given in order, without their names. A tuple takes one or more words.
    """
    parser = build_parser(kind, command, description, positional)
    arguments = [word for argument in arguments for word in split_config(argument)]
    shows_config = TrainConfig in kind.__mro__ and "--print_config" in arguments
    arguments = [word for word in arguments if not (shows_config and word == "--print_config")]
    for place, (flag, path) in enumerate(itertools.pairwise(arguments), start=1):
        if flag == "--config":
            options = {option.removeprefix("--") for option in parser._option_string_actions}
            try:
                read = read_yaml(find_config(path), kind, functools.partial(nearest_option, options=options))
            except (ValueError, OSError) as error:
                parser.error(str(error))
            # As text, which jsonargparse takes for a file's content.
            arguments[place] = json.dumps(read, ensure_ascii=False)
    namespace = parser.parse_args(spell_out(kind, arguments))
    if idle := getattr(kind, "trains", False) and has_idle_teacher(namespace):
        added = ["--config", str(recipe("losses/gkl"))]
        added += ["--objective.info_nce.weight", "0"] if namespace.data.caption_key is None else []
        namespace = parser.parse_args(spell_out(kind, [*added, *arguments]))
    try:
        values = {name: value for name, value in vars(parser.instantiate(namespace)).items() if name != "config"}
        config = kind(**values | {name: tuple(values[name]) for name in positional if isinstance(values[name], list)})
    except ValueError as error:
        parser.error(f"{error}{' (the recipe gkl was added, as no distillation term is named)' if idle else ''}")
    if shows_config:
        print(to_yaml(config), end="")  # type: ignore[arg-type]
        raise SystemExit(0)
    if idle and os.environ.get("RANK", "0") == "0":
        alone = " without info_nce, which needs captions" if namespace.data.caption_key is None else ""
        print(f"clipkd {command}: no distillation term is named, so the recipe gkl is used{alone}", file=sys.stderr)
    return config


def split_config(argument: str) -> tuple[str, ...]:
    """--config=FILE → --config FILE"""
    return ("--config", argument.removeprefix("--config=")) if argument.startswith("--config=") else (argument,)


def has_idle_teacher(options: jsonargparse.Namespace) -> bool:
    """Whether a teacher is named and no term has a weight that could use it."""
    terms = [options.objective[name] for name, term in ObjectiveConfig().terms().items() if not term.asks.task]
    teacher = TeacherConfig(models=options.teacher.models or (), cache=options.teacher.cache)
    return teacher.given and not any(term.weight for term in terms)


@functools.cache
def build_parser(kind: type, command: str, description: str, positional: tuple[str, ...]) -> Parser:
    """Building takes longer than parsing, and a demo parses some ten times."""
    words = "".join(f" {name.upper()}" for name in positional)
    usage = f"clipkd {command}{words} [--config FILE.yaml …] [--OPTION VALUE …]"
    parser = Parser(prog=f"clipkd {command}", usage=usage, description=description, allow_abbrev=False)
    about = "A recipe (gkl), or a YAML of differences from the defaults; several are stacked."
    parser.add_argument("--config", action="config", help=about)
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    texts = {field.arg_name: field.description for field in parse_from_object(kind).params}
    for name in positional:
        parser.add_argument(name, type=str, help=texts[name], nargs="+" if is_tuple(types[name]) else None)
    parser.add_class_arguments(kind, as_group=False, skip=set(positional))
    for action in parser._actions:  # --config serves all groups of options, and this help shows every option
        if action.help == "Path to a configuration file." or any(
            name.endswith(".help") for name in action.option_strings
        ):
            action.help = argparse.SUPPRESS
    return parser


def spell_out(kind: type, arguments: list[str]) -> list[str]:
    """--max-drop → --max_drop, --quick → --quick true, --task a b → --task [a,b]."""
    fields = {f"--{name}": option for name, option in option_types(kind)}
    spelled: list[str] = []
    rest = [re.sub(r"^--[\w.-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in arguments]
    while rest:
        argument = rest.pop(0)
        spelled.append(argument)
        following = list(itertools.takewhile(lambda word: not word.startswith("--"), rest))
        if fields.get(argument) is bool and following[:1] not in (["true"], ["false"]):
            spelled.append("true")
        elif "tuple" in str(fields.get(argument)) and (
            len(following) > 1 or (following and is_tuple(fields[argument]) and not following[0].startswith("["))
        ):
            numbers = "float" in str(fields[argument])
            spelled.append(f"[{', '.join(following)}]" if numbers else json.dumps(following))
            rest = rest[len(following) :]
    return spelled


def option_types(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every option."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from option_types(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{field.name}", field.type


def is_tuple(kind: Any) -> bool:
    """Whether a field takes nothing but a tuple, so that one word is a tuple of one."""
    return get_origin(kind) is tuple


def find_config(path: str) -> Path:
    """A configuration file, or the recipe of that name. Raises: ValueError if there is none."""
    return Path(path) if Path(path).is_file() else recipe(path)
