"""The one exception that a user of the command line sees, and what it says."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch


class InputError(ValueError):
    """Report bad input from outside: one sentence that names the argument and what was expected."""


class Interrupted(Exception):
    """Report that the user asked to stop, and that everything worth keeping is saved."""


def sentence(error: Exception) -> str | None:
    """Word an exception for a user. Returns None for an exception that is a bug of this project.

    Files and memory can fail anywhere, so they have a sentence here. An InputError says more where more is known.
    """
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{shown(error.filename)}: {error.strerror}"
    if is_out_of_memory(error):
        return "out of memory: these settings, or what is in these files, need more than there is"
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or the name of its type where it has no text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def described(error: BaseException) -> str:
    """Return the type and the first line of an exception of another library."""
    return f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__


def reason(error: BaseException) -> str:
    """Return why writing or reading failed: the system's words for an OSError, else the exception's first line."""
    return getattr(error, "strerror", None) or first_line(error)


def shown(path: object, most: int = 200) -> str:
    """Shorten a path, or any other text, to about `most` characters: the middle is left out."""
    text = str(path)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an exception means too little memory. The CPU's allocator raises a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("allocate memory", "calculation overflowed", "integer multiplication overflow", "cannot be represented")
    return isinstance(error, RuntimeError) and any(part in str(error) for part in words)


@contextlib.contextmanager
def ornament(name: str) -> Iterator[None]:
    """Go on where an ornament of a run fails, such as a picture, whatever is raised. One line says what is left out."""
    try:
        yield
    except Exception as error:
        print(f"warning: {name} is left out ({described(error)})", file=sys.stderr)


def choose(name: str, value: str, allowed: object) -> str:
    """Return `value` if it is in `allowed`, else raise an InputError that lists what is allowed."""
    names = list(allowed)  # type: ignore[call-overload]
    if value not in names:
        raise InputError(f"{name} must be one of {', '.join(map(str, names))}, not {value!r}")
    return value
