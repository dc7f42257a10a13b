"""The program on a device: does what the desk asks, one request after another, and ends when the desk is silent.

A new version is verified and measured where it lies, before anything points to it. The switch is one rename; behind it
the version has to prove itself once more, and if it does not, the last good one comes back. A switch whose proof was
interrupted is proved by the next push.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from ryot.edge.trust import check_signatures, parse_trusted_keys
from ryot.errors import BundleError, FleetError, RyotError
from ryot.fleet.device import checks, processes
from ryot.fleet.device.environment import check_can_make, existing_python, find_python
from ryot.fleet.device.store import DamagedFile, Release, Root, State, identify, write_whole
from ryot.fleet.device.wire import Wire, WireError

#: A desk that sends nothing for so long is gone, whatever the connection says: sshd may take hours to notice.
SILENCE_S = 60.0
#: Releases that stay: what runs, and what a rollback returns to.
KEEP = 2


class Agent:
    """What can be done to a root; requests and answers are plain values. `tell` hears of progress."""

    def __init__(self, root: Root, tell: Callable[[str], None]):
        self._root, self.tell = root, tell
        self.switching = threading.Lock()
        """Held from a switch to its proof, which have to be seen through."""

    def recover(self) -> str | None:
        """Prove, or take back, a switch that nobody lived to see proved; the release that had proved itself before."""
        state = self._root.read_state()
        if state.pending is None:
            return self._root.current_id()
        self.tell("proving a switch that was interrupted")
        try:
            with self.switching:
                self._root.write_state(self._prove(state))
        except FleetError as error:
            self.tell(f"took back a switch that was interrupted: {error}")
        before: str | None = state.pending["back"]
        return before

    def status(self, request: dict[str, Any]) -> dict[str, Any]:
        state, current = self._root.read_state(), self._root.current_id()
        usage = shutil.disk_usage(self._root.path)
        answer: dict[str, Any] = {
            "current": state.releases[current]._asdict() if current in state.releases else None,
            "good": [state.releases[i]._asdict() for i in state.good if i in state.releases],
            "pending": state.pending is not None,
            "disk_free_bytes": usage.free,
            "now": time.time(),
            "trusted_keys": self._root.trusted_keys.exists(),
        }
        if request.get("check") and current is not None:
            answer["golden"] = checks.check_golden([str(self._root.current / "run")], "the current version")
        return answer

    def trust(self, request: dict[str, Any]) -> dict[str, Any]:
        parse_trusted_keys(request["keys"], "trusted keys")
        content = request["keys"].encode()
        before = self._root.trusted_keys.read_bytes() if self._root.trusted_keys.exists() else None
        if before != content:
            write_whole(self._root.trusted_keys, content)
        return {"changed": before is not None and before != content}

    def missing(self, request: dict[str, Any]) -> dict[str, Any]:
        missing = self._root.find_missing(request["files"])
        free = shutil.disk_usage(self._root.path).free
        return {"missing": missing, "disk_free_bytes": free}

    def python(self, request: dict[str, Any]) -> dict[str, Any]:
        """The Python that is there for a bundle already, so that wheels need not be sent; or that one can be made."""
        wheels = [(name, digest) for name, digest in request["wheels"]]
        found = existing_python(self._root, request["requirements"], python=request["python"], wheels=wheels)
        if found is None:
            check_can_make(request["python"], with_pip=not wheels)
        return {"python": found}

    def build(self, request: dict[str, Any]) -> dict[str, Any]:
        """The bundle and a Python for it, put together, verified, and its golden tokens compared."""
        self.tell("verifying")
        bundle, signer = self._root.build_bundle(request["files"], request["bundle"])
        python = find_python(
            self._root,
            (bundle.path / "requirements.txt").read_text(encoding="utf-8"),
            python=request["python"],
            wheels=[(name, digest) for name, digest in request["wheels"]],
            tell=self.tell,
        )
        self.tell("comparing golden tokens")
        golden = checks.check_golden([python, "-B", "-s", str(bundle.path / "run.py")], "the new version")
        release = Release(
            id=identify(request["bundle"], python),
            bundle=request["bundle"],
            name=bundle.name,
            precision=bundle.precision,
            python=python,
            signed_by="" if signer is None else str(signer.key),
            installed_at=time.time(),
            figures={},
        )
        return {"release": release._asdict(), "golden": golden}

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        release = Release(**request["release"])
        self.tell(f"measuring, {request['rounds']} round{'s' * (request['rounds'] != 1)}")
        found = checks.measure(release.python, self._root.bundle(release.bundle), request["spec"], request["rounds"])
        figures = checks.summarize(found["results"])
        factor = request["max_slowdown"]
        slower = "" if factor is None else self._find_slowdown(release, figures, request["spec"], factor)
        return found | {"figures": figures, "slower": slower}

    def _find_slowdown(self, release: Release, figures: dict[str, float], spec: dict[str, Any], factor: float) -> str:
        """How a release is slower, by more than `factor`, than the one that runs; empty when it is not.

        Where its record says so the two are measured again by turns: the record may be of other limits, or the device
        may have been busy just now.
        """
        state, current = self._root.read_state(), self._root.current_id()
        if current is None or current == release.id or current not in state.releases:
            return ""
        before = state.releases[current]
        if not checks.describe_slowdown(before.figures, figures, factor):
            return ""
        self.tell(f"it seems slower than {before.name}; measuring both")
        results = []
        for one in (before, release):
            try:
                found = checks.measure(one.python, self._root.bundle(one.bundle), {**spec, **checks.BRIEF}, 1)
            except FleetError as error:
                self.tell(f"cannot tell whether it is slower: {error}")
                return ""
            results.append(found["results"])
        lengths = {r.get("prompt_tokens") for one in results for r in one}
        old, new = map(checks.summarize, results)
        if len(lengths) > 1:  # each is measured with prompts of its own context
            old.pop("ttft_ms", None)
        return checks.describe_slowdown(old, new, factor)

    def activate(self, request: dict[str, Any]) -> dict[str, Any]:
        release = Release(**request["release"])
        self._root.build_release(release)
        state = self._root.read_state()
        state.releases[release.id] = release
        if release.id == self._root.current_id() and release.id in state.good:
            self._root.write_state(state)
            self._root.remove_incoming()
            return {"switched": False}
        self._switch(state, release.id, request)
        return {"switched": True}

    def rollback(self, request: dict[str, Any]) -> dict[str, Any]:
        state, current = self._root.read_state(), self._root.current_id()
        earlier = [i for i in state.good if i != current]
        if not earlier:
            raise FleetError("there is no earlier good version to return to", hint="push one")
        # A key may have been revoked since; whether the files are whole is seen when the switch is proved.
        check_signatures(self._root.bundle(state.releases[earlier[-1]].bundle), self._root.load_keys())
        self._switch(state, earlier[-1], {**request, "forget": current})
        return {"current": state.releases[earlier[-1]]._asdict()}

    def _switch(self, state: State, release_id: str, request: dict[str, Any]) -> None:
        back = self._root.current_id()
        pending = {
            "to": release_id,
            "back": back,
            "forget": request.get("forget"),
            "restart": request.get("restart", ""),
            "health": request.get("health", ""),
            "health_wait_s": request.get("health_wait_s", 0.0),
        }
        state = state._replace(pending=pending)
        self.tell("switching")
        with self.switching:
            self._root.write_state(state)
            self._root.point_current(release_id)
            self._root.remove_unused(self._prove(state), KEEP, left=back)

    def _prove(self, state: State) -> State:
        """The state with the pending switch confirmed; if it cannot be, it is taken back and `FleetError` raised."""
        pending = state.pending
        assert pending is not None
        current = self._root.current_id()
        try:
            if pending["restart"]:
                checks.run_owner_command(pending["restart"], "restart")
            if current is not None:
                checks.check_golden([str(self._root.current / "run")], "the version that was switched to")
            if pending["health"]:
                checks.run_owner_command(pending["health"], "health", pending["health_wait_s"])
            serial = self._serial_of_current()
        except (FleetError, BundleError) as error:
            self._root.point_current(pending["back"])
            self._root.write_state(state._replace(pending=None))
            if pending["restart"] and pending["back"] is not None:
                checks.run_owner_command(pending["restart"], "restart")
            what = "nothing runs" if pending["back"] is None else "the version before runs again"
            raise FleetError(f"{error}; {what}", hint=error.hint) from error
        good = [i for i in state.good if i not in (current, pending.get("forget"))] + ([current] if current else [])
        return state._replace(good=good, pending=None, serial=max(state.serial, serial))

    def _serial_of_current(self) -> int:
        """The number of its trusted signature; 0 where there is none, or nobody is trusted."""
        keys, folder = self._root.load_keys(), self._root.current / "bundle"
        signer = check_signatures(folder, keys) if keys is not None and folder.exists() else None
        return 0 if signer is None else signer.serial


def serve() -> None:
    """Serve the desk at the other end of stdin and stdout. The first request says which root, and who asks."""
    os.umask(0o022)  # whoever runs the bundle may be another user, and so need the environment that is made
    wire = Wire(0, 1, SILENCE_S)
    try:
        try:
            _serve(wire, wire.receive())
        except WireError:
            raise
        except (RyotError, OSError) as error:
            wire.send(describe_error(error))
        except Exception as error:  # the outermost edge: a bug here is to be told there, and not tried again
            wire.send({"error": f"{type(error).__name__}: {error}", "hint": "a fault of ryot's own"})
    except WireError:
        return


def _serve(wire: Wire, request: dict[str, Any]) -> None:
    root = Root(Path(request["root"]).expanduser().absolute())
    agent = Agent(root, lambda what: wire.send({"progress": what}))
    threading.Thread(target=_end_with_desk, args=(agent.switching,), daemon=True).start()
    if request["op"] == "look":
        if not root.path.is_dir():
            raise FleetError(f"{root.path}: nothing was pushed there")
        wire.send({})
        _answer_all(wire, root, {"status": agent.status})
    with open_root(root, request["session"], request["who"]):
        proved = agent.recover()
        wire.send({"root": str(root.path), "proved": proved})
        operations = {
            "trust": agent.trust,
            "missing": agent.missing,
            "python": agent.python,
            "build": agent.build,
            "measure": agent.measure,
            "activate": agent.activate,
            "rollback": agent.rollback,
        }
        _answer_all(wire, root, operations)


def _answer_all(
    wire: Wire, root: Root, operations: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]
) -> NoReturn:
    """Answer requests until the desk ends the connection, which raises `WireError`."""
    while True:
        request = wire.receive()
        if request["op"] == "put":
            count = request["bytes"] - request["offset"]
            root.receive(request["sha256"], request["offset"], wire.receive_bytes(count))
            wire.send({})
        else:
            wire.send(operations[request["op"]](request))


def _end_with_desk(switching: threading.Lock) -> None:
    """End this program, and what it runs, as soon as the desk is gone, but not in the middle of a switch."""
    poll = select.poll()
    poll.register(0, 0)  # the end of the connection is told unasked
    poll.poll()
    with switching:
        processes.end_all()
        os._exit(1)


@contextlib.contextmanager
def open_root(root: Root, session: str, who: str) -> Iterator[None]:
    """Make the folders where they are missing, and hold the lock. Raises `FleetError`."""
    try:
        root.make()
    except OSError as error:
        raise FleetError(
            f"{root.path}: cannot be made ({error.strerror})", hint="choose another folder with --root"
        ) from error
    with root.lock(session, who):
        yield


def describe_error(error: RyotError | OSError) -> dict[str, Any]:
    """An error as a line for the desk."""
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return {"error": "its disk is full", "hint": "make room; what came already is kept and not sent again"}
        where = f"{error.filename}: " if error.filename else ""
        return {"error": f"{where}{error.strerror or error}", "hint": None}
    return {"error": str(error), "hint": error.hint, "retry": isinstance(error, DamagedFile)}
