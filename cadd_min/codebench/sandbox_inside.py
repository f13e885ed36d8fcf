"""The innermost process of the sandbox: runs a program, then its tests, and says over its one socket how that went.

It is started as `python -c` with this file's text (contained.py). The socket is file descriptor 3. It says `ready`,
hears the program, its tests and a key, each with its length before it, and says `wrong ...`, `error ...` or the key. To
the key it is answered with a token, and gives it back: before the tests have run, that is nowhere in this process.
"""

from __future__ import annotations

import os
import sys
import types

CHANNEL = 3


def drive() -> None:
    """Everything is bound before the program runs: what it may do to `os`, `exec` or `compile` changes nothing here."""
    read, write, leave, execute, getpid, me = os.read, os.write, os._exit, exec, os.getpid, os.getpid()
    write(CHANNEL, b"ready\n")
    with open(CHANNEL, "rb", closefd=False) as heard:
        program, tests, key = (heard.read(int(heard.readline())).decode("utf-8", "surrogatepass") for _ in range(3))
    module = types.ModuleType("program")  # a real one: dataclasses and pickle look it up; its name is not __main__
    sys.modules["program"] = module
    try:
        codes = [compile(program, "program", "exec"), compile(tests, "tests", "exec")]
        for code in codes:
            execute(code, module.__dict__)
        said = key.encode() + b"\n"
    except BaseException as error:  # SystemExit, too
        kind = "wrong" if isinstance(error, AssertionError) else "error"
        text = " ".join(f"{kind} {type(error).__name__}: {error}"[:300].split())
        said = text.encode("ascii", "backslashreplace") + b"\n"
    if getpid() != me:  # a process that the program forked has nothing to say
        leave(1)
    write(CHANNEL, said)
    if said == key.encode() + b"\n":
        write(CHANNEL, read(CHANNEL, 64))
    leave(0)


if __name__ == "__main__":
    drive()
