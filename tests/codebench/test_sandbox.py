"""Hostile programs in the sandbox. Each is harmless without it: bounded, and aimed only at objects of the test."""

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from cadd_min.codebench import sandbox
from cadd_min.codebench import sandbox_walls as contained
from cadd_min.codebench.sandbox import Limits
from cadd_min.utils.errors import InputError

LIMITS = Limits(seconds=2, memory=256, processes=6, folder=16)
MARK = f"/{uuid.uuid4().hex}"  # in the environment of every contained process: `left_over` finds them by it


@pytest.fixture(scope="module")
def runs():
    """Open a sandbox of two seconds, for programs that do not end by themselves, and a sandbox of five minutes."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setitem(sandbox.ENVIRONMENT, "PATH", MARK)
        try:
            patient = dataclasses.replace(LIMITS, seconds=300)
            yield [stack.enter_context(sandbox.opened(limits)) for limits in (LIMITS, patient)]
        except InputError as refused:  # skip where this machine lacks a wall; a leaking wall fails the tests
            if "cannot be contained on this machine" not in str(refused):
                raise
            pytest.skip(str(refused))


@pytest.fixture
def run(runs):
    return runs[0]


@pytest.fixture
def patient(runs):
    return runs[1]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Make the targets of the programs: a file, a folder, a process and a server."""
    folder = tmp_path_factory.mktemp("victims")
    (folder / "file").write_text("untouched")
    for path in (folder, *folder.parents[:2]):
        path.chmod(0o777)  # the walls must protect it, not the permissions
    (folder / "file").chmod(0o666)
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {"file": str(folder / "file"), "folder": str(folder), "pid": victim.pid, "port": server.getsockname()[1]}
    assert victim.poll() is None
    victim.kill()
    victim.wait()


def left_over() -> list[str]:
    """List the ids of contained processes that still run."""
    ids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if MARK.encode() in path.read_bytes():
                ids.append(path.parent.name)
    return ids


