"""Dataclasses as command-line options, and how a script ends.

A setting is declared once, as a field made by `option`, with its default and its help.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from cadd_min.utils.errors import InputError, Interrupted, sentence, shown

T = TypeVar("T")


def integer(text: str) -> int:
    """Parse a whole number. Raises ValueError for another text, or for a number beyond 64 bits."""
    number = int(text)
    if abs(number) >= 2**63:
        raise ValueError(f"expected a whole number below 2^63, not {shown(text)}")
    return number


integer.__name__ = "int"  # what argparse calls the type in its messages


def expanded(text: str) -> str:
    """Return a path or a name with a leading ~ as the home folder. Raises ArgumentTypeError where there is no home."""
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text} needs a home folder, and there is none: name another path") from None


def as_path(text: str) -> Path:
    """Parse a path. A leading ~ is the home folder. Raises ArgumentTypeError where there is no home folder."""
    return Path(expanded(text))


TYPES: dict[str, Callable[[str], Any]] = {"int": integer, "float": float, "str": str, "Temperature": float}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep a script's description as it is written, add the default of each option that has one, and be brief.

    The usage names only what must be given. An option's value is N, X or PATH where its type says enough.
    """

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)

    def add_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None) -> None:
        if usage is None and actions and all(action.option_strings for action in actions):
            needed = "".join(f" {action.option_strings[-1]} ..." for action in actions if action.required)
            usage = f"%(prog)s{needed} [options]"
        super().add_usage(usage, actions, groups, prefix)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        names: dict[Any, str] = {integer: "N", int: "N", float: "X", as_path: "PATH"}
        return names.get(action.type, action.dest.upper())

    def _get_help_string(self, action: argparse.Action) -> str:
        if any(action.default is value for value in (None, False, argparse.SUPPRESS)):
            return action.help or ""
        default = action.default if isinstance(action.default, list | tuple) else [action.default]
        words = " ".join(map(str, default)).replace("%", "%%")
        return f"{action.help or ''} (default: {words})"


class Parser(argparse.ArgumentParser):
    """Read a command line, and keep a script's description as it is written."""

    def __init__(self, description: str | None, **settings: Any):
        super().__init__(description=description, formatter_class=HelpFormatter, **settings)

    def parse_args(self, *args: Any, **more: Any) -> Any:
        """Parse as argparse does, and refuse `--option=--`, which argparse may read as an empty list."""
        found = super().parse_args(*args, **more)
        self._refuse_empty(found)
        return found

    def _refuse_empty(self, found: argparse.Namespace) -> None:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                action.choices[getattr(found, action.dest)]._refuse_empty(found)
            elif action.nargs is None and getattr(found, action.dest, None) == []:
                self.error(f"argument {'/'.join(action.option_strings) or action.dest}: expected one argument")


def option(default: Any, help: str) -> Any:
    """Declare a dataclass field that is also an option `--its-name`."""
    return dataclasses.field(default=default, metadata={"help": help})


def add_options(parser: argparse.ArgumentParser, cls: type, title: str) -> Any:
    """Add an option for each field of `cls` made by `option`, in a group of that title. Returns the group."""
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:
            continue
        if field.type == "bool":
            kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": TYPES[str(field.type)]}
        group.add_argument(
            "--" + field.name.replace("_", "-"), default=field.default, help=field.metadata["help"], **kind
        )
    return group


def from_args(cls: type[T], args: argparse.Namespace, **more: Any) -> T:
    """Make the dataclass from the values parsed for its options; `more` are its other fields."""
    return cls(**options_of(cls, args), **more)


def options_of(cls: type, args: argparse.Namespace) -> dict[str, Any]:
    """Return the values parsed for the options of a dataclass, by name."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if "help" in f.metadata}


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Make the dataclass from saved values.

    Raises InputError where the values are of another version of this project, or of another type.
    """
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if name in hints and not fits(value, hints[name]):
            raise InputError(f"{where} is damaged: {name} is {shown(repr(value))}")
    try:
        return cls(**values)
    except TypeError as error:
        raise InputError(f"{where} was made by another version of this project: {error}") from None


def fits(value: object, hint: Any) -> bool:
    """Tell whether a plain value has a type: int, float, str, bool, None, a dataclass, tuples and unions of these."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        each = parts[:1] * len(value) if Ellipsis in parts and isinstance(value, tuple) else parts
        return isinstance(value, tuple) and len(value) == len(each) and all(map(fits, value, each))
    if parts:
        return any(fits(value, part) for part in parts)
    if hint in (int, float) and type(value) is int:
        return abs(value) < 2**63  # the bound of the command line
    return hint is not int and isinstance(value, hint)


def set_defaults(parser: argparse.ArgumentParser, values: object, where: str) -> None:
    """Make saved values the parser's defaults. Raises InputError for a value that its option does not take."""
    if not isinstance(values, dict):
        raise InputError(f"{where} is damaged: its settings are {shown(repr(values))}")
    for action in parser._actions:
        if action.dest not in values:
            continue
        value = values[action.dest]
        kind = {integer: int, float: float}.get(action.type, str) if action.nargs != 0 else bool  # type: ignore[arg-type]
        if not (fits(value, kind) or (value is None and action.default is None)):
            raise InputError(f"{where} is damaged: its setting {action.dest} is {shown(repr(value))}")
        action.default = value


def run(main: Callable[[], None]) -> None:
    """Run a script's main. Bad input is one line and exit code 2, an interrupt is exit code 130."""
    code, rank = 0, os.environ.get("RANK", "0")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a text or a file's name may have what a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:  # the reader of this output, like head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Interrupted, KeyboardInterrupt) as stop:
        if rank == "0":
            print(str(stop) or "interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        text = sentence(error)
        if text is None:
            raise
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        which = f" in process {rank}" if rank != "0" else ""
        for bar in list(getattr(tqdm, "_instances", ())):  # a bar that a loop left open has no end of line
            bar.close()
        print(f"error{which}: {line}", file=sys.stderr)
        code = 2
    if "RANK" in os.environ:
        leave(code)
    if code:
        sys.exit(code)


def leave(code: int) -> None:
    """End a process that torchrun has started at once, without the interpreter's own end.

    destroy_process_group leaves gloo's threads running while FSDP2 holds the group. Such a thread needs Python's lock
    to free a tensor. An interpreter that is ending ends the thread instead, and C++ then aborts the process: SIGABRT,
    "terminate called without an active exception".
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
