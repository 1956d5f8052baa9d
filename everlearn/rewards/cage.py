"""The inside of the sandbox: a program of its own that confines itself, then runs code that nobody has read.

Started by `sandbox.py` as `python -I cage.py STATUS RESULTS` (two descriptors), with a job as JSON on its input; it knows nothing of
everlearn. What confines it (Linux on x86_64 and aarch64):

- namespaces: no network; process ids of its own, under a first process that is ours and whose end is the end of all; every file
  system read-only, an empty /proc, and a small one in memory for its folder, of bounded size and number of files, gone with it;
- Landlock: it reads /usr, /lib and the folders of this Python, writes its folder, and opens nothing else;
- a filter of system calls (seccomp): no sockets, so that no server's socket file can be reached; nothing that changes modes, owners
  or times of files; nothing that looks into other processes, mounts, or makes namespaces;
- no capabilities; limits on each process's memory, processor time, descriptors and size of a file, and on the number of processes.

What isn't: that a file exists, its size, times and owner can be asked for where its path is known; the memory of all processes together is
bounded only as their number times that of one; root's number of processes isn't bounded; caches and timing tell of the machine.

With `strict`, nothing runs unless all is in force. One line on STATUS says that the code starts now, or what is missing; STATUS is closed
before the code starts. Where the line is missing, whatever went wrong was no fault of the code's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import json
import os
import resource
import select
import signal
import struct
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
ANY_NAMESPACE = 0x7E020000
MS_NOSUID, MS_NODEV, MS_PRIVATE = 1 << 1, 1 << 2, 1 << 18
AT_FDCWD, AT_RECURSIVE, MOUNT_SETATTR, MOUNT_ATTR_RDONLY = -100, 0x8000, 442, 1
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
CAPABILITIES_V3 = 0x20080522
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
RIGHTS_OF_ABI = {1: 13, 2: 14, 3: 15, 4: 15}  # how many of the rights on files there are; from 5 on 16
READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom", "/dev/zero")
ID_INSIDE = 1000  # user and group, as the code sees them
ERROR_LENGTH = 500
PROCESSES, FILES, CALLS = "namespaces", "Landlock", "a filter of system calls"

# Numbers of system calls: the kernel's headers asm/unistd_64.h and asm-generic/unistd.h; those from 424 on are the same everywhere.
ARCHITECTURES: dict[str, dict[str, int]] = {
    "x86_64": {
        "audit": 0xC000003E, "clone": 56, "socketpair": 53, "capset": 126,
        "socket": 41, "connect": 42, "bind": 49, "listen": 50, "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240,
        "memfd_create": 319,
        "chmod": 90, "fchmod": 91, "fchmodat": 268, "chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260,
        "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280,
        "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199,
        "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "perf_event_open": 298,
        "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308,
        "add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "userfaultfd": 323,
        "name_to_handle_at": 303, "open_by_handle_at": 304,
    },
    "aarch64": {
        "audit": 0xC00000B7, "clone": 220, "socketpair": 199, "capset": 91,
        "socket": 198, "connect": 203, "bind": 200, "listen": 201, "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180,
        "memfd_create": 279,
        "fchmod": 52, "fchmodat": 53, "fchown": 55, "fchownat": 54, "utimensat": 88,
        "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16,
        "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "perf_event_open": 241,
        "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "unshare": 97, "setns": 268,
        "add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280, "userfaultfd": 282,
        "name_to_handle_at": 264, "open_by_handle_at": 265,
    },
}  # fmt: skip
NOT_REFUSED = ("audit", "clone", "socketpair", "capset")  # wanted for something else, or refused only in part
CLONE3 = 435
REFUSED_EVERYWHERE: dict[str, int] = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "pidfd_getfd": 438, "process_madvise": 440, "memfd_secret": 447,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
    "fchmodat2": 452, "setxattrat": 463, "removexattrat": 466, "open_tree_attr": 467, "file_setattr": 469,
}  # fmt: skip

LINUX = os.uname().sysname == "Linux"
USER, GROUP = os.geteuid(), os.getegid()  # before there is a namespace, in which they have no number yet
libc = ctypes.CDLL(None, use_errno=True)


def system_call(number: int, *arguments: Any) -> int:
    return int(libc.syscall(ctypes.c_long(number), *(ctypes.c_long(one) if isinstance(one, int) else one for one in arguments)))


def isolate(folder: Path | None = None, room: str = "", keep: int | None = None) -> bool:
    """Namespaces of its own; returns in the second process in them. False where the kernel doesn't let us have all of it.

    `folder` becomes a file system in memory with the options `room`. The process that called hands on the end of the first one inside,
    which only waits, and whose end, by whatever cause, the kernel makes the end of all that it and its children started. `keep` is a
    descriptor that the second process alone keeps.
    """
    if not LINUX or libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC) != 0:
        return False
    held = _own_ids() and _own_files(folder, room)
    ended, alive = os.pipe()
    first = os.fork()
    if first:
        os.close(ended)
        _hand_on(first, keep)
    os.close(alive)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if select.select([ended], [], [], 0)[0]:
        os._exit(1)  # the process outside has ended already, and nothing more comes of that
    os.close(ended)
    second = os.fork()
    if second:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # by default, the first process inside takes no signals from the others
        _hand_on(second, keep)
    return held


def _hand_on(child: int, keep: int | None) -> None:
    """Waits for `child`, and ends as it did; orphans that end meanwhile are done with."""
    if keep is not None:
        os.close(keep)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _own_ids() -> bool:
    """Who we are outside is one user inside, without which nobody could own a file there."""
    lines = {"setgroups": "deny", "uid_map": f"{ID_INSIDE} {USER} 1", "gid_map": f"{ID_INSIDE} {GROUP} 1"}
    try:
        for name, line in lines.items():
            Path("/proc/self", name).write_text(line, encoding="ascii")
    except OSError:
        return False
    return True


def _own_files(folder: Path | None, room: str) -> bool:
    """Every file system read-only for us, nothing in /proc, which tells of processes outside, and `folder` a file system of its own."""
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, MS_PRIVATE, 0)
    if system_call(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, len(attributes)) != 0:
        return False
    flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV)
    if libc.mount(b"none", b"/proc", b"tmpfs", flags, b"mode=000,size=4096,nr_inodes=1") != 0:
        return False
    if folder is None:
        return True
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", flags, f"mode=700,{room}".encode()) != 0:
        return False
    os.chdir(folder)
    return True


def restrict_files(folder: Path | None, more: Iterable[str] = ()) -> bool:
    """Landlock: Python, the system's libraries and `more` can be read, `folder` can be written. False where the kernel has none."""
    abi = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1) if LINUX else -1
    if abi < 1:
        return False
    everything = (1 << RIGHTS_OF_ABI.get(abi, 16)) - 1
    attributes = struct.pack("Q", everything)
    rules = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    if rules < 0:
        return False
    allowed = {Path(path): READ_FILE | READ_DIR | EXECUTE for path in (*READABLE, sys.prefix, sys.base_prefix, *more)}
    for path, rights in (allowed if folder is None else {**allowed, folder: everything}).items():
        if not path.exists():
            continue
        at = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights if path.is_dir() else rights & ~READ_DIR, at)
        added = libc.syscall(LANDLOCK_ADD_RULE, rules, 1, rule, 0)
        os.close(at)
        if added != 0:
            return False
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    held = libc.syscall(LANDLOCK_RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return bool(held)


def restrict_calls() -> bool:
    """No capabilities, and no system calls but harmless ones. False where the kernel refuses, or we don't know the processor's numbers."""
    numbers = ARCHITECTURES.get(os.uname().machine)
    if not LINUX or numbers is None or struct.calcsize("P") != 8:
        return False
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)  # what isn't there, or isn't ours, can't be dropped
    header = struct.pack("Ii", CAPABILITIES_V3, 0)
    if system_call(numbers["capset"], header, bytes(24)) != 0:
        return False
    program = ctypes.create_string_buffer(b"".join(_filter(numbers)))
    given = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(program))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return bool(libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), given, 0, 0) == 0)


