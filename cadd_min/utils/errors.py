"""The one exception a user of the command line may see, and how the scripts show it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

import torch


class InputError(ValueError):
    """Bad input from outside: one sentence that names the argument and what was expected."""


class Interrupted(Exception):
    """The user asked to stop, and everything worth keeping has been saved."""


def run(main: Callable[[], None]) -> None:
    """Run a script's main: bad input is one line and exit code 2, an interrupt is exit code 130."""
    code, rank = 0, os.environ.get("RANK", "0")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a text, or a file's name, may have what a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:  # the reader of our output, like head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Interrupted, KeyboardInterrupt) as stop:
        if rank == "0":
            print(str(stop) or "interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        said = sentence(error)
        if said is None:
            raise
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in said)  # a path may be so
        which = f" in process {rank}" if rank != "0" else ""  # one of many says which it is
        print(f"error{which}: {line}", file=sys.stderr)
        code = 2
    if "RANK" in os.environ:
        leave(code)
    if code:
        sys.exit(code)


def leave(code: int) -> None:
    """End one of torchrun's processes here and now, without the interpreter's own end.

    destroy_process_group does not end gloo's threads while anything, like FSDP2, holds the group. One that lets go of
    a tensor wants Python's lock; an interpreter that is ending ends that thread instead, and C++ the whole process:
    SIGABRT, "terminate called without an active exception".
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def sentence(error: Exception) -> str | None:
    """What to tell a user of this exception; None of one that is a mistake of ours.

    Files and memory can fail anywhere; where more can be said of it, it is an InputError.
    """
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{shown(error.filename)}: {error.strerror}"
    if is_out_of_memory(error):
        return "out of memory: these settings, or what is in these files, need more than there is"
    return None


def shown(path: object, most: int = 200) -> str:
    """A path in a sentence, cut in the middle if it is very long."""
    text = str(path)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was not enough memory, or could never be: a CPU's allocator has no exception of its own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("allocate memory", "calculation overflowed", "integer multiplication overflow", "cannot be represented")
    return isinstance(error, RuntimeError) and any(part in str(error) for part in words)


def torch_device(name: str) -> torch.device:
    """The device of that name, if there is one here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()  # the meta device has no values
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"--device must be a device of this machine, like cpu or cuda, not {name!r}") from None
    return device


def choose(name: str, value: str, allowed: object) -> str:
    """Return `value` if it is one of `allowed`, else raise an InputError that lists them."""
    names = list(allowed)  # type: ignore[call-overload]
    if value not in names:
        raise InputError(f"{name} must be one of {', '.join(map(str, names))}, not {value!r}")
    return value
