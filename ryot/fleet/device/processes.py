"""Programs that are run on the device for a while, none of which outlives the desk that asked for it."""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import subprocess
import threading

_lock, _running = threading.Lock(), set[subprocess.Popen[str]]()


def run(command: list[str], *, timeout_s: float, text: str = "", cwd: str = "/") -> subprocess.CompletedProcess[str]:
    """Run a command to its end; one that takes too long is killed, and says so on its stderr. Raises `OSError`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SSH_"))}
    with _lock:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=cwd,
            text=True,
            start_new_session=True,
        )
        _running.add(process)
    try:
        out, err = process.communicate(text, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return subprocess.CompletedProcess(command, -signal.SIGKILL, "", f"it took longer than {timeout_s:g} s")
    finally:
        with _lock:
            _running.discard(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end_all() -> None:
    """Kill what runs; nothing can be started any more."""
    _lock.acquire()
    for process in _running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The last thing that a program said of why it failed."""
    for text in (done.stderr, done.stdout):
        lines = [line for line in text.strip().splitlines() if line.strip() and not line.startswith("hint:")]
        if lines:
            return lines[-1].removeprefix("Error: ").removeprefix("ERROR: ")
    return f"killed by signal {-done.returncode}" if done.returncode < 0 else f"it ended with code {done.returncode}"


def user_name() -> str:
    """Who runs this program; the number of a user without a name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the latter since Python 3.13
        return f"user {os.getuid()}"
