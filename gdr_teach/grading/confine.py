"""What the kernel of the operating system refuses a learner's process. Each layer is used where it exists.

    limits     CPU time, file size, open files, memory, no core dump             every POSIX system
    Landlock   no writing outside the scratch folder, no reading of the answers,
               no TCP, no tracing and no signals to processes outside            Linux 5.13 and later, in growing parts
    seccomp    no new processes, no signals to others                            Linux on x86-64 and arm64

This narrows what an answer can do by accident or for a laugh. It is not a wall against a hostile class.
"""

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# Landlock: rights over files, by the version of its interface that brought them
WRITES = {1: 0b1_1111_1111_0010, 2: 1 << 13, 3: 1 << 14}
READ_FILE, WRITE_FILE, TRUNCATE = 1 << 2, 1 << 1, 1 << 14
TCP, SCOPES = 0b11, 0b11  # bind and connect; abstract sockets and signals
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every machine
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38

# seccomp: system calls refused, by machine
FORBIDDEN = {
    "x86_64": (
        "fork 57 vfork 58 execve 59 ptrace 101 setpgid 109 setsid 112 rt_sigqueueinfo 129 mount 165 reboot 169 "
        "tkill 200 unshare 272 rt_tgsigqueueinfo 297 setns 308 process_vm_readv 310 process_vm_writev 311 "
        "execveat 322 pidfd_send_signal 424 io_uring_setup 425 pidfd_open 434 pidfd_getfd 438"
    ),
    "aarch64": (
        "mount 40 unshare 97 ptrace 117 tkill 130 rt_sigqueueinfo 138 reboot 142 setpgid 154 setsid 157 execve 221 "
        "rt_tgsigqueueinfo 240 setns 268 process_vm_readv 270 process_vm_writev 271 execveat 281 "
        "pidfd_send_signal 424 io_uring_setup 425 pidfd_open 434 pidfd_getfd 438"
    ),
}
# calls judged by their first argument: process id for kill, tgkill and prlimit64, flags for clone
JUDGED = {
    "x86_64": {"kill": 62, "tgkill": 234, "prlimit64": 302, "clone": 56, "audit": 0xC000003E},
    "aarch64": {"kill": 129, "tgkill": 131, "prlimit64": 261, "clone": 220, "audit": 0xC00000B7},
}
CLONE3 = 435
CLONE_THREAD = 0x10000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


def limit(memory: int, cpu_seconds: int, file_bytes: int = 2**24) -> None:
    """Set the limits of this process and of what it starts."""
    wanted = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
        # writable memory beyond what this process inherited; address space is not limited, since
        # CUDA builds reserve a great deal of it
        resource.RLIMIT_DATA: _writable_memory() + memory,
    }
    for name, value in wanted.items():
        with suppress(ValueError, OSError):
            resource.setrlimit(name, (value, value))


def signal_when_parent_ends(number: int) -> None:
    """Ask for a signal when the process that started this one ends, however it ends (Linux)."""
    _prctl(PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that none is lost sight of (Linux)."""
    _prctl(PR_SET_SUBREAPER, 1)


def refuse(scratch: Path, hidden: Iterable[Path]) -> None:
    """Apply Landlock and seccomp to this process, as far as the system has them."""
    if platform.system() != "Linux" or _prctl(PR_SET_NO_NEW_PRIVS, 1) != 0:
        return
    with suppress(OSError):
        _landlock(scratch, [path.resolve() for path in hidden])
    _seccomp()


def _landlock(scratch: Path, hidden: list[Path]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return
    writes = sum(bits for since, bits in WRITES.items() if since <= version)
    fields = [writes | READ_FILE] + [TCP] * (version >= 4) + [SCOPES] * (version >= 6)
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = libc.syscall(
        CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)
    )
    if ruleset < 0:
        return

    def permit(path: Path, rights: int) -> None:
        with suppress(OSError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", rights, place)
            libc.syscall(ADD_RULE, ruleset, ctypes.c_int(1), rule, ctypes.c_uint32(0))
            os.close(place)

    for path in _all_but(Path("/"), hidden):
        permit(path, READ_FILE)
    permit(scratch, writes | READ_FILE)
    permit(Path("/dev/null"), WRITE_FILE | (TRUNCATE & writes))
    libc.syscall(RESTRICT_SELF, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)


def _all_but(folder: Path, hidden: list[Path]) -> Iterable[Path]:
    """The fewest paths that cover `folder` without what is hidden."""
    inside = [path for path in hidden if path.is_relative_to(folder)]
    if not inside:
        yield folder
    elif folder not in inside:
        for child in sorted(folder.iterdir()):
            if not child.is_symlink():  # what a link points to is covered where it stands
                yield from _all_but(child, inside)


def _seccomp() -> None:
    machine = platform.machine()
    if machine not in FORBIDDEN:
        return
    program = b"".join(
        struct.pack("=HBBI", *instruction) for instruction in _filter(machine, os.getpid())
    )
    text = ctypes.create_string_buffer(program)
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(text))
    _prctl(PR_SET_SECCOMP, 2, ctypes.create_string_buffer(header))


def _filter(machine: str, pid: int) -> Iterable[tuple[int, int, int, int]]:
    """The filter program: (operation, jump if true, jump if false, value); jumps count instructions to skip."""
    number, first_argument, audit = 0, 16, 4  # offsets in the kernel's struct seccomp_data
    judged = JUDGED[machine]
    yield LOAD, 0, 0, audit
    yield EQUAL, 1, 0, judged["audit"]
    yield RETURN, 0, 0, KILL  # a system call of another machine's kind
    yield LOAD, 0, 0, number
    if machine == "x86_64":
        yield AT_LEAST, 0, 1, 0x40000000  # the x32 numbering
        yield RETURN, 0, 0, EPERM
    for call in map(int, FORBIDDEN[machine].split()[1::2]):
        yield EQUAL, 0, 1, call
        yield RETURN, 0, 0, EPERM
    yield (
        EQUAL,
        0,
        1,
        CLONE3,
    )  # its flags are out of a filter's sight; libc then falls back to clone
    yield RETURN, 0, 0, ENOSYS
    for name, test, value in (
        ("clone", ANY_BIT, CLONE_THREAD),
        ("kill", EQUAL, pid),
        ("tgkill", EQUAL, pid),
        ("prlimit64", EQUAL, 0),
    ):
        yield EQUAL, 0, 4, judged[name]
        yield LOAD, 0, 0, first_argument
        yield test, 0, 1, value
        yield RETURN, 0, 0, ALLOW
        yield RETURN, 0, 0, EPERM
    yield RETURN, 0, 0, ALLOW


def _prctl(option: int, value: int, pointer: ctypes.Array | None = None) -> int:
    if platform.system() != "Linux":
        return -1
    zero = ctypes.c_ulong(0)
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.prctl(option, ctypes.c_ulong(value), pointer or zero, zero, zero)


def _writable_memory() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmData:"):
                return 1024 * int(line.split()[1])
    return 2**32  # not Linux: a guess; the grader watches resident size as well
