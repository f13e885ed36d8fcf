"""Dataclasses as command-line options: a setting is declared once, with its default and its help."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from cadd_min.utils.errors import InputError, shown

T = TypeVar("T")


def whole(text: str) -> int:
    """A whole number on the command line. Raises ValueError where it is none, or beyond 64 bits."""
    number = int(text)
    if abs(number) >= 2**63:
        raise ValueError(f"expected a whole number below 2^63, not {shown(text)}")
    return number


whole.__name__ = "int"  # as argparse calls it


TYPES: dict[str, Callable[[str], Any]] = {"int": whole, "float": float, "str": str, "Temperature": float}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps a script's description as it is written, and says the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        return (action.help or "") + ("" if silent else " (default: %(default)s)")


class Parser(argparse.ArgumentParser):
    """Reads the command line, and keeps a script's description as it is written."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=HelpFormatter)

    def parse_args(self, *args: Any, **more: Any) -> Any:
        """As argparse does; but there `--option=--` may be an empty list, and here it is an error."""
        found = super().parse_args(*args, **more)
        for action in self._actions:
            if action.nargs is None and getattr(found, action.dest, None) == []:
                self.error(f"argument {'/'.join(action.option_strings) or action.dest}: expected one argument")
        return found


def option(default: Any, help: str) -> Any:
    """A dataclass field that is also an option `--its-name`."""
    return dataclasses.field(default=default, metadata={"help": help})


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add an option for each field of `cls` made by `option`."""
    group = parser.add_argument_group(cls.__name__)
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:
            continue
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if field.type == "bool":
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, action=action, default=field.default, help=field.metadata["help"])
        else:
            group.add_argument(flag, type=TYPES[str(field.type)], default=field.default, help=text)


def from_args(cls: type[T], args: argparse.Namespace, **more: Any) -> T:
    """The dataclass with the values parsed for its options."""
    return cls(**options_of(cls, args), **more)


def options_of(cls: type, args: argparse.Namespace) -> dict[str, Any]:
    """The values parsed for its options."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if "help" in f.metadata}


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """The dataclass from saved values. Raises InputError where they are another version's, or of another type."""
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if name in hints and not fits(value, hints[name]):
            raise InputError(f"{where} is damaged: {name} is {shown(repr(value))}")
    try:
        return cls(**values)
    except TypeError as error:
        raise InputError(f"{where} was made by another version of this project: {error}") from None


def fits(value: object, hint: Any) -> bool:
    """Whether a plain value is of this type: int, float, str, bool, None, a dataclass, tuples and unions of these."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        each = parts[:1] * len(value) if Ellipsis in parts and isinstance(value, tuple) else parts
        return isinstance(value, tuple) and len(value) == len(each) and all(map(fits, value, each))
    if parts:
        return any(fits(value, part) for part in parts)
    if hint in (int, float) and type(value) is int:
        return abs(value) < 2**63  # as on the command line
    return hint is not int and isinstance(value, hint)


def set_defaults(parser: argparse.ArgumentParser, values: object, where: str) -> None:
    """Let saved values be the parser's defaults. Raises InputError where one is not what its option takes."""
    if not isinstance(values, dict):
        raise InputError(f"{where} is damaged: its settings are {shown(repr(values))}")
    for action in parser._actions:
        if action.dest not in values:
            continue
        value = values[action.dest]
        kind = {whole: int, float: float}.get(action.type, str) if action.nargs != 0 else bool  # type: ignore[arg-type]
        if not (fits(value, kind) or (value is None and action.default is None)):
            raise InputError(f"{where} is damaged: its setting {action.dest} is {shown(repr(value))}")
        action.default = value
