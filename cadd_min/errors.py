"""The one exception a user of the command line may see, and how the scripts show it."""

from __future__ import annotations

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
    try:
        main()
    except InputError as error:
        rank = os.environ.get("RANK", "0")  # one of many processes says which it is
        print(f"error{f' in process {rank}' if rank != '0' else ''}: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output, like head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Interrupted, KeyboardInterrupt) as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        sys.exit(130)


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
