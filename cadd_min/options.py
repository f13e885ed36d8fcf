"""Dataclasses as command-line options: a setting is declared once, with its default and its help."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, TypeVar

from cadd_min.errors import InputError

T = TypeVar("T")
TYPES: dict[str, type] = {"int": int, "float": float, "str": str, "Temperature": float}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps a script's description as it is written, and says the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        return (action.help or "") + ("" if silent else " (default: %(default)s)")


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
    names = [f.name for f in dataclasses.fields(cls) if "help" in f.metadata]  # type: ignore[arg-type]
    return cls(**{name: getattr(args, name) for name in names}, **more)


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """The dataclass from saved values. Raises InputError where they are another version's."""
    try:
        return cls(**values)
    except TypeError as error:
        raise InputError(f"{where} was made by another version of this project: {error}") from None
