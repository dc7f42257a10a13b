"""One ssh process to one device: the facts come first, then its end is the program that was sent along.

ssh is the system's own, with its user's keys, agents, jump hosts and shared connections. It never asks anything: host
keys must be known, and a password cannot be given.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ryot.errors import ConfigError, FleetError
from ryot.fleet.answers import read_answer
from ryot.fleet.device.wire import CHUNK, Wire, WireError, WireNonsenseError
from ryot.fleet.facts import Facts, FactsReader, remote_command
from ryot.fleet.inventory import Host
from ryot.fleet.program import build_program

#: Seconds until a host that does not answer is given up.
CONNECT_S = 15
#: Seconds between signs of life of a connection; three that stay away end it.
ALIVE_S = 5
#: A device that measures for long says nothing meanwhile; ssh itself notices when the link is gone.
SILENCE_S = 3600.0
_LINES_BEFORE_FACTS = 200

#: What the ssh to a host says when the one to its jump host has ended, and lines that follow from the one before.
_JUMP_FAILED = "UNKNOWN port 65535"
_CONSEQUENCES = ("kex_exchange_identification:", "ssh_exchange_identification:", "stdio forwarding failed")

A = TypeVar("A")


class ConnectionLost(FleetError):
    """The link went while something was under way, or something came damaged; trying again may do."""


class Links:
    """The ssh processes of one command, so that all of them can be ended when it is."""

    def __init__(self) -> None:
        self._lock, self._processes = threading.Lock(), set[subprocess.Popen[bytes]]()
        self.stopped = False

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        """A process away from the terminal's signals. Raises `FleetError`."""
        with self._lock:
            if self.stopped:
                raise FleetError("interrupted")
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    start_new_session=True,
                )
            except FileNotFoundError as error:
                raise FleetError("ssh is not installed here", hint="install OpenSSH's client") from error
            self._processes.add(process)
            return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Wait a moment for a process whose stdin was closed, and forget it."""
        try:
            process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with self._lock:
            self._processes.discard(process)

    def stop(self) -> None:
        """End all; whoever waits for one of them gets an error, and no new one comes."""
        with self._lock:
            self.stopped = True
            for process in self._processes:
                process.kill()


class Piece(NamedTuple):
    """A file to be sent."""

    path: Path
    sha256: str
    bytes: int


class Connection:
    """A device at the other end of ssh; `tell` hears what it does."""

    def __init__(self, wire: Wire, process: subprocess.Popen[bytes], facts: Facts, tell: Callable[[str], None]):
        self._wire, self._process = wire, process
        self.facts, self._tell = facts, tell

    def start(self, shape: type[A], **request: Any) -> A:
        """Send the program along and its first request. Raises `FleetError`."""
        with self._watched():
            self._wire.write(build_program())
        return self.ask(shape, **request)

    def ask(self, shape: type[A], **request: Any) -> A:
        """The device's answer to a request, of a shape of `ryot.fleet.answers`.

        Raises `FleetError` when it refuses, or answers something else.
        """
        with self._watched():
            self._wire.send(request)
            return read_answer(shape, self._answer())

    def send_files(self, pieces: list[tuple[Piece, int]]) -> None:
        """Send files, each from an offset on; answers are read at the end, so that no file waits for another's."""
        with self._watched():
            for piece, offset in pieces:
                self._wire.send({"op": "put", "sha256": piece.sha256, "bytes": piece.bytes, "offset": offset})
                left = piece.bytes - offset
                with piece.path.open("rb") as file:
                    file.seek(offset)
                    while left and (chunk := file.read(min(left, CHUNK))):
                        self._wire.write(chunk)
                        left -= len(chunk)
                if left:
                    raise ConfigError(f"{piece.path}: became shorter while it was sent")
            for _ in pieces:
                self._answer()

    def _answer(self) -> dict[str, Any]:
        while True:
            values = self._wire.receive()
            if "error" in values:
                raise _refusal(values)
            if "progress" not in values:
                return values
            self._tell(str(values["progress"]))

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Raise what the device said last instead of the broken pipe that came of it."""
        try:
            yield
        except WireNonsenseError as error:
            self._process.kill()
            raise FleetError(f"it says something else than ryot's program: {error}") from error
        except WireError as error:
            with contextlib.suppress(WireError):
                while True:
                    values = self._wire.receive()
                    if "error" in values:
                        raise _refusal(values) from error
            self._process.kill()
            raise ConnectionLost(f"the connection was lost: {_complaint(self._process) or error}") from error


@contextlib.contextmanager
def connect(host: Host, ssh_config: Path | None, links: Links, tell: Callable[[str], None]) -> Iterator[Connection]:
    """A connection whose device has said what it is. Raises `FleetError` when it cannot be reached."""
    with contextlib.ExitStack() as stack:
        config = stack.enter_context(_strict_config(ssh_config))
        command = ["ssh", "-F", str(config), "-T", "--", host.destination]
        command.append(remote_command(host.root, host.python, len(build_program())))
        process = links.start(command)
        stack.callback(_end, links, process)
        assert process.stdin is not None and process.stdout is not None
        wire = Wire(process.stdout.fileno(), process.stdin.fileno(), SILENCE_S)
        yield Connection(wire, process, _read_facts(wire, process), tell)


def _end(links: Links, process: subprocess.Popen[bytes]) -> None:
    pipes = process.stdin, process.stdout, process.stderr
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    links.end(process)
    for pipe in pipes[1:]:
        if pipe is not None:
            pipe.close()


@contextlib.contextmanager
def _strict_config(ssh_config: Path | None) -> Iterator[Path]:
    """The user's configuration, but that nobody is asked anything and no unknown host key is taken.

    A file, because ssh gives a jump host no options of its command line; of two values the first one counts.
    """
    lines = ["StrictHostKeyChecking yes", "BatchMode yes", f"ConnectTimeout {CONNECT_S}"]
    lines += [f"ServerAliveInterval {ALIVE_S}", "ServerAliveCountMax 3"]
    own = ["~/.ssh/config", "/etc/ssh/ssh_config"] if ssh_config is None else [glob.escape(str(ssh_config.absolute()))]
    lines += [f'Include "{path}"' for path in own]
    with tempfile.NamedTemporaryFile("w", prefix="ryot-ssh-", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        yield Path(file.name)


def _read_facts(wire: Wire, process: subprocess.Popen[bytes]) -> Facts:
    reader = FactsReader()
    wire.silence_s = 120.0
    try:
        for _ in range(_LINES_BEFORE_FACTS):
            if (facts := reader.add(wire.receive_text_line())) is not None:
                wire.silence_s = SILENCE_S
                return facts
    except WireError as error:
        raise explain(_complaint(process), str(error)) from error
    raise FleetError("it does not say what it is: its login shell prints other things", hint="try: ssh HOST true")


def explain(complaint: str, otherwise: str) -> FleetError:
    """The error for what ssh said when no connection came about."""
    jump = _JUMP_FAILED in complaint
    if "IDENTIFICATION HAS CHANGED" in complaint:
        name = _found(r"Host key for (\S+) has changed", complaint)
        whose = f"the host key of its jump host {name}" if jump else "its host key"
        return FleetError(
            f"{whose} is another one than the known one; nothing was sent",
            hint=f"it may be another machine; if it was set up anew: ssh-keygen -R '{name}', then ssh HOST",
        )
    if "Host key verification failed" in complaint:
        whose = "its host key"
        if jump:
            whose = f"the host key of its jump host {_found(r'host key is known for (.+) and you have', complaint)}"
        return FleetError(
            f"{whose} is not known, and none is accepted unseen",
            hint="connect once with 'ssh HOST' and compare the fingerprint",
        )
    if "Permission denied" in complaint or "Too many authentication failures" in complaint:
        name = _found(r"(\S+): Permission denied", complaint)
        who = f"its jump host {name}" if jump else "it"
        return FleetError(
            f"{who} accepts none of your keys; passwords are not asked for", hint="put a key there: ssh-copy-id HOST"
        )
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    causes = [line for line in lines if _JUMP_FAILED not in line and not line.startswith(_CONSEQUENCES)] or lines
    return ConnectionLost(f"cannot be reached: {causes[-1] if causes else otherwise}")


def _found(pattern: str, text: str) -> str:
    """What ssh calls a host."""
    match = re.search(pattern, text)
    return match[1] if match else "HOST"


def _refusal(values: dict[str, Any]) -> FleetError:
    kind = ConnectionLost if values.get("retry") else FleetError
    hint = values.get("hint")
    return kind(str(values["error"]), hint=hint if isinstance(hint, str) else None)


def _complaint(process: subprocess.Popen[bytes]) -> str:
    """What ssh wrote to stderr, once it has ended."""
    assert process.stderr is not None
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
    # A shared connection's own process may hold the other end open for as long as it lives.
    os.set_blocking(process.stderr.fileno(), False)
    return (process.stderr.read() or b"").decode("utf-8", "replace").strip()
