"""The walls of the sandbox: make a process that can touch nothing outside, and start sandbox_inside.py in it.

sandbox.py runs this file once for every program, so it imports few modules, all of the standard library. There are four
processes, each the parent of the next:

stage   has left the machine's namespaces of mounts, processes, network and IPC
init    is process 1 of the new namespaces: when it ends, the kernel kills all processes in them
guard   dies if the program kills its parent, and the init reports that
driver  has lost every privilege, and runs the program (sandbox_inside.py)
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
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x8000000, 1 << 28, 1 << 29, 1 << 30
NAMESPACES = {"mounts": CLONE_NEWNS, "processes": CLONE_NEWPID, "network": CLONE_NEWNET, "ipc": CLONE_NEWIPC}
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
FOLDER = "/box"  # the program's own folder, a file system in memory that vanishes with the program
CHANNEL = 3


def call(name: str, *arguments: Any) -> None:
    """Call a function of the C library. Raises OSError where it does not return 0."""
    if getattr(LIBC, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Mount a file system, or change a mount. Raises OSError."""
    call("mount", *(os.fsencode(text) for text in (source, target, kind)), ctypes.c_ulong(flags), data.encode())


def enter(namespaces: int) -> None:
    """Leave the machine's namespaces. Without the privilege to do so, first enter a user namespace that grants it."""
    if LIBC.unshare(namespaces) == 0:
        return
    ids = {"uid_map": os.getuid(), "gid_map": os.getgid()}
    call("unshare", CLONE_NEWUSER | namespaces)
    _write("/proc/self/setgroups", "deny")
    for name, own in ids.items():
        _write(f"/proc/self/{name}", f"1000 {own} 1")  # as a user other than 0, exec drops every capability


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def build(root: str, readable: list[str], uid: int, size: int) -> None:
    """Change the root to a new file system: the paths `readable`, read-only, and FOLDER with `size` bytes for `uid`.

    There is no /proc in it. `root` is an empty folder to build it in.
    """
    mount("", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in readable:
        target = root + path
        is_folder = os.path.isdir(path) and not os.path.islink(path)
        os.makedirs(target if is_folder else os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if not os.path.isdir(path):
            open(target, "w").close()
        mount(path, target, "", MS_BIND | MS_REC)
    os.mkdir(root + FOLDER)
    with open("/proc/self/mountinfo", "rb") as lines:  # a space in a path is \040 there
        points = [os.fsdecode(line.split()[4].decode("unicode_escape").encode("latin-1")) for line in lines]
    for point in points:  # mounts inside `readable` too; a user namespace must not take away their flags
        if point == root or point.startswith(root + "/"):
            kept = os.statvfs(point).f_flag & (MS_NODEV | MS_NOEXEC)
            mount("", point, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept)
    options = f"size={size},nr_inodes=4096,mode=700,uid={uid},gid={uid}"
    mount("tmpfs", root + FOLDER, "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chroot(root)  # after chroot the kernel refuses new user namespaces
    os.chdir(FOLDER)


# System calls that no test needs, by their numbers on x86-64 and ARM64. They give memory that no limit counts, or the
# keys of the user that started the sandbox, or they have had many security holes.
FORBIDDEN = {
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "ptrace": (101, 117), "bpf": (321, 280),
    "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of FORBIDDEN, the kernel's code


def forbid() -> None:
    """Make the FORBIDDEN system calls fail from here on (seccomp).

    A process that makes calls by another architecture's numbers is killed. On an unknown architecture this kills every
    process, and the probe reports that.
    """
    column, machine = MACHINES.get(os.uname().machine, (0, 0))
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # instructions of BPF
    refuse, allow, kill = 0x00050001, 0x7FFF0000, 0x80000000
    instructions = [(load, 0, 0, 4), (equal, 1, 0, machine), (answer, 0, 0, kill), (load, 0, 0, 0)]
    for test, number in ((at_least, 0x40000000), *((equal, numbers[column]) for numbers in FORBIDDEN.values())):
        instructions += [(test, 0, 1, number), (answer, 0, 0, refuse)]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in [*instructions, (answer, 0, 0, allow)])
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(2), program, *map(ctypes.c_ulong, (0, 0)))


def confine(limits: dict[str, int], uid: int) -> None:
    """Become the unprivileged user `uid` where this is root, forbid new privileges, and set the limits."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    call("prctl", PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    forbid()
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, name), (most, most))


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    call("prctl", PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def follow(child: int) -> NoReturn:
    """Wait for the child, and exit with 0 only if it did."""
    os._exit(0 if os.waitpid(child, 0)[1] == 0 else 1)


def run(spec: dict[str, Any]) -> None:
    """Build the walls and run the driver inside them. No process returns from here.

    Raises OSError where this machine does not allow a wall.
    """
    die_with_parent()
    signal.alarm(spec["alarm"])  # in case the process that started this one hangs or is gone
    _write("/proc/self/oom_score_adj", "1000")
    python, driver, environment = spec["python"], spec["driver"], spec["environment"]
    own = 61184 + os.getpid() % 4336  # for root: an unused user id, so that RLIMIT_NPROC counts only its processes
    enter(sum(NAMESPACES[name] for name in spec["namespaces"]))
    uid = own if os.getuid() == 0 else os.getuid()
    child = os.fork()
    if child:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        os.close(spec["channel"])
        follow(child)
    die_with_parent()
    os.setsid()  # kill(0, ...) reaches the whole process group, even in other namespaces
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
    """Run the program that the first argument describes as JSON. Send down its channel why a wall was refused."""
    spec = json.loads(sys.argv[1])
    try:
        run(spec)
    except OSError as error:
        os.write(spec["channel"], f"refused {error.strerror or error}\n".encode())
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