HOSTILE = {
    "fork bomb": "for _ in range(200):\n    if not os.fork():\n        time.sleep(600)\n        os._exit(0)",
    "doubling fork bomb": "for _ in range(7):\n    with suppress(OSError):\n        os.fork()\ntime.sleep(600)",
    "threads": "for _ in range(200):\n    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
    "endless loop": "end = time.time() + 600\nwhile time.time() < end: pass",
    "sleep": "time.sleep(600)",
    "deaf to signals": "for s in {*range(1, 65)} - {9, 19, 32, 33}: signal.signal(s, signal.SIG_IGN)\ntime.sleep(600)",
    "leaves its session": "if not os.fork():\n    os.setsid()\n    if not os.fork(): time.sleep(600)\nos._exit(0)",
    "endless output": "end = time.time() + 600\nwhile time.time() < end: [os.write(n, bytes(65536)) for n in (1, 2)]",
    "endless output everywhere": "os.dup2(3, 1)\nfor _ in range(10**4): os.write(1, b'x' * 65536)",
    "huge allocation": "bytearray(1 << 30)",
    "growing list": "found = []\nfor _ in range(200): found.append(bytearray(b'x' * (10 << 20)))",
    "huge map": "m = mmap.mmap(-1, 1 << 30)",
    "families that grow": "for _ in range(3): os.fork()\nfound = [bytearray(b'x' * (10 << 20)) for _ in range(50)]",
    "memory without addresses": "for _ in range(9): os.write(os.memfd_create('m'), bytes(1 << 20))",
    "memory of all": "if ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) < 0: raise OSError('no')",
    "deep recursion": "sys.setrecursionlimit(10**6)\ndef f(n): return n and f(n - 1) + 1\nf(10**6-9)\ntime.sleep(600)",
    "huge file": "with open('f', 'wb') as f:\n    for _ in range(64): f.write(bytes(1 << 20))",
    "hole of a file": "os.truncate(os.open('f', os.O_CREAT | os.O_RDWR), 1 << 30)",
    "many files": "for i in range(10**4): open(f'f{i}', 'w').close()",
    "many descriptors": "found = [os.dup(1) for _ in range(10**4)]",
    "deletes a file": "os.remove(FILE)",
    "deletes a folder": "shutil.rmtree(FOLDER)",
    "overwrites a file": "open(FILE, 'w').write('gone')",
    "writes through a link": "os.symlink(FILE, 'link')\nopen('link', 'w').write('gone')",
    "renames a folder": "os.rename(FOLDER, FOLDER + '-gone')",
    "reads a file": "open(FILE).read()",
    "reads users": "open('/etc/passwd').read()",
    "changes its Python": "open(os.__file__, 'a').write('')",
    "reads the environment": "os.environ['CADD_MIN_SECRET']",
    "reads its own from proc": "open('/proc/self/environ').read()",
    "reads its parent's": "open(f'/proc/{os.getppid()}/environ').read()",
    "kills its parent": "os.kill(os.getppid(), 9)",
    "terminates its parent": "os.kill(os.getppid(), 15)",
    "kills its group": "os.kill(0, 9)",
    "kills another process": "os.kill(PID, 9)",
    "stops itself": "os.kill(os.getpid(), 19)\ntime.sleep(600)",
    "reads standard input": "input()",
    "opens a connection": "socket.create_connection(('127.0.0.1', PORT), timeout=5)",
    "asks the network": "socket.create_connection(('192.0.2.1', 80), timeout=5)",
    "becomes root": "os.setuid(0)",
    "leaves its root": "os.chroot('..')",
    "makes a namespace": "if ctypes.CDLL(None).unshare(1 << 28): raise OSError('no')",
    "mounts": "if ctypes.CDLL(None).mount(b'', b'/box', b'tmpfs', 0, b''): raise OSError('no')",
    "makes a device": "os.mknod('disk', 0o60600, os.makedev(254, 0))",
    "raises its limits": "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "raises its priority": "os.nice(-5)",
}
FORGING = {
    "exits well": "sys.exit(0)",
    "exits at once": "os._exit(0)",
    "exits from the function": "def f(x): sys.exit(0)",
    "leaves from the function": "def f(x): os._exit(0)",
    "prints success": "print('passed\\nran\\nok')\nos._exit(0)",
    "says success everywhere": "for n in range(64):\n  with suppress(OSError): os.write(n, b'passed\\n')\nos._exit(0)",
    "speaks the driver's words": "os.write(3, b'ran\\n')\nos.write(3, os.read(3, 64))\nos._exit(0)",
    "gives back what it hears": """os.set_blocking(3, False)
for _ in range(9):
    with suppress(OSError): os.write(3, os.read(3, 64))""",
    "closes the channel": "os.closerange(0, 64)",
    "replaces the channel": "os.dup2(os.open('f', os.O_CREAT | os.O_RDWR), 3)",
    "leaves it to a child": "if os.fork(): os._exit(0)",
    "lets a child speak": "if os.fork(): time.sleep(600)\ndef f(x): return x + 1",
    "breaks the builtins": "import builtins\nbuiltins.compile = lambda *a, **k: (lambda: 0).__code__",
    "breaks the system": "os.write = os.read = lambda *a: b''\nos._exit = os.getpid = lambda *a: None",
    "breaks the exceptions": "import builtins\nbuiltins.BaseException = builtins.AssertionError = KeyError",
    "swallows assertions": "sys.excepthook = lambda *a: os._exit(0)",
    "exits at the end": "import atexit\natexit.register(os._exit, 0)",
    "is no module": "sys.modules['program'] = None",
    "puts off its tests": "sys.settrace(lambda *a: os._exit(0))\ndef f(x): return 0",
    "cannot be said": "class E(Exception):\n    def __str__(self): raise self\nraise E",
    "says too much": "raise ValueError('x' * 10**7)",
    "is not text": "raise ValueError('\\udcff\\n\\0passed')",
    "is no program": "def f(x:",
}
IMPORTS = (
    "import ctypes, mmap, os, resource, shutil, signal, socket, sys, threading, time\nfrom contextlib import suppress\n"
)


@pytest.mark.parametrize("name", [*HOSTILE, *FORGING])
def test_hostile_programs_are_contained_and_fail(name, run, names, monkeypatch):
    """Check that each program ends, leaves no process, and reaches none of its targets.

    Programs that do not end by themselves run for ten minutes. A tenth of it means that the limit is not held.

    A right solution follows the hostile code, so only the hostile code can fail. Forging programs must fail without it.
    """
    monkeypatch.setenv("CADD_MIN_SECRET", "a secret")
    constants = "".join(f"{name.upper()} = {value!r}\n" for name, value in names.items())
    right = "\ndef f(x): return x + 1\n" if name in HOSTILE else "\n"
    start = time.monotonic()
    outcome = run(f"{IMPORTS}{constants}{(HOSTILE | FORGING)[name]}{right}", "assert f(1) == 2")
    assert outcome.status in ("wrong", "error", "timeout", "killed"), outcome
    assert time.monotonic() - start < 60
    assert left_over() == []
    assert Path(names["file"]).read_text() == "untouched" and os.listdir(names["folder"]) == ["file"]
    os.kill(names["pid"], 0)


def test_what_went_wrong_is_told(run, patient):
    cases = {
        "def f(x): return x + 1": ("passed", ""),
        "def f(x): return x": ("wrong", "AssertionError: not 2"),
        "def f(x): return y": ("error", "NameError: name 'y' is not defined"),
        "def f(x): return x + (": ("error", "SyntaxError"),
        "while True: pass": ("timeout", "not finished after 2 seconds"),
        "import os\nos._exit(3)": ("killed", "ended without an answer"),
        "import os\nos.kill(os.getpid(), 9)": ("killed", "ended without an answer"),
    }
    for program, (status, detail) in cases.items():
        outcome = (run if status == "timeout" else patient)(program, "assert f(1) == 2, 'not 2'")
        assert (outcome.status, detail in outcome.detail) == (status, True), outcome


