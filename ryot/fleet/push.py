"""A bundle onto devices: checked before it is copied, verified and measured there, and switched to only then."""

from __future__ import annotations

import concurrent.futures
import getpass
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ryot.deploy.remeasure import effort, limits_under
from ryot.edge.bundle import Bundle, hash_file
from ryot.edge.protocol import MeasureResult
from ryot.edge.trust import UNLISTED, TrustedKeys, check_whole
from ryot.errors import EXIT_FAILED, EXIT_OK, EXIT_TARGET_MISSED, FleetError, RyotError
from ryot.fleet.connection import Connection, ConnectionLost, Links, Piece, connect
from ryot.fleet.device.store import identify
from ryot.fleet.facts import check_device, check_disk
from ryot.fleet.inventory import Host
from ryot.fleet.records import judge_device, own_peak_bytes
from ryot.fleet.wheels import collect_wheels
from ryot.mapping import read_mapping
from ryot.report.choice import describe_miss
from ryot.report.rows import Report
from ryot.report.targets import load_targets

#: Pauses before a lost connection is tried again; what came already is not sent again.
RETRY_AFTER_S = (1.0, 3.0, 9.0, 27.0)
#: Unpacked wheels take some four times their own size.
_UNPACKED = 5
#: The measurement that only says whether a version works: one process, a moment.
_BRIEF = {"min_runs": 3, "min_time_s": 0.1, "warmup": 1}

R = TypeVar("R")
Tell = Callable[[str, str], None]
"""Hears a host's name and what happens there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PushOptions:
    """What is the same for all devices."""

    rounds: int = 3
    """Fresh processes that measure on the device; 0: one, for a moment, and no record."""
    even_if_missed: bool = False
    """Whether a version that misses a target's limit is switched to all the same."""
    trusted_keys: Path | None = None
    """Keys that the device is to trust from now on."""
    wheels: Path | None = None
    """Folder of wheels for devices that get some."""
    ssh_config: Path | None = None
    command: str = ""
    """The command line, as reports show it."""


@dataclass(kw_only=True, slots=True)
class PushResult:
    """What came of it on one device."""

    host: str
    outcome: str = "failed"
    """`switched`, `unchanged` (it ran already), `kept` (a limit was missed: the version before runs on), `failed`."""
    reason: str = ""
    hint: str | None = None
    sent_bytes: int = 0
    wall_s: float = 0.0
    notes: list[str] = field(default_factory=list)
    report: Report | None = None
    proved: list[str | None] = field(default_factory=list)
    """The release that ran there, proved good, when each connection began."""

    @property
    def exit_code(self) -> int:
        if self.outcome == "failed":
            return EXIT_FAILED
        missed = self.report is not None and any(v.verdict != "PASS" for v in self.report.verdicts)
        return EXIT_TARGET_MISSED if missed or self.outcome == "kept" else EXIT_OK


@dataclass(frozen=True, slots=True)
class Parcel:
    """A bundle, read and checked once, and the files that go."""

    bundle: Bundle
    id: str
    files: dict[str, Piece]
    """By name; those that the manifest does not list too."""


def prepare(folder: Path, keys: TrustedKeys | None) -> Parcel:
    """Read and check a bundle. Raises `BundleError` for one that is damaged or, with `keys`, signed by none of them."""
    bundle, _ = check_whole(folder, keys)
    files = {name: Piece(folder / name, entry.sha256, entry.bytes) for name, entry in bundle.files.items()}
    digests = []
    for name in UNLISTED:
        path = folder / name
        if path.exists():
            files[name] = Piece(path, hash_file(path), path.stat().st_size)
        digests.append(files[name].sha256 if name in files else "-")
    return Parcel(bundle, identify(*digests), files)


def push_all(
    parcel: Parcel, hosts: Sequence[Host], options: PushOptions, *, jobs: int, scratch: Path, tell: Tell
) -> list[PushResult]:
    """Push to all hosts, `jobs` at once; what goes wrong on one stops no other."""
    wheels = _WheelShelf(scratch, options.wheels)
    return for_each(hosts, jobs, lambda host, links: _push_safely(parcel, host, options, wheels, links, tell))


def for_each(hosts: Sequence[Host], jobs: int, do: Callable[[Host, Links], R]) -> list[R]:
    """What `do` gives for each host, `jobs` at once; an interrupt ends all connections."""
    links = Links()
    with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, min(jobs, len(hosts)))) as pool:
        try:
            return list(pool.map(lambda host: do(host, links), hosts))
        except BaseException:  # an interrupt above all: no connection is to outlive it, and it goes on up
            links.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _push_safely(
    parcel: Parcel, host: Host, options: PushOptions, wheels: _WheelShelf, links: Links, tell: Tell
) -> PushResult:
    result, begin = PushResult(host=host.name), time.monotonic()
    try:
        _push(parcel, host, options, wheels, links, result, lambda what: tell(host.name, what))
    except (RyotError, OSError) as error:
        result.outcome, result.reason, result.hint = "failed", str(error), getattr(error, "hint", None)
        tell(host.name, f"failed: {error}")
    result.wall_s = time.monotonic() - begin
    return result


def _push(
    parcel: Parcel,
    host: Host,
    options: PushOptions,
    wheels: _WheelShelf,
    links: Links,
    result: PushResult,
    tell: Callable[[str], None],
) -> None:
    session, pauses, reached = secrets.token_hex(16), iter(RETRY_AFTER_S), False
    while True:
        try:
            with connect(host, options.ssh_config, links, tell) as device:
                reached = True
                return _push_once(parcel, host, options, wheels, result, device, session, tell)
        except ConnectionLost as error:
            pause = next(pauses, None)
            # A device that was never reached is not there; one that was may come back.
            if pause is None or links.stopped or not reached:
                raise
            tell(f"{error}; trying again in {pause:g} s")
            time.sleep(pause)