def _filter(numbers: dict[str, int]) -> Iterable[bytes]:
    """Instructions of classic BPF (linux/filter.h) over a `struct seccomp_data`: number at 0, architecture at 4, arguments from 16 on."""

    def step(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
        return struct.pack("=HBBI", code, then, otherwise, value)

    load, equal, at_least, any_bit, mask, give = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    yield from (step(load, 4), step(equal, numbers["audit"], 1, 0), step(give, kill), step(load, 0))
    yield from (step(at_least, 0x40000000, 0, 1), step(give, refuse))  # x32, the same calls under other numbers
    refused = {name: number for name, number in numbers.items() if name not in NOT_REFUSED} | REFUSED_EVERYWHERE
    for number in refused.values():
        yield from (step(equal, number, 0, 1), step(give, refuse))
    yield from (step(equal, CLONE3, 0, 1), step(give, unknown))  # its flags can't be seen from here; libraries then take clone
    yield from (
        step(equal, numbers["clone"], 0, 4),
        step(load, 16),
        step(any_bit, ANY_NAMESPACE, 0, 1),
        step(give, refuse),
        step(give, allow),
    )
    # asyncio needs pairs of sockets; those of streams can't be connected to anything else
    yield from (step(equal, numbers["socketpair"], 0, 7), step(load, 16), step(equal, 1, 0, 4), step(load, 24))
    yield from (step(mask, 0xFFFFFFFF & ~0x80800), step(equal, 1, 0, 1), step(give, allow), step(give, refuse), step(give, allow))


def limit(job: dict[str, Any]) -> None:
    bounds = {
        resource.RLIMIT_CPU: job["cpu_seconds"],
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_FSIZE: job["output_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: job["processes"],
        resource.RLIMIT_CORE: 0,
    }
    for kind, bound in bounds.items():
        resource.setrlimit(kind, (bound, bound))


def call(namespace: dict[str, Any], function: str, arguments: list[Any]) -> dict[str, Any]:
    try:
        return {"value": json.loads(json.dumps(namespace[function](*arguments), allow_nan=False))}
    except BaseException as error:  # noqa: BLE001 - code that nobody has read may raise anything
        return {"error": said(error)}


def said(error: BaseException) -> str:
    name = type(error).__name__
    try:
        return f"{name}: {error}"[:ERROR_LENGTH]
    except BaseException:  # noqa: BLE001 - an error of that code may not even have a text
        return name[:ERROR_LENGTH]


def run(job: dict[str, Any], results: TextIO) -> int:
    """Runs the source, then the calls; a line for each, written at once, so that what ends the process doesn't take them along."""
    namespace: dict[str, Any] = {"__name__": "__main__" if not job["calls"] else "answer"}
    sys.stdin = io.StringIO(job["stdin"])
    code = 0
    try:
        exec(compile(job["source"], "answer.py", "exec"), namespace)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:  # noqa: BLE001
        traceback.print_exc()
        results.write(json.dumps({"raised": said(error)}) + "\n")
        return 1
    for function, arguments in job["calls"]:
        results.write(json.dumps(call(namespace, function, arguments)) + "\n")
        results.flush()
    return code


def main() -> None:
    status, results_at = int(sys.argv[1]), int(sys.argv[2])
    job = json.loads(sys.stdin.buffer.read())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    folder = Path.cwd()
    if LINUX:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # the trainer's end is ours
    held = [PROCESSES] if isolate(folder, f"size={job['folder_bytes']},nr_inodes={job['files']}", status) else []
    held += [FILES] if restrict_files(folder) else []
    held += [CALLS] if restrict_calls() else []
    missing = [one for one in (PROCESSES, FILES, CALLS) if one not in held]
    runs = not (job["strict"] and missing)
    if runs:
        limit(job)
    os.write(status, json.dumps({"ready": runs, "missing": missing}).encode() + b"\n")
    os.close(status)
    if not runs:
        os._exit(1)
    with os.fdopen(results_at, "w", encoding="utf-8") as results:
        code = run(job, results)
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    os._exit(code & 0xFF)  # threads and handlers of the code that ran have nothing more to say


if __name__ == "__main__":
    main()
