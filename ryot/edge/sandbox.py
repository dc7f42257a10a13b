"""Runs a program that nobody vouches for: bounded in time, memory, disk and processes, alone, and without a network.

What is in force on every machine, or the program is not run: limits of CPU and wall time, memory, size of files, open
files and processes; its own session, all of which ends with it; an empty folder that goes with it; no reading or
writing of files outside (Landlock, Linux 5.13), but for programs, libraries and what is named; no sockets (seccomp) or
a network namespace. Where the system allows it also gets a namespace of processes, so that nothing outlives it, and its
folder lies in memory of a bounded size. Memory is bounded per process. `Outcome.in_force` says what it was.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ryot.errors import ConfigError
from ryot.mapping import to_mapping

#: After the wall time the child itself ends everything; this long later it is given up on.
GRACE_S = 5.0
#: Of a command's output, as much is kept, from the end.
KEPT_OUTPUT = 2000
#: What every program may read: those of the system, and this Python's.
SYSTEM_PATHS = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/etc/ssl/openssl.cnf")
_CHILD = Path(__file__).with_name("sandbox_child.py")
#: Exit status of the child where the command could not be run.
_CANNOT_RUN = 127


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a program may use."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_bytes: int = 1_000_000_000
    """Address space of each process."""
    disk_bytes: int = 64_000_000
    """Of all files in its folder, and of any one."""
    files: int = 1000
    """Files in its folder, where that is in memory."""
    open_files: int = 64
    processes: int = 16
    """Processes and threads at one time."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    status: int | None
    """Exit status, 128 and the signal's number where a signal ended it, None where it was ended for its use."""
    reason: str | None
    """`time` or `disk` where it was ended for its use of that."""
    output: str
    """The end of what it wrote to stdout and stderr."""
    in_force: tuple[str, ...]
    """Protections that it ran under."""


def run_sandboxed(
    command: Sequence[str],
    text: str,
    *,
    limits: Limits | None = None,
    readable: Sequence[str] = (),
    kept_output: int = KEPT_OUTPUT,
) -> Outcome:
    """Run `command` with `text` as its stdin; it may read the files and folders `readable` beside the system's.

    Words of the command that name files are readable too. Raises `ConfigError` where it cannot be started, or this
    system lacks a protection.
    """
    limits = limits or Limits()
    named = [word for word in command if os.sep in word and Path(word).is_file()]
    paths = [*SYSTEM_PATHS, sys.base_prefix, sys.prefix, *named, *readable]
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    # A temporary folder and not a scratch folder: what lies in it is in a mount that ends with the child.
    folder = tempfile.mkdtemp(prefix="ryot-check-")
    Path(folder).chmod(0o777)
    try:
        with (
            tempfile.TemporaryFile() as stdin,
            tempfile.TemporaryFile() as output,
            tempfile.TemporaryFile() as report,
        ):
            stdin.write(text.encode("utf-8", "surrogatepass"))
            stdin.seek(0)
            orders = to_mapping(limits, keep_none=True) | {
                "command": list(command),
                "readable": [str(Path(path).absolute()) for path in paths],
                "environment": environment | {"HOME": folder, "TMPDIR": folder},
                "folder": folder,
                "report": report.fileno(),
            }
            _run_child(json.dumps(orders), stdin.fileno(), output.fileno(), report.fileno(), limits.wall_s + GRACE_S)
            report.seek(0)
            found = json.loads(report.read() or b"null")
            output.seek(max(0, output.seek(0, os.SEEK_END) - kept_output))
            said = output.read().decode("utf-8", "replace")
    except OSError as error:
        raise ConfigError(f"sandbox: cannot be made ({error.strerror})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if found is None:
        raise ConfigError(f"sandbox: failed before {command[0]!r} was run: {said.strip().rpartition(chr(10))[2]}")
    status, reason = found["status"], found["reason"]
    if status == _CANNOT_RUN and said.startswith("sandbox: "):
        raise ConfigError(said)
    if status is None and reason not in ("time", "disk"):
        raise ConfigError(f"sandbox: {command[0]!r} is not run: {reason}")
    return Outcome(status, reason, said, tuple(found["in_force"]))


def _run_child(orders: str, stdin: int, output: int, report: int, timeout_s: float) -> None:
    # Without site and the environment: it starts in some 10 ms.
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", _CHILD, orders],
        stdin=stdin,
        stdout=output,
        stderr=output,
        pass_fds=(report,),
        env={name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"},
        start_new_session=True,
    )
    try:
        child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
