"""A real sshd on a loopback port, with keys of its own: a host as far as `push` can tell."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


def is_sshd_there() -> bool:
    """Whether sshd and the client's programs are installed."""
    return Path(SSHD).exists() and all(shutil.which(name) for name in ("ssh", "ssh-keygen"))


class Sshd:
    """An sshd and what a client needs to reach it as `host`; ends with `close`.

    `path` is the PATH of what it runs, and `before` a command that it is started by, such as `ip netns exec NAME`.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "host",
        *,
        address: str = "127.0.0.1",
        path: str | None = None,
        before: Sequence[str] = (),
        after: Sequence[str] = (),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.folder, self.address = name, folder, address
        self._before, self._after = before, after
        self.port = _free_port()
        for key in ("host_key", "user_key"):
            if not (folder / key).exists():
                command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
                subprocess.run(command, check=True)
        Path("/run/sshd").mkdir(exist_ok=True) if os.geteuid() == 0 else None
        settings = [
            f"Port {self.port}",
            f"ListenAddress {address}",
            f"HostKey {folder / 'host_key'}",
            f"AuthorizedKeysFile {folder / 'user_key.pub'}",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin yes",
            f"PidFile {folder / 'pid'}",
            "MaxStartups 100",
        ]
        environment = f"SetEnv HOME={folder}" + (f" PATH={path}" if path else "")
        (folder / "sshd_config").write_text("\n".join([*settings, environment]) + "\n")
        self.known_hosts = folder / "known_hosts"
        self.trust_host()
        self.config = folder / "ssh_config"
        self.config.write_text(self.client_settings())
        self.start()

    def client_settings(self) -> str:
        """Its part of a client's configuration."""
        return "\n".join(
            [
                f"Host {self.name}",
                f"  HostName {self.address}",
                f"  Port {self.port}",
                f"  IdentityFile {self.folder / 'user_key'}",
                "  IdentitiesOnly yes",
                f"  UserKnownHostsFile {self.known_hosts}",
                "",
            ]
        )

    def trust_host(self) -> None:
        """Make its key known to the client."""
        key = (self.folder / "host_key.pub").read_text().split()
        self.known_hosts.write_text(f"[{self.address}]:{self.port} {key[0]} {key[1]}\n")

    def start(self) -> None:
        self.log = (self.folder / "log").open("ab")
        command = [*self._before, SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 20
        while not self._answers():
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.02)

    def _answers(self) -> bool:
        probe = [*self._after, "ssh", "-F", str(self.config), "-o", "BatchMode=yes", self.name, "true"]
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0

    def close(self) -> None:
        """End it and every session of its."""
        kill(*self.sessions(), self.process.pid)
        self.process.wait()
        self.log.close()

    def sessions(self) -> list[int]:
        """Its descendants, the deepest first: what it runs for clients."""
        return descendants(self.process.pid)


def kill(*pids: int) -> None:
    """SIGKILL those that are still there; all are stopped first, so that none does anything about another's end."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """Processes below one, the deepest first."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found: list[int] = []
    pending = [pid]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found[::-1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
