"""Run programs that nobody has read, each in a process that reaches no file, network, process or secret of the machine.

contained.py builds the walls and says which they are; driver.py runs a program and its tests inside. Before the first
program is run, one of ours tries what is forbidden: if any of it succeeds, nothing is run.

It is the machine that is kept safe, not the score: a program shares its process with its tests, so one that knew
driver.py and looked for its key there could lie about itself, as in any such harness.
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

from cadd_min.codebench import sandbox_inside as driver
from cadd_min.codebench import sandbox_walls as contained
from cadd_min.utils.cli import option
from cadd_min.utils.errors import InputError

START = 60.0  # seconds that a process may take to start on a busy machine; not counted as the program's
LONGEST = 4096  # bytes of an answer
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/nix", "/dev/null", "/dev/zero", "/dev/urandom")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": contained.FOLDER, "TMPDIR": contained.FOLDER,
               "PYTHONHASHSEED": "0"}  # fmt: skip
VARIABLES = frozenset(ENVIRONMENT) | {"LC_CTYPE"}  # which Python sets itself
MIB = 1 << 20
UNBOUND = "execution refuses to run anything: a program on this machine could not be kept from "


@dataclass(frozen=True)
class Limits:
    """What one program may take. In all it is the product of memory and processes at most, and the folder."""

    seconds: float = option(10.0, "that one program may run")
    memory: int = option(512, "MiB of addresses, of each of its processes")
    processes: int = option(4, "its processes and threads, itself included")
    folder: int = option(64, "MiB in its folder, which is in memory")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), {"memory": 128, "seconds": 0.01}.get(field.name, 1)
            if not least <= value <= 1e6:
                raise InputError(f"{field.name} must be from {least} to 1,000,000, not {value}")

    def numbers(self) -> dict[str, int]:
        """By the names of `resource`. The init and the guard count, and where it is no root's, the stage."""
        return {
            "RLIMIT_AS": self.memory * MIB,
            "RLIMIT_NPROC": self.processes + (0 if os.getuid() == 0 else 3),
            "RLIMIT_CPU": int(self.seconds) + 2,  # the clock on the wall comes first, but for many processes
            "RLIMIT_FSIZE": self.folder * MIB,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
        }


@dataclass(frozen=True)
class Outcome:
    """How a program ended: passed, wrong (an assertion), error, timeout, or killed: gone without an answer."""

    status: str
    detail: str
    seconds: float


STATUSES = ("passed", "wrong", "error", "timeout", "killed")
Run = Callable[[str, str], Outcome]


@contextlib.contextmanager
def opened(limits: Limits) -> Iterator[Run]:
    """A function run(program, tests) that threads may share. Raises InputError where programs cannot be contained."""
    if not sys.platform.startswith("linux"):
        raise InputError("execution needs Linux: programs are contained by its namespaces, which this system has not")
    with tempfile.TemporaryDirectory(prefix="cadd_min-") as root:

        def run(program: str, tests: str) -> Outcome:
            return contain(program, tests, limits, root)

        probe(run, limits)
        yield run


def readable() -> list[str]:
    """What a program may read: the system's libraries and the Python that runs it."""
    python = os.path.dirname(os.path.realpath(sys.executable))
    paths = [*SYSTEM, os.path.realpath(sys.base_prefix), python]
    paths = [path for path in paths if os.path.lexists(path)]
    return [p for i, p in enumerate(paths) if not any(p == q or p.startswith(q + "/") for q in paths[:i])]