def test_what_programs_need_works(patient):
    """Check that the walls leave what solutions and tests need.

    That is dataclasses, pickles, threads, a child process, files, and a hash with a fixed seed.
    """
    program = """
from __future__ import annotations
import dataclasses, os, pathlib, pickle, random, subprocess, sys, tempfile, threading
@dataclasses.dataclass
class Node:
    value: int
def f(x):
    done = []
    thread = threading.Thread(target=done.append, args=(pickle.loads(pickle.dumps(Node(x))).value,))
    thread.start()
    thread.join()
    pathlib.Path("note").write_text("kept")
    with tempfile.TemporaryFile() as file:
        file.write(b"x")
    child = subprocess.run([sys.executable, "-S", "-c", "print(1)"], capture_output=True, text=True)
    print("seen by nobody")
    return done[0] + int(child.stdout)
"""
    assert patient(program, "assert f(1) == 2 and hash('a') == hash('a') and __name__ != '__main__'").status == "passed"
    texts = {patient("raise ValueError(hash('a'))", "").detail for _ in range(2)}
    assert len(texts) == 1  # sets of strings have one order, so a program passes always or never


def test_nothing_stays_from_one_program_to_the_next(patient):
    assert patient("open('note', 'w').close()", "").status == "passed"
    assert patient("import os", "assert os.listdir('.') == []").status == "passed"


def test_what_may_be_read_may_not_be_written(patient, names, monkeypatch):
    """Check that writing fails even where the file's permissions allow it."""
    paths = [*sandbox.readable(), names["folder"]]
    monkeypatch.setattr(sandbox, "readable", lambda: paths)
    assert patient(f"assert open({names['file']!r}).read() == 'untouched'", "").status == "passed"
    for action in ("open(FILE, 'a')", "os.remove(FILE)", "os.mkdir(FILE + '.new')", "os.chmod(FILE, 0)"):
        outcome = patient(f"import os\nFILE = {names['file']!r}\n{action}", "")
        assert outcome.status == "error" and "Read-only file system" in outcome.detail, outcome


@pytest.mark.parametrize(
    "without, leak",
    [
        ("network", "the network"),
        ("processes", "seeing other processes"),
        ("files", "reading your files"),
        ("RLIMIT_NPROC", "starting more processes than it may"),
        ("RLIMIT_AS", "taking more memory than it may"),
        ("environment", "reading your environment"),
    ],
)
def test_without_a_wall_nothing_is_run(without, leak, run, monkeypatch):
    """Take away one wall: the probe must find the leak and name it before any program runs."""
    if without == "environment":
        monkeypatch.setitem(sandbox.ENVIRONMENT, "CADD_MIN_SECRET", "a secret")
    elif without.startswith("RLIMIT"):
        numbers = Limits.numbers
        monkeypatch.setattr(Limits, "numbers", lambda self: {k: v for k, v in numbers(self).items() if k != without})
    elif without == "files":
        paths = [*sandbox.readable(), tempfile.gettempdir()]
        monkeypatch.setattr(sandbox, "readable", lambda: paths)
    else:
        monkeypatch.delitem(contained.NAMESPACES, without)
    with pytest.raises(InputError, match=f"could not be kept from {leak}"), sandbox.opened(LIMITS):
        pytest.fail("opened")


def test_a_machine_that_cannot_contain_is_told_so(monkeypatch):
    monkeypatch.setitem(contained.NAMESPACES, "mounts", 0)
    monkeypatch.setattr(sandbox, "readable", lambda: ["/dev/null"])  # no Python can start there
    with pytest.raises(InputError, match=r"cannot be contained on this machine \(.+\)"), sandbox.opened(LIMITS):
        pytest.fail("opened")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError, match="execution needs Linux"), sandbox.opened(LIMITS):
        pytest.fail("opened")


def test_a_killed_evaluation_leaves_no_program_behind(run):
    """Kill the evaluating process by SIGKILL: the programs that it started must die with it."""
    code = (
        "from cadd_min.codebench import sandbox\n"
        f"sandbox.ENVIRONMENT['PATH'] = {MARK!r}\n"
        "with sandbox.opened(sandbox.Limits(seconds=600)) as run:\n"
        "    print('opened', flush=True)\n"
        "    run('import time; time.sleep(600)', '')\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"opened\n"
        end = time.monotonic() + 300
        while not left_over() and time.monotonic() < end:
            time.sleep(0.05)
        assert left_over()
        parent.kill()
    while left_over() and time.monotonic() < end:
        time.sleep(0.05)
    assert left_over() == []


@pytest.mark.parametrize("name, value", [("seconds", 0), ("memory", 1), ("processes", 0), ("folder", 10**9)])
def test_limits_out_of_range(name, value):
    with pytest.raises(InputError, match=f"{name} must be from"):
        Limits(**{name: value})
