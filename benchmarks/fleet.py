#!/usr/bin/env python3
"""How long does a bundle take to devices, does one of many wait for others, and does a kill ever leave a mix?

Devices are folders behind sshds of their own on the loopback address, whose Python has the packages already: what is
timed is all but the network. All of them share this machine's cores, which real ones do not.

- push: a bundle of 1 MB to a new device, verified, golden tokens compared, a record of 3 rounds, the switch
- update: the same with one file changed; what is measured is a moment, as `--rounds 0` does
- many: 20 devices in one push, 4 at a time, two of which are killed while it goes on; each one's time against one alone
- kills: the desk's or the device's processes are killed at random moments of push (another model), update (one file of
  the same) and rollback; only a kill that met one at work counts. At once, and after whatever follows by itself, the
  device has to answer golden prompts of a whole version

Needs OpenSSH's server. About 6 minutes, of which the kills take 3.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from record import describe_setting, write_result

from ryot.fleet.device.store import Root
from ryot.fleet.inventory import Host
from ryot.fleet.push import PushOptions, PushResult, prepare, push_all
from ryot.fleet.status import roll_back
from tests.device_bundle import write_device_bundle
from tests.fleet.conftest import rewrite_manifest, run_current
from tests.fleet.sshd import Sshd, descendants, kill

LIMITS = {"push_s": 15.0, "update_s": 3.0, "many_ratio": 3.0}


class Lab:
    """Devices, and two versions each of two bundles."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.first, self.second = self._make_versions("a", seed=1)
        self.others = self._make_versions("b", seed=2)
        self.servers: dict[str, Sshd] = {}

    def _make_versions(self, name: str, seed: int) -> tuple[Path, Path]:
        """A bundle, and the same with one file changed."""
        first = write_device_bundle(self.folder / f"{name}1", seed=seed)
        second = Path(shutil.copytree(first, self.folder / f"{name}2"))
        (second / "requirements.txt").write_text((second / "requirements.txt").read_text() + "# second\n")
        for folder in (first, second):
            rewrite_manifest(folder, name=folder.name)
        return first, second

    def start(self, name: str) -> None:
        """A device whose processes have one core, by turns of those there are."""
        cores = sorted(os.sched_getaffinity(0))
        core = cores[len(self.servers) % len(cores)]
        self.servers[name] = Sshd(self.folder / name, name, before=("taskset", "-c", str(core)))
        self.config = self.folder / "ssh_config"
        self.config.write_text("".join(server.client_settings() for server in self.servers.values()))

    def root(self, name: str) -> Path:
        return self.folder / name / "device"

    def push(
        self, bundle: Path, names: list[str], *, rounds: int, jobs: int = 32, tell: Any = None
    ) -> list[PushResult]:
        hosts = [Host(name=name, root=str(self.root(name)), python=sys.executable) for name in names]
        options = PushOptions(rounds=rounds, ssh_config=self.config)
        quiet = tell or (lambda host, what: None)
        return push_all(prepare(bundle, None), hosts, options, jobs=jobs, scratch=self.folder / "scratch", tell=quiet)

    def close(self) -> None:
        for server in self.servers.values():
            server.close()


