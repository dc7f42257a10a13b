"""Links that are cut and processes that are killed while a bundle is pushed, updated and rolled back."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ryot.fleet.device.store import STATE_SCHEMA, Root
from ryot.fleet.inventory import Host
from ryot.fleet.push import PushOptions, PushResult, prepare, push_all
from ryot.fleet.status import roll_back
from tests.fleet.conftest import Push, rewrite_manifest, run_current
from tests.fleet.kills import Desk, kill_command
from tests.fleet.sshd import Sshd, is_sshd_there, kill

pytestmark = pytest.mark.slow

LAB = "ryotpush"
#: The kernel takes a link down some time after its namespace; the next one has another name.
_numbers = itertools.count()


class Link:
    """A host of its own behind a link that can be cut: a network namespace with an sshd in it."""

    def __init__(self, folder: Path):
        number = next(_numbers)
        self.name = f"{LAB}{os.getpid()}-{number}"
        self.inner, self.outer = (f"{side}{os.getpid() % 100000}-{number}" for side in ("ri", "ro"))
        third = (os.getpid() + number) % 250
        ip("netns", "add", self.name)
        try:
            ip("link", "add", self.outer, "type", "veth", "peer", "name", self.inner, "netns", self.name)
            ip("addr", "add", f"10.79.{third}.1/30", "dev", self.outer)
            ip("link", "set", self.outer, "up")
            ip("-n", self.name, "addr", "add", f"10.79.{third}.2/30", "dev", self.inner)
            ip("-n", self.name, "link", "set", self.inner, "up")
            ip("-n", self.name, "link", "set", "lo", "up")
            self.sshd = Sshd(folder, address=f"10.79.{third}.2", before=("ip", "netns", "exec", self.name))
        except BaseException:
            ip("netns", "del", self.name)
            raise

    def cut(self) -> None:
        ip("link", "set", self.outer, "down")

    def heal(self) -> None:
        ip("link", "set", self.outer, "up")

    def close(self) -> None:
        self.sshd.close()
        ip("netns", "del", self.name)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    """A dead link is noticed after 6 s here, which takes 15 elsewhere."""
    monkeypatch.setattr("ryot.fleet.connection.CONNECT_S", 5)
    monkeypatch.setattr("ryot.fleet.connection.ALIVE_S", 2)
    if not is_sshd_there():
        pytest.skip("OpenSSH's server is not installed")
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the ip command")
    probe = f"{LAB}-probe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces are not permitted here")
    ip("netns", "del", probe)
    folder = Path(tempfile.mkdtemp(prefix="ryotlink"))
    link = Link(folder)
    yield link
    link.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def heavy(version_1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a file that takes some time to send."""
    folder = Path(shutil.copytree(version_1, tmp_path_factory.mktemp("heavy") / "bundle"))
    (folder / "ballast.bin").write_bytes(random.Random(0).randbytes(96_000_000))
    return rewrite_manifest(folder, name="heavy")


