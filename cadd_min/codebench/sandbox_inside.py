"""The innermost process of the sandbox, the driver: it runs a program and its tests, and reports over a socket.

sandbox_walls.py starts it as `python -c` with this file's text. The socket is file descriptor 3. The driver

1. sends `ready`
2. receives the program, its tests and a key, each after its length
3. sends `wrong ...`, `error ...`, or the key if all tests passed
4. after the key, receives a token and sends it back

The token reaches this process only after the key was sent. A program that searches this process for the key can still
report a false success: see sandbox.py.
"""

from __future__ import annotations

import os
import sys
import types

CHANNEL = 3


def drive() -> None:
    """Run the program and its tests, report the result, and exit.

    All functions are bound before the program runs, so a program that changes `os`, `exec` or `compile` has no effect.
    """
    read, write, leave, execute, getpid, own_pid = os.read, os.write, os._exit, exec, os.getpid, os.getpid()
    write(CHANNEL, b"ready\n")
    with open(CHANNEL, "rb", closefd=False) as received:
        program, tests, key = (
            received.read(int(received.readline())).decode("utf-8", "surrogatepass") for _ in range(3)
        )
    module = types.ModuleType("program")  # dataclasses and pickle look the module up; its name is not __main__
    sys.modules["program"] = module
    try:
        codes = [compile(program, "program", "exec"), compile(tests, "tests", "exec")]
        for code in codes:
            execute(code, module.__dict__)
        answer = key.encode() + b"\n"
    except BaseException as error:  # SystemExit, too
        kind = "wrong" if isinstance(error, AssertionError) else "error"
        text = " ".join(f"{kind} {type(error).__name__}: {error}"[:300].split())
        answer = text.encode("ascii", "backslashreplace") + b"\n"
    if getpid() != own_pid:  # a child that the program forked must not report
        leave(1)
    write(CHANNEL, answer)
    if answer == key.encode() + b"\n":
        write(CHANNEL, read(CHANNEL, 64))
    leave(0)


if __name__ == "__main__":
    drive()
