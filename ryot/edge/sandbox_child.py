"""The inside of the sandbox: gives up every right that a check does not need, then runs its command. Linux only.

Run as a program by `sandbox.run_sandboxed`, in a session of its own, with its orders as JSON in the first argument. It
imports nothing of ours and little else, because it is started for every check. What could be put in force, and how the
command ended, goes to the file descriptor that the orders name.

    this process        limits and namespaces; waits no longer than the wall time, then kills what is left
      process 1         the first one of a namespace of processes, where there is one: with it all others end
        the command     sees programs and its folder (Landlock), opens no socket (seccomp)
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # the module typing takes longer to import than all the rest
    from typing import Any, NoReturn

    Orders = dict[str, Any]

NOBODY = 65534
POLL_S = 0.02
#: Of a process that could not run its command.
CANNOT_RUN = 127

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
SECCOMP_MODE_FILTER = 2
# linux/audit.h, asm/unistd.h: architecture and number of `socket`; io_uring_setup, which can open sockets too, is 425.
MACHINES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
IO_URING_SETUP = 425
# linux/landlock.h; the same numbers on every architecture.
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_EXECUTE, LANDLOCK_WRITE_FILE, LANDLOCK_READ_FILE, LANDLOCK_READ_DIR = 1, 2, 4, 8
#: Rights over files that each version of Landlock knows: 1 to 3 have 13, 14 and 15 of them, 5 and above 16.
LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
#: From version 6: no abstract sockets of, and no signals to, processes outside.
LANDLOCK_SCOPES = 3

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Confine this process, run the command, report, and leave nothing running."""
    orders = json.loads(sys.argv[1])
    deadline = time.monotonic() + orders["wall_s"]
    in_force = confine(orders)
    missing = missing_protection(in_force)
    if missing:
        report: Orders = {"in_force": in_force, "status": None, "reason": missing}
        os.pwrite(orders["report"], json.dumps(report).encode(), 0)
        return
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if not child:
        run(orders, in_force)
    status, reason = wait(child, deadline, None if "folder in memory" in in_force else orders["disk_bytes"])
    kill_rest()
    report = {"in_force": in_force, "status": status, "reason": reason}
    os.pwrite(orders["report"], json.dumps(report).encode(), 0)


def confine(orders: Orders) -> list[str]:
    """Put limits and namespaces in force; the names of what there is, and of what the command will be under."""
    in_force = ["limits"]
    root = os.geteuid() == 0
    namespaces = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWPID
    user, group = os.geteuid(), os.getegid()
    separate = libc.unshare(namespaces | (0 if root else CLONE_NEWUSER)) == 0
    if separate and not root:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{user} {user} 1")
        write("/proc/self/gid_map", f"{group} {group} 1")
    if separate:
        in_force += ["network namespace", "process namespace"]
        options = f"size={orders['disk_bytes']},nr_inodes={orders['files']},mode=0777"
        folder = orders["folder"].encode()
        private = libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) == 0
        if private and libc.mount(b"ryot", folder, b"tmpfs", MS_NOSUID | MS_NODEV, options.encode()) == 0:
            in_force.append("folder in memory")
        if root and private:
            open_ways(orders["readable"])
    os.chdir(orders["folder"])
    if root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    # A user namespace of its own counts its own processes.
    counted = 0 if (libc.unshare(CLONE_NEWUSER) == 0 if root else separate) else count_tasks(os.geteuid())
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    set_limits(orders, counted)
    if landlock_version() > 0:
        in_force.append("Landlock")
    if os.uname().machine in MACHINES:
        in_force.append("no sockets")
    return in_force


