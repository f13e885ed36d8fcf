"""Run untrusted programs, each in a process that reaches no file, network, process or secret of the machine.

sandbox_walls.py builds the walls and lists them. sandbox_inside.py runs a program and its tests inside. Before the
first program is run, a probe tries everything that is forbidden. If any of it succeeds, nothing is run.

The sandbox protects the machine, not the score. A program shares its process with its tests. A program that knows
sandbox_inside.py and searches for the key there can report a false success, as in any such harness.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cadd_min.codebench import sandbox_inside, sandbox_walls
from cadd_min.utils.cli import option
from cadd_min.utils.errors import InputError

START = 60.0  # seconds that a sandbox may take to start on a busy machine; not part of the program's time
LONGEST = 4096  # bytes of an answer
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/nix", "/dev/null", "/dev/zero", "/dev/urandom")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": sandbox_walls.FOLDER, "TMPDIR": sandbox_walls.FOLDER,
               "PYTHONHASHSEED": "0"}  # fmt: skip
VARIABLES = frozenset(ENVIRONMENT) | {"LC_CTYPE"}  # Python sets LC_CTYPE itself
MIB = 1 << 20
UNBOUND = "execution refuses to run anything: a program on this machine could not be kept from "


@dataclass(frozen=True)
class Limits:
    """The limits of one program. It takes at most memory times processes, and the folder's memory."""

    seconds: float = option(10.0, "seconds that one program may run")
    memory: int = option(512, "MiB of address space of each of its processes")
    processes: int = option(4, "its processes and threads, itself included")
    folder: int = option(64, "MiB in its folder, which is in memory")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), {"memory": 128, "seconds": 0.01}.get(field.name, 1)
            if not least <= value <= 1e6:
                raise InputError(f"{field.name} must be from {least} to 1,000,000, not {value}")

    def numbers(self) -> dict[str, int]:
        """Return the limits by the names of the module `resource`.

        Without root the processes run under the user's own id, so the stage, the init and the guard count too.
        """
        return {
            "RLIMIT_AS": self.memory * MIB,
            "RLIMIT_NPROC": self.processes + (0 if os.getuid() == 0 else 3),
            "RLIMIT_CPU": int(self.seconds) + 2,  # the wall clock comes first, unless there are many threads
            "RLIMIT_FSIZE": self.folder * MIB,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
        }


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    status: str  # of STATUSES
    detail: str  # the message of the exception, or what happened
    seconds: float


STATUSES = ("passed", "wrong", "error", "timeout", "killed")  # wrong: an assertion failed; killed: gave no answer
Run = Callable[[str, str], Outcome]


@contextlib.contextmanager
def opened(limits: Limits) -> Iterator[Run]:
    """Give a function run(program, tests) that threads may share.

    Raises InputError where this machine cannot contain programs.
    """
    if not sys.platform.startswith("linux"):
        raise InputError("execution needs Linux: programs are contained by its namespaces, which this system has not")
    with tempfile.TemporaryDirectory(prefix="cadd_min-") as root:

        def run(program: str, tests: str) -> Outcome:
            """Run a program and its tests in a sandbox of its own."""
            return contain(program, tests, limits, root)

        probe(run, limits)
        yield run


def readable() -> list[str]:
    """List the paths that a program may read: the system's libraries and the Python that runs it."""
    python = os.path.dirname(os.path.realpath(sys.executable))
    paths = [*SYSTEM, os.path.realpath(sys.base_prefix), python]
    paths = [path for path in paths if os.path.lexists(path)]
    return [p for i, p in enumerate(paths) if not any(p == q or p.startswith(q + "/") for q in paths[:i])]


def contain(program: str, tests: str, limits: Limits, root: str) -> Outcome:
    """Run a program and then its tests in a new sandbox. Raises InputError where a wall cannot be built.

    root: an empty folder, in which the sandbox mounts its own root.
    """
    own_end, other_end = socket.socketpair()
    spec = {
        "channel": other_end.fileno(),
        "root": root,
        "python": os.path.realpath(sys.executable),
        "readable": readable(),
        "driver": Path(sandbox_inside.__file__).read_text(encoding="utf-8"),
        "environment": ENVIRONMENT,
        "namespaces": list(sandbox_walls.NAMESPACES),
        "limits": limits.numbers(),
        "folder": limits.folder * MIB,
        "alarm": int(START + limits.seconds) + 5,
    }
    stage = subprocess.Popen(
        [sys.executable, "-I", "-S", sandbox_walls.__file__, json.dumps(spec)],
        env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        pass_fds=[other_end.fileno()], start_new_session=True,
    )  # fmt: skip
    other_end.close()
    with own_end:
        try:
            outcome = converse(own_end, program, tests, limits.seconds)
            if outcome.status == "passed" and not ends_well(stage):
                return dataclasses.replace(outcome, status="killed", detail="it did not end well, or killed its parent")
            return outcome
        finally:
            end(stage)


