"""The walls: makes a process that can touch nothing outside, and starts driver.py in it. sandbox.py runs this file.

Four processes, each the parent of the next. The stage has left the machine's namespaces of mounts, processes, network
and IPC. The init is process 1 of the new ones: when it ends the kernel kills all that is left in them, whatever session
it moved to. The guard is there to be killed by a program that kills its parent. The driver has lost every privilege and
runs the program. Only the standard library is imported, and little of it: this runs once for every program.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import Any, NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x8000000, 1 << 28, 1 << 29, 1 << 30
NAMESPACES = {"mounts": CLONE_NEWNS, "processes": CLONE_NEWPID, "network": CLONE_NEWNET, "ipc": CLONE_NEWIPC}
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
FOLDER = "/box"  # the program's own, a file system in memory that ends with it
CHANNEL = 3


def call(name: str, *arguments: Any) -> None:
    """A function of the C library. Raises OSError."""
    if getattr(LIBC, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    call("mount", *(os.fsencode(text) for text in (source, target, kind)), ctypes.c_ulong(flags), data.encode())


def enter(namespaces: int) -> None:
    """Leave the machine's namespaces: as root at once, else inside of a user namespace, in which one may."""
    if LIBC.unshare(namespaces) == 0:
        return
    ids = {"uid_map": os.getuid(), "gid_map": os.getgid()}
    call("unshare", CLONE_NEWUSER | namespaces)
    _write("/proc/self/setgroups", "deny")
    for name, own in ids.items():
        _write(f"/proc/self/{name}", f"1000 {own} 1")  # not 0: executing a file then drops every capability


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def build(root: str, readable: list[str], uid: int, size: int) -> None:
    """Change to a file system that has `readable`, read-only, and the program's FOLDER of `size` bytes; no /proc."""
    mount("", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in readable:
        target = root + path
        os.makedirs(
            target if os.path.isdir(path) and not os.path.islink(path) else os.path.dirname(target), exist_ok=True
        )
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if not os.path.isdir(path):
            open(target, "w").close()
        mount(path, target, "", MS_BIND | MS_REC)
    os.mkdir(root + FOLDER)
    with open("/proc/self/mountinfo", "rb") as lines:  # a space in a path is \\040 there
        points = [os.fsdecode(line.split()[4].decode("unicode_escape").encode("latin-1")) for line in lines]
    for point in points:  # a mount that came with another, too; flags that were set may not be taken away
        if point == root or point.startswith(root + "/"):
            kept = os.statvfs(point).f_flag & (MS_NODEV | MS_NOEXEC)
            mount("", point, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept)
    options = f"size={size},nr_inodes=4096,mode=700,uid={uid},gid={uid}"
    mount("tmpfs", root + FOLDER, "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chroot(root)  # in which no user namespace can be made
    os.chdir(FOLDER)


# System calls that no test needs, by their numbers on x86-64 and ARM64: memory that no limit counts, keys of the user
# that started us, and doors of the kernel that have often been found open.
FORBIDDEN = {
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "ptrace": (101, 117), "bpf": (321, 280),
    "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # a column of it, and the kernel's name


def forbid() -> None:
    """Let the FORBIDDEN calls fail from here on, and end what makes calls by another machine's numbers (seccomp)."""
    column, machine = MACHINES.get(os.uname().machine, (0, 0))  # of an unknown one nothing would run: said by the probe
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    refuse, allow, kill = 0x00050001, 0x7FFF0000, 0x80000000
    steps = [(load, 0, 0, 4), (equal, 1, 0, machine), (answer, 0, 0, kill), (load, 0, 0, 0)]
    for test, number in ((at_least, 0x40000000), *((equal, numbers[column]) for numbers in FORBIDDEN.values())):
        steps += [(test, 0, 1, number), (answer, 0, 0, refuse)]
    code = b"".join(struct.pack("=HBBI", *step) for step in [*steps, (answer, 0, 0, allow)])
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(held))
    call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(2), program, *map(ctypes.c_ulong, (0, 0)))


def confine(limits: dict[str, int], uid: int) -> None:
    """No other user, no privileges to come, and no more than the limits."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    call("prctl", PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    forbid()
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, name), (most, most))


def die_with_parent() -> None:
    call("prctl", PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def follow(child: int) -> NoReturn:
    """Wait for a child, and end well only if it did: who is killed meanwhile ends otherwise."""
    os._exit(0 if os.waitpid(child, 0)[1] == 0 else 1)


def run(spec: dict[str, Any]) -> None:
    """Everything in order; comes back in no process. Raises OSError for what this machine does not let us do."""
    die_with_parent()
    signal.alarm(spec["alarm"])  # should the one who started us be gone
    _write("/proc/self/oom_score_adj", "1000")
    python, driver, environment = spec["python"], spec["driver"], spec["environment"]
    own = 61184 + os.getpid() % 4336  # of root: a user that nobody is, so that its processes can be counted
    enter(sum(NAMESPACES[name] for name in spec["namespaces"]))
    uid = own if os.getuid() == 0 else os.getuid()
    child = os.fork()
    if child:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        os.close(spec["channel"])
        follow(child)
    die_with_parent()
    os.setsid()  # kill(0, ...) reaches the group, in whatever namespace its members are
    if "mounts" in spec["namespaces"]:
        build(spec["root"], spec["readable"], uid, spec["folder"])
    for _ in ("guard", "driver"):
        child = os.fork()
        if child:
            follow(child)
    os.setsid()
    confine(spec["limits"], uid)
    os.dup2(spec["channel"], CHANNEL, inheritable=True)
    os.execve(python, [python, "-s", "-S", "-c", driver], environment)


def main() -> None:
    """Run the program that the first argument describes, as JSON; why it was refused goes down its channel."""
    spec = json.loads(sys.argv[1])
    try:
        run(spec)
    except OSError as error:
        os.write(spec["channel"], f"refused {error.strerror or error}\n".encode())
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