def open_ways(paths: list[str]) -> None:
    """Let a user without rights reach `paths` that lie in closed folders, such as a Python below /root.

    An empty folder in memory is mounted over each closed one, and the paths alone are put back into it.
    """
    closed: dict[str, dict[str, int]] = {}
    for path in map(os.path.realpath, paths):
        parents = [path[:at] for at in range(1, len(path)) if path[at] == "/"]
        shut = next((parent for parent in parents if os.path.exists(path) and not os.stat(parent).st_mode & 1), None)
        if shut is not None:
            closed.setdefault(shut, {})[path] = os.open(path, os.O_PATH)
    for shut, opened in closed.items():
        libc.mount(b"ryot", shut.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=0755")
        for path, descriptor in sorted(opened.items()):
            if os.path.exists(path):  # inside of one that was there before
                continue
            is_folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
            os.makedirs(path if is_folder else os.path.dirname(path), exist_ok=True)
            if not is_folder:
                write(path, "")
            libc.mount(f"/proc/self/fd/{descriptor}".encode(), path.encode(), None, MS_BIND | MS_REC, None)
            os.close(descriptor)


def missing_protection(in_force: list[str]) -> str | None:
    """What a command must not be run without and this system lacks; None where all is there."""
    if "Landlock" not in in_force:
        return "files outside cannot be hidden (Linux before 5.13, or without Landlock)"
    if "no sockets" not in in_force and "network namespace" not in in_force:
        return "the network cannot be kept away (no namespaces, and a processor that is not known)"
    return None


def count_tasks(user: int) -> int:
    """Threads of a user, as the limit of processes counts them."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == user:
                    count += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue
    return count


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def set_limits(orders: Orders, counted: int) -> None:
    """Limits that hold for each process; that of processes holds for all together."""
    for kind, limit in (
        (resource.RLIMIT_CPU, orders["cpu_s"]),
        (resource.RLIMIT_AS, orders["memory_bytes"]),
        (resource.RLIMIT_DATA, orders["memory_bytes"]),
        (resource.RLIMIT_FSIZE, orders["disk_bytes"]),
        (resource.RLIMIT_NOFILE, orders["open_files"]),
        # This process and process 1 count too.
        (resource.RLIMIT_NPROC, orders["processes"] + 2 + counted),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(kind, (limit, limit))


def landlock_version() -> int:
    """Of the kernel's Landlock; below 1 where there is none."""
    return int(libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def restrict_files(orders: Orders) -> bool:
    """Landlock: programs and libraries can be read, the folder written, nothing else; whether it is in force."""
    version = landlock_version()
    handled = (1 << LANDLOCK_RIGHTS.get(version, 16)) - 1
    # Files, then TCP (both rights, none granted), then scopes: a shorter struct where the version knows less.
    attributes = struct.pack("QQQ", handled, 3 if version >= 4 else 0, LANDLOCK_SCOPES)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return False
    look = LANDLOCK_EXECUTE | LANDLOCK_READ_FILE | LANDLOCK_READ_DIR
    rules = [(path, look) for path in orders["readable"]]
    rules += [(".", handled), ("/dev/null", LANDLOCK_READ_FILE | LANDLOCK_WRITE_FILE)]
    rules += [(f"/dev/{name}", LANDLOCK_READ_FILE) for name in ("zero", "random", "urandom")]
    for path, rights in rules:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            rights &= LANDLOCK_EXECUTE | LANDLOCK_READ_FILE | LANDLOCK_WRITE_FILE
        libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights & handled, opened), 0)
        os.close(opened)
    return bool(libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0)


def forbid_sockets() -> bool:
    """seccomp: `socket` and io_uring are refused, and so are calls of another architecture; whether it is in force."""
    machine = MACHINES.get(os.uname().machine)
    if machine is None:
        return False
    architecture, socket = machine
    load, equal, above, answer = 0x20, 0x15, 0x35, 0x06
    refuse, allow = 0x00050001, 0x7FFF0000  # SECCOMP_RET_ERRNO with EPERM, SECCOMP_RET_ALLOW
    program = [
        (load, 0, 0, 4),
        (equal, 0, 5, architecture),
        (load, 0, 0, 0),
        (above, 3, 0, 0x40000000),  # x32
        (equal, 2, 0, socket),
        (equal, 1, 0, IO_URING_SETUP),
        (answer, 0, 0, allow),
        (answer, 0, 0, refuse),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filters = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filters, 0, 0) == 0)


def run(orders: Orders, in_force: list[str]) -> NoReturn:
    """Become process 1 where there is such a namespace, run the command, and end as it ends. Never returns."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if "process namespace" in in_force:
        child = os.fork()
        if child:
            while True:
                ended, status = os.wait()
                if ended == child:
                    # The namespace, and all that is in it, ends with this process. Signals become numbers above 128.
                    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
    # Its errors go where the command's go.
    try:
        if not restrict_files(orders) or ("no sockets" in in_force and not forbid_sockets()):
            raise OSError(0, "it cannot be confined")
        os.set_inheritable(orders["report"], False)
        os.execvpe(orders["command"][0], orders["command"], orders["environment"])
    except OSError as error:
        os.write(2, f"sandbox: {orders['command'][0]} cannot be run ({error.strerror})".encode())
    os._exit(CANNOT_RUN)


def wait(child: int, deadline: float, disk_bytes: int | None) -> tuple[int | None, str | None]:
    """The command's exit status, and why it was ended where it was."""
    pause = 0.001
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended == child:
            return (os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)), None
        if time.monotonic() >= deadline:
            return None, "time"
        if disk_bytes is not None and folder_bytes() > disk_bytes:
            return None, "disk"
        time.sleep(pause)
        pause = min(2 * pause, POLL_S)


def folder_bytes() -> int:
    """Bytes of the files in the folder."""
    total = 0
    for base, _, names in os.walk("."):
        for name in names:
            try:
                total += os.lstat(os.path.join(base, name)).st_blocks * 512
            except OSError:
                continue
    return total


def kill_rest() -> None:
    """End all that descends from here: what outlives its parents becomes a child of this process."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            children = [int(word) for word in file.read().split()]
        for child in children:
            os.kill(child, signal.SIGKILL)
        if not children:
            return
        os.waitpid(-1, 0)


if __name__ == "__main__":
    main()
