"""Commands of the desk that are killed on the way, here or on the device, and what the device answers then."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ryot.fleet.device.store import Root
from tests.fleet.conftest import run_current
from tests.fleet.sshd import Sshd, descendants, kill

Desk = subprocess.Popen[str]


class Kill(NamedTuple):
    """What came of a command that was killed."""

    too_late: bool
    """Whether it had ended by itself."""
    pending: bool
    """Whether a switch is left that the next connection has to prove."""
    answers: list[subprocess.CompletedProcess[str]]
    """The device's owner verifies what it runs: right behind the kill, and once all has come to rest."""

    @property
    def is_whole(self) -> bool:
        return all(done.returncode == 0 for done in self.answers)


def kill_command(
    server: Sshd, root: Path, bundle: Path | None, *, on_device: bool, wait: Callable[[Desk], object]
) -> Kill:
    """Push a bundle, or roll back (None), and kill the desk's or the device's processes once `wait` has returned."""
    where = ["--ssh-config", str(server.config), "--root", str(root)]
    words = ["fleet", "rollback", server.name]
    if bundle is not None:
        words = ["push", str(bundle), server.name, "--rounds", "0", "--python", sys.executable]
    desk = subprocess.Popen(
        [sys.executable, "-c", "from ryot.cli.main import run; run()", *words, *where],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait(desk)
    too_late = desk.poll() is not None
    kill(*(server.sessions() if on_device else [*descendants(desk.pid), desk.pid]))
    at_once = run_current(root)
    desk.communicate(timeout=300)
    return Kill(too_late, Root(root).read_state().pending is not None, [at_once, run_current(root)])