def contain(program: str, tests: str, limits: Limits, root: str) -> Outcome:
    """Run a program and then its tests. `root` is an empty folder. Raises InputError where a wall cannot be built."""
    ours, theirs = socket.socketpair()
    spec = {
        "channel": theirs.fileno(),
        "root": root,
        "python": os.path.realpath(sys.executable),
        "readable": readable(),
        "driver": Path(driver.__file__).read_text(encoding="utf-8"),
        "environment": ENVIRONMENT,
        "namespaces": list(contained.NAMESPACES),
        "limits": limits.numbers(),
        "folder": limits.folder * MIB,
        "alarm": int(START + limits.seconds) + 5,
    }
    stage = subprocess.Popen(
        [sys.executable, "-I", "-S", contained.__file__, json.dumps(spec)],
        env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()], start_new_session=True,
    )  # fmt: skip
    theirs.close()
    with ours:
        try:
            outcome = converse(ours, program, tests, limits.seconds)
            if outcome.status == "passed" and not ends_well(stage):
                return dataclasses.replace(outcome, status="killed", detail="it did not end well, or killed its parent")
            return outcome
        finally:
            end(stage)


def ends_well(stage: subprocess.Popen[bytes]) -> bool:
    """Whether the driver, and all who wait for it, leave as they should. It is no more than an exit away."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return stage.wait(5) == 0
    return False


def end(stage: subprocess.Popen[bytes]) -> None:
    """Kill all that is left, and wait until it is gone: the init of a namespace ends last."""
    stage.send_signal(signal.SIGTERM)
    try:
        stage.wait(5)
    except subprocess.TimeoutExpired:
        stage.kill()
        stage.wait()


def converse(channel: socket.socket, program: str, tests: str, seconds: float) -> Outcome:
    """The side of driver.py's conversation that is ours."""
    said = hear(channel, time.monotonic() + START)
    if said != "ready":
        reason = said.removeprefix("refused ") if said else "its Python does not start there"
        raise InputError(f"execution refuses to run anything: a program cannot be contained on this machine ({reason})")
    start = time.monotonic()
    key, token = secrets.token_hex(16), secrets.token_hex(16)
    try:
        channel.settimeout(seconds)
        for text in (program, tests, key):
            content = text.encode("utf-8", "surrogatepass")
            channel.sendall(f"{len(content)}\n".encode() + content)
        said = hear(channel, start + seconds)
        if said == key:
            channel.sendall(token.encode() + b"\n")
            said = hear(channel, start + seconds)
    except TimeoutError:
        return Outcome("timeout", f"not finished after {seconds:g} seconds", time.monotonic() - start)
    except OSError:  # a broken pipe
        said = ""
    taken = time.monotonic() - start
    if said == token:
        return Outcome("passed", "", taken)
    status, _, detail = said.partition(" ")
    if status in ("wrong", "error"):
        return Outcome(status, detail, taken)
    return Outcome("killed", "ended without an answer", taken)


def hear(channel: socket.socket, until: float) -> str:
    """The next line; "" when all who could say one are gone, or for more than a line. Raises TimeoutError."""
    heard = b""
    while not heard.endswith(b"\n"):
        channel.settimeout(max(until - time.monotonic(), 1e-3))
        block = channel.recv(LONGEST)
        heard += block
        if not block or len(heard) > LONGEST:
            return ""
    return heard[:-1].decode("ascii", "replace")


# What a contained program must not be able to do. Each assertion says of what it could not be kept.
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
    """Raises InputError, which says what a program could not be kept from, if there is anything."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cadd_min-")))
        victim = folder / "victim"
        victim.write_text("untouched")
        folder.chmod(0o777)  # so that no permission stands in its way
        victim.chmod(0o666)
        abstract = f"\0{secrets.token_hex(16)}"
        port = 0
        for family, address in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, abstract)):
            server = stack.enter_context(socket.socket(family))
            server.bind(address)
            server.listen()
            port = port or server.getsockname()[1]
        tried = PROBE.format(
            port=port, abstract=abstract, victim=str(victim), parent=os.getpid(), names=set(VARIABLES),
            processes=limits.processes, memory=limits.memory, folder=limits.folder,
        )  # fmt: skip
        found = run(tried, "")
        if found.status == "wrong":
            raise InputError(UNBOUND + found.detail.removeprefix("AssertionError: "))
        if found.status != "passed" or victim.read_text() != "untouched":
            raise InputError(UNBOUND + f"what its probe tries, which ended otherwise ({found.status}: {found.detail})")