def _push_once(
    parcel: Parcel,
    host: Host,
    options: PushOptions,
    wheels: _WheelShelf,
    result: PushResult,
    device: Connection,
    session: str,
    tell: Callable[[str], None],
) -> None:
    facts, targets = device.facts, load_targets(host.target)
    result.notes = check_device(facts, parcel.bundle, own_peak_bytes(parcel.bundle), host.root)
    for note in result.notes:
        tell(f"note: {note}")
    taken = wheels.get(parcel, device) if host.offline else []
    opened = device.start(op="push", root=host.root, session=session, who=whoami())
    result.proved.append(opened["proved"])
    if options.trusted_keys is not None:
        answer = device.ask(op="trust", keys=options.trusted_keys.read_text(encoding="utf-8"))
        if answer["changed"]:
            tell("its trusted keys were replaced")
    _send_missing(parcel, taken, device, result, tell)
    built = device.ask(
        op="build",
        bundle=parcel.id,
        files={name: piece.sha256 for name, piece in parcel.files.items()},
        python=facts.python,
        wheels=_named(taken),
    )
    limits = limits_under(targets, facts.cores or 1)
    brief = _BRIEF if options.rounds == 0 else effort([parcel.bundle], quick=False)
    measured = device.ask(
        op="measure", release=built["release"], spec={**limits, **brief}, rounds=max(1, options.rounds)
    )
    results = [read_mapping(MeasureResult, values) for values in measured["results"]]
    if options.rounds:
        result.report = judge_device(
            parcel.bundle, host.name, results, targets, measured["environment"], options.command
        )
    elif dead := [r for r in results if not r.ok]:
        raise FleetError(f"the new version cannot be measured: {dead[0].reason}")
    if result.report is not None and not options.even_if_missed and (miss := _missed(result.report)):
        result.outcome, result.reason = "kept", miss
        result.hint = "the version before runs on; --even-if-missed switches all the same"
        tell(f"not switched to: {miss}")
        return
    release: dict[str, Any] = {**built["release"], "figures": measured["figures"]}
    done = device.ask(op="activate", release=release, **host.owner_commands)
    result.outcome = "unchanged" if result.proved[0] == release["id"] else "switched"
    if result.outcome == "switched" and not done["switched"]:
        result.notes.append("the link was lost behind the switch; the device proved it all the same, health and all")
        tell(f"note: {result.notes[-1]}")
    tell(result.outcome)


def _send_missing(
    parcel: Parcel,
    wheels: Sequence[tuple[str, Piece]],
    device: Connection,
    result: PushResult,
    tell: Callable[[str], None],
) -> None:
    """Send what the device lacks of a bundle, and wheels unless an environment is made from them already."""
    pieces = list(parcel.files.values())
    if wheels:
        requirements = parcel.files["requirements.txt"].path.read_text(encoding="utf-8")
        python, names = device.facts.python, _named(wheels)
        if device.ask(op="python", requirements=requirements, python=python, wheels=names)["python"]:
            wheels = ()
    pieces += [wheel for _, wheel in wheels]
    found = device.ask(op="missing", files={piece.sha256: piece.bytes for piece in pieces})
    have: dict[str, int] = found["missing"]
    lacking = {piece.sha256: piece for piece in pieces if piece.sha256 in have}
    to_send = sum(piece.bytes - have[digest] for digest, piece in lacking.items())
    check_disk(found["disk_free_bytes"], to_send + sum(wheel.bytes for _, wheel in wheels) * _UNPACKED)
    resumed = sum(have.values())
    tell(f"sending {to_send / 1e6:,.2f} MB" + (f", {resumed / 1e6:,.2f} MB came before" if resumed else ""))
    device.send_files([(piece, have[digest]) for digest, piece in lacking.items()])
    result.sent_bytes = max(result.sent_bytes, to_send)


def _named(wheels: Sequence[tuple[str, Piece]]) -> list[tuple[str, str]]:
    """Names and hashes."""
    return [(name, wheel.sha256) for name, wheel in wheels]


def _missed(report: Report) -> str:
    """The limits that are missed, or the process that died; empty for none."""
    failed = [describe_miss(v) for v in report.verdicts if v.verdict == "FAIL"]
    dead = [row.reason for row in report.rows if row.runs_ok < row.runs]
    return "; ".join(failed or dead)


class _WheelShelf:
    """Wheels by kind of device, collected once for all devices of a kind."""

    def __init__(self, scratch: Path, source: Path | None):
        self._scratch, self._source = scratch, source
        self._found: dict[str, list[tuple[str, Piece]]] = {}
        self._lock = threading.Lock()

    def get(self, parcel: Parcel, device: Connection) -> list[tuple[str, Piece]]:
        """Names and files."""
        facts = device.facts
        kind = f"{facts.machine}-{'.'.join(map(str, facts.python_version[:2]))}-{'.'.join(map(str, facts.glibc))}"
        with self._lock:
            if kind not in self._found:
                folder = self._scratch / kind
                paths = collect_wheels(parcel.bundle.path / "requirements.txt", facts, folder, self._source)
                self._found[kind] = [(p.name, Piece(p, hash_file(p), p.stat().st_size)) for p in paths]
            return self._found[kind]


def whoami() -> str:
    """Who pushes, as a device tells others that push at the same time."""
    return f"{getpass.getuser()} on {socket.gethostname()}"