def time_push(lab: Lab, rounds: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of a first push and of an update, several times."""
    times: dict[str, list[float]] = {"push_s": [], "update_s": []}
    for number in range(repeats):
        name = f"single{number}"
        lab.start(name)
        for key, bundle, count in (("push_s", lab.first, rounds), ("update_s", lab.second, 0)):
            begin = time.monotonic()
            [result] = lab.push(bundle, [name], rounds=count)
            assert result.outcome == "switched", result.reason
            times[key].append(time.monotonic() - begin)
            print(f"{key} {times[key][-1]:.2f}", file=sys.stderr)
    return times


def push_many(lab: Lab, count: int, jobs: int, alone_s: float) -> dict[str, Any]:
    """What came of `count` devices at once, two of which die in the middle."""
    names = [f"device{number:02}" for number in range(count)]
    for name in names:
        lab.start(name)
    doomed = [names[count // 3], names[2 * count // 3]]

    def kill_when_it_works(host: str, what: str) -> None:
        if host in doomed and what == "comparing golden tokens":
            threading.Thread(target=lab.servers[host].close).start()

    begin = time.monotonic()
    results = lab.push(lab.first, names, rounds=0, jobs=jobs, tell=kill_when_it_works)
    wall_s = time.monotonic() - begin
    for name in doomed:
        del lab.servers[name]
    living = [r for r in results if r.host not in doomed]
    whole = all(run_current(lab.root(r.host)).returncode == 0 for r in living)
    return {
        "count": count,
        "jobs": jobs,
        "wall_s": wall_s,
        "alone_s": alone_s,
        "times_s": [r.wall_s for r in living],
        "killed": {r.host: r.reason for r in results if r.host in doomed},
        "rest_done": whole and all(r.outcome == "switched" for r in living),
    }


def kill_at_random(lab: Lab, kills: int, seed: int) -> dict[str, Any]:
    """Kill while things go on; how often the device did not answer with a whole version."""
    rng = random.Random(seed)
    lab.start("victim")
    server, root = lab.servers["victim"], lab.root("victim")
    # What each takes when nobody kills it: the moment of a kill is drawn within.
    spans = {"push": 0.0, "update": 0.0, "rollback": 0.0}
    assert _run_whole(lab, lab.first) > 0
    spans["update"], spans["push"] = _run_whole(lab, lab.second), _run_whole(lab, lab.others[0])
    spans["rollback"] = _run_whole(lab, None)
    print(f"unkilled: {', '.join(f'{name} {span:.2f} s' for name, span in spans.items())}", file=sys.stderr)
    log: list[dict[str, Any]] = []
    missed = 0
    while len(log) < kills:
        state, current = Root(root).read_state(), Root(root).current_id()
        assert current is not None
        name = state.releases[current].name
        choices = [*spans] if any(i != current for i in state.good) else ["push", "update"]
        action, side = rng.choice(choices), rng.choice(["device", "desk"])
        desk = _fork(lab, _bundle_for(lab, action, name))
        time.sleep(rng.uniform(0.0, spans[action]))
        alive = os.waitpid(desk, os.WNOHANG) == (0, 0)
        targets = server.sessions() if side == "device" else [*descendants(desk), desk] if alive else []
        kill(*targets)
        at_once = run_current(root)
        if alive:
            os.waitpid(desk, 0)  # it connects again where the device's side died
        if not alive or not targets:
            missed += 1
            continue
        after, state = run_current(root), Root(root).read_state()
        log.append(
            {
                "action": action,
                "side": side,
                "pending": state.pending is not None,
                "answers": [
                    done.stdout.split(":")[0] if done.returncode == 0 else done.stderr for done in (at_once, after)
                ],
                "whole": all(done.returncode == 0 for done in (at_once, after)),
            }
        )
        print(f"kill {len(log)}: {log[-1]}", file=sys.stderr)
    last_s = _run_whole(lab, lab.first)
    return {
        "kills": len(log),
        "missed": missed,
        "spans_s": spans,
        "mixes": sum(not entry["whole"] for entry in log),
        "left_pending": sum(entry["pending"] for entry in log),
        "last_push_s": last_s,
        "log": log,
    }


def _bundle_for(lab: Lab, action: str, current: str) -> Path | None:
    """What is pushed where the version named `current` runs; None for a rollback."""
    if action == "rollback":
        return None
    own, other = (
        ((lab.first, lab.second), lab.others) if current.startswith("a") else (lab.others, (lab.first, lab.second))
    )
    return other[0] if action == "push" else next(path for path in own if path.name != current)


def _act(lab: Lab, bundle: Path | None) -> bool:
    """Push to the victim, or take it back; whether that worked."""
    if bundle is not None:
        return lab.push(bundle, ["victim"], rounds=0)[0].outcome != "failed"
    host = Host(name="victim", root=str(lab.root("victim")), python=sys.executable)
    return not roll_back([host], lab.config, jobs=1, tell=lambda host, what: None)[0].error


def _run_whole(lab: Lab, bundle: Path | None) -> float:
    begin = time.monotonic()
    assert _act(lab, bundle)
    return time.monotonic() - begin


def _fork(lab: Lab, bundle: Path | None) -> int:
    """A desk in a process of its own, which has imported all it needs already."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if _act(lab, bundle) else 1)
    return pid


def render(found: dict[str, Any]) -> str:
    """The result for people."""
    rows = ["| what | limit | measured |", "|:--|--:|--:|"]
    for key, what in (("push_s", "push, 1 MB, 3 rounds"), ("update_s", "update of one file")):
        if key in found:
            times = found[key]
            rows.append(f"| {what} | {LIMITS[key]:g} s | {statistics.median(times):.1f} s (to {max(times):.1f}) |")
    if many := found.get("many"):
        ratio = max(many["times_s"]) / many["alone_s"]
        rows.append(
            f"| slowest of {many['count']} at once, {many['jobs']} at a time, by one alone | {LIMITS['many_ratio']:g} "
            f"| {ratio:.2f} ({max(many['times_s']):.1f} s by {many['alone_s']:.1f} s; all in {many['wall_s']:.1f} s) |"
        )
        rows.append(f"| killed ones reported, rest done | yes | {len(many['killed'])}, {many['rest_done']} |")
    if kills := found.get("kills"):
        rows.append(f"| kills that left no whole version | 0 | {kills['mixes']} of {kills['kills']} |")
        sides = Counter(f"{entry['action']}, {entry['side']}" for entry in kills["log"])
        rows.append(f"| of which | | {'; '.join(f'{what}: {count}' for what, count in sorted(sides.items()))} |")
        rows.append(f"| switches that the next push had to prove | | {kills['left_pending']} |")
    cpu = found["setting"]["environment"]["cpu"]
    return f"# Fleet\n\n{cpu['model']}, {cpu['cores']} cores, loopback.\n\n" + "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=("push", "many", "kills"), default=["push", "many", "kills"])
    parser.add_argument("--repeats", type=int, default=5, help="pushes and updates that are timed")
    parser.add_argument("--hosts", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=4, help="hosts at a time; they share this machine's cores")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results")
    options = parser.parse_args()
    found: dict[str, Any] = {"setting": describe_setting()}
    lab = Lab(Path(tempfile.mkdtemp(prefix="ryotfleet")))
    try:
        if "push" in options.only:
            found |= time_push(lab, 3, options.repeats)
        if "many" in options.only:
            lab.start("alone")
            alone = [r.wall_s for _ in range(3) for r in _afresh(lab)]
            found["many"] = push_many(lab, options.hosts, options.jobs, statistics.median(alone))
        if "kills" in options.only:
            found["kills"] = kill_at_random(lab, options.kills, options.seed)
    finally:
        lab.close()
        shutil.rmtree(lab.folder, ignore_errors=True)
    text = render(found)
    print(text)
    if options.output:
        write_result("fleet", found, text, options.output)
    else:
        write_result("fleet", found, text)


def _afresh(lab: Lab) -> list[PushResult]:
    """A first push to the device that has none beside it."""
    shutil.rmtree(lab.root("alone"), ignore_errors=True)
    return lab.push(lab.first, ["alone"], rounds=0)


if __name__ == "__main__":
    main()