def ends_well(stage: subprocess.Popen[bytes]) -> bool:
    """Tell whether the stage exits with 0 within 5 seconds: it does only if the driver and the guard did."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return stage.wait(5) == 0
    return False


def end(stage: subprocess.Popen[bytes]) -> None:
    """Kill all processes of a sandbox and wait until they are gone: the init of a namespace ends last."""
    stage.send_signal(signal.SIGTERM)
    try:
        stage.wait(5)
    except subprocess.TimeoutExpired:
        stage.kill()
        stage.wait()


def converse(channel: socket.socket, program: str, tests: str, seconds: float) -> Outcome:
    """Send a program and its tests to sandbox_inside.py, which defines the conversation. Returns how it ended.

    Raises InputError where the sandbox could not be built.
    """
    answer = hear(channel, time.monotonic() + START)
    if answer != "ready":
        reason = answer.removeprefix("refused ") if answer else "its Python does not start there"
        raise InputError(f"execution refuses to run anything: a program cannot be contained on this machine ({reason})")
    start = time.monotonic()
    key, token = secrets.token_hex(16), secrets.token_hex(16)
    try:
        channel.settimeout(seconds)
        for text in (program, tests, key):
            content = text.encode("utf-8", "surrogatepass")
            channel.sendall(f"{len(content)}\n".encode() + content)
        answer = hear(channel, start + seconds)
        if answer == key:
            channel.sendall(token.encode() + b"\n")
            answer = hear(channel, start + seconds)
    except TimeoutError:
        return Outcome("timeout", f"not finished after {seconds:g} seconds", time.monotonic() - start)
    except OSError:  # a broken pipe
        answer = ""
    taken = time.monotonic() - start
    if answer == token:
        return Outcome("passed", "", taken)
    status, _, detail = answer.partition(" ")
    if status in ("wrong", "error"):
        return Outcome(status, detail, taken)
    return Outcome("killed", "ended without an answer", taken)


def hear(channel: socket.socket, until: float) -> str:
    """Receive the next line, up to the time `until` of time.monotonic.

    Returns "" where the other end is closed, or where the line is longer than LONGEST. Raises TimeoutError.
    """
    received = b""
    while not received.endswith(b"\n"):
        channel.settimeout(max(until - time.monotonic(), 1e-3))
        block = channel.recv(LONGEST)
        received += block
        if not block or len(received) > LONGEST:
            return ""
    return received[:-1].decode("ascii", "replace")


# What a contained program must not be able to do. The message of an assertion completes UNBOUND.
PROBE = """
import os, resource, socket, time

def fails(action, *arguments):
    try:
        action(*arguments)
    except (OSError, MemoryError):
        return True
    return False

def reach(family, address):
    with socket.socket(family) as s:
        s.settimeout(2)
        s.connect(address)

def crowd():
    children = []
    try:
        for _ in range({processes} + 8):
            children.append(os.fork())
            if not children[-1]:
                time.sleep(60)
    finally:
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)

def fill():
    with open("full", "wb") as file:
        for _ in range({folder} + 8):
            file.write(bytes(1 << 20))

assert fails(reach, socket.AF_INET, ("127.0.0.1", {port})), "the network"
assert fails(reach, socket.AF_UNIX, {abstract!r}), "the network"
assert fails(open, {victim!r}, "rb"), "reading your files"
for path in ({victim!r}, {victim!r} + ".new", "/new", "/usr/new", os.__file__ + ".new"):
    assert fails(open, path, "ab"), "writing to your files"
assert fails(os.remove, {victim!r}), "deleting your files"
assert not os.path.exists("/proc/self"), "seeing other processes"
assert os.getpid() < 9 and ({parent} < 9 or fails(os.kill, {parent}, 0)), "seeing other processes"
assert set(os.environ) <= {names!r}, "reading your environment"
for escape in (lambda: os.setuid(0), lambda: os.chroot("."), lambda: os.setpriority(os.PRIO_PROCESS, 0, -9)):
    assert fails(escape), "becoming another user"
assert fails(crowd), "starting more processes than it may"
assert fails(bytes, ({memory} + 8) << 20), "taking more memory than it may"
assert fails(os.memfd_create, "memory"), "taking memory that no limit counts"
assert fails(fill), "filling more of a disk than it may"
os.remove("full")
"""


def probe(run: Run, limits: Limits) -> None:
    """Run PROBE, which tries everything that is forbidden. Raises InputError that names what it could do.

    Its targets are a file, a process and two servers, made here.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cadd_min-")))
        victim = folder / "victim"
        victim.write_text("untouched")
        folder.chmod(0o777)  # the walls must hold it back, not the permissions
        victim.chmod(0o666)
        abstract = f"\0{secrets.token_hex(16)}"
        port = 0
        for family, address in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, abstract)):
            server = stack.enter_context(socket.socket(family))
            server.bind(address)
            server.listen()
            port = port or server.getsockname()[1]
        program = PROBE.format(
            port=port, abstract=abstract, victim=str(victim), parent=os.getpid(), names=set(VARIABLES),
            processes=limits.processes, memory=limits.memory, folder=limits.folder,
        )  # fmt: skip
        outcome = run(program, "")
        if outcome.status == "wrong":
            raise InputError(UNBOUND + outcome.detail.removeprefix("AssertionError: "))
        if outcome.status != "passed" or victim.read_text() != "untouched":
            ended = f"{outcome.status}: {outcome.detail}"
            raise InputError(UNBOUND + f"what the probe tries, or the probe did not run to its end ({ended})")