def test_a_cut_link_is_noticed_and_the_push_goes_on_where_it_was(
    link: Link, heavy: Path, root: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    results: list[PushResult] = []
    host = Host(name="host", root=str(root), python=sys.executable)
    options = PushOptions(rounds=0, ssh_config=link.sshd.config)
    pushing = threading.Thread(
        target=lambda: results.extend(
            push_all(
                prepare(heavy, None), [host], options, jobs=1, scratch=tmp_path, tell=lambda _, what: said.append(what)
            )
        )
    )
    pushing.start()
    arrived = 0
    while arrived < 8_000_000 and pushing.is_alive():
        arrived = max((p.stat().st_size for p in root.glob("incoming/*.part")), default=0)
    link.cut()
    assert pushing.is_alive()
    while not any("trying again" in line for line in said):
        assert pushing.is_alive(), results
        time.sleep(0.1)
    link.heal()
    pushing.join(timeout=120)
    [result] = results
    assert (result.outcome, result.reason) == ("switched", "")
    resumed = [line for line in said if "came before" in line]
    assert resumed and float(resumed[0].split(", ")[1].split()[0]) >= 8.0
    assert run_current(root).stdout.startswith("heavy: ")


def test_a_device_whose_desk_vanished_takes_the_next_push(link: Link, heavy: Path, root: Path, tmp_path: Path) -> None:
    """Its sshd, and so the program on it, hear nothing of the cut link; the same push must get through all the same."""
    host = Host(name="host", root=str(root), python=sys.executable)
    options = PushOptions(rounds=0, ssh_config=link.sshd.config)
    parcel = prepare(heavy, None)
    lost: list[str] = []

    def lose_the_link(_: str, what: str) -> None:
        if what == "verifying" and not lost:
            lost.append(what)
            link.cut()
            threading.Timer(9.0, link.heal).start()

    [result] = push_all(parcel, [host], options, jobs=1, scratch=tmp_path, tell=lose_the_link)
    assert result.outcome == "switched", result.reason


@pytest.mark.parametrize("proves", [True, False])
def test_a_switch_whose_watcher_was_killed_is_proved_or_taken_back_by_the_next_connection(
    version_1: Path, version_2: Path, sshd: Sshd, push: Push, root: Path, tmp_path: Path, proves: bool
) -> None:
    push(version_1)
    good, bad = tmp_path / "good", tmp_path / "bad"
    health = f"[ -e {bad} ] && exit 1; [ -e {good} ] || sleep 30"
    said: list[str] = []

    def kill_after_the_switch() -> None:
        while run_current(root).stdout.startswith("tiny-0"):
            time.sleep(0.1)
        assert Root(root).read_state().pending is not None
        (good if proves else bad).touch()
        kill(*sshd.sessions())

    watcher = threading.Thread(target=kill_after_the_switch)
    watcher.start()
    host = Host(name="host", root=str(root), python=sys.executable, health=health, health_wait_s=0.5)
    options = PushOptions(rounds=0, ssh_config=sshd.config)
    [result] = push_all(
        prepare(version_2, None), [host], options, jobs=1, scratch=tmp_path, tell=lambda _, what: said.append(what)
    )
    watcher.join()
    assert "proving a switch that was interrupted" in said
    assert any(line.startswith("took back a switch that was interrupted") for line in said) == (not proves)
    assert result.outcome == ("switched" if proves else "failed"), result.reason
    assert any("lost behind the switch" in note for note in result.notes) == proves
    assert run_current(root).stdout.startswith("tiny-second: " if proves else "tiny-0: ")
    state = Root(root).read_state()
    assert state.pending is None and state.good[-1] == Root(root).current_id()
    if proves:
        # The same of a rollback, which nobody tries again by itself: a second one would go back further.
        [back] = roll_back(
            [Host(name="host", root=str(root))],
            sshd.config,
            jobs=1,
            tell=lambda _, what: kill(*sshd.sessions()) if what == "switching" else None,
        )
        assert "connection was lost" in back.error and back.hint is not None and "fleet status" in back.hint
        assert run_current(root).returncode == 0


def until_it_says(what: str) -> Callable[[Desk], None]:
    def wait(desk: Desk) -> None:
        assert desk.stderr is not None
        for line in desk.stderr:
            if what in line:
                return
        raise AssertionError(f"the desk has ended, and never said {what!r}")

    return wait


def test_killed_at_any_moment_the_device_runs_a_whole_version(
    version_1: Path, version_2: Path, sshd: Sshd, push: Push, root: Path
) -> None:
    """`benchmarks/fleet.py` kills 50 times and more, at random moments."""
    push(version_1)
    versions = {"tiny-0": version_1, "tiny-second": version_2}
    runs = "tiny-0"
    for moment, on_device in (
        ("sending", True), ("verifying", False), ("comparing golden tokens", True), ("measuring", False),
        ("switching", True),
    ):  # fmt: skip
        [other] = versions.keys() - {runs}
        found = kill_command(sshd, root, versions[other], on_device=on_device, wait=until_it_says(moment))
        assert found.is_whole and not found.too_late, (moment, found)
        runs = found.answers[-1].stdout.split(":")[0]
        assert runs in versions
        assert on_device <= (runs == other), f"{moment}: the desk lives, and goes on"
    assert kill_command(sshd, root, None, on_device=False, wait=until_it_says("switching")).is_whole
    assert push(version_1).outcome in ("switched", "unchanged")
    assert run_current(root).stdout.startswith("tiny-0: ")
    state = Root(root).read_state()
    assert state.pending is None and Root(root).current_id() in state.good
    left = [p.name for name in ("bundles", "releases", "environments") for p in (root / name).iterdir()]
    assert not [name for name in left if name.startswith(".")], left
    assert json.loads((root / "state.json").read_text())["schema"] == STATE_SCHEMA
