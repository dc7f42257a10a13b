#!/usr/bin/env python3
"""How long does a bundle take to devices, does one of many wait for others, and does a kill ever leave a mix?

Devices are folders behind sshds of their own on the loopback address, whose Python has the packages already: what is
timed is all but the network. All of them share this machine's cores, which real ones do not.

- push: a bundle of 1 MB to a new device, verified, golden tokens compared, a record of 3 rounds, the switch
- update: the same with one file changed; what is measured is a moment, as `--rounds 0` does
- many: 20 devices in one push, 4 at a time, two of which are killed while it goes on; each one's time against one alone
- kills: the desk's or the device's processes are killed at random moments of push, update and rollback; after each the
  device has to answer golden prompts of a whole version

Needs OpenSSH's server. About 6 minutes.
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from record import describe_setting, write_result

from ryot.fleet.inventory import Host
from ryot.fleet.push import PushOptions, PushResult, prepare, push_all
from tests.device_bundle import write_device_bundle
from tests.fleet.conftest import rewrite_manifest, run_current
from tests.fleet.kills import Desk, kill_command
from tests.fleet.sshd import Sshd

LIMITS = {"push_s": 15.0, "update_s": 3.0, "many_ratio": 3.0}


class Lab:
    """Devices, and two versions of a bundle."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.first = write_device_bundle(folder / "first", seed=1)
        self.second = Path(shutil.copytree(self.first, folder / "second"))
        (self.second / "requirements.txt").write_text((self.second / "requirements.txt").read_text() + "# second\n")
        rewrite_manifest(self.second, name="second")
        self.servers: dict[str, Sshd] = {}

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
    [result] = lab.push(lab.first, ["victim"], rounds=0)
    assert result.outcome == "switched", result.reason
    log: list[dict[str, Any]] = []

    def wait(desk: Desk) -> None:
        end = time.monotonic() + rng.uniform(0.3, 4.0)
        while time.monotonic() < end and desk.poll() is None:
            time.sleep(0.005)

    for number in range(kills):
        action = rng.choice(["push", "update", "rollback"])
        bundle = {"push": lab.first, "update": lab.second, "rollback": None}[action]
        side = rng.choice(["device", "desk"])
        found = kill_command(server, root, bundle, on_device=side == "device", wait=wait)
        log.append(
            {
                "action": action,
                "side": side,
                "ended_before": found.too_late,
                "pending": found.pending,
                "answers": [
                    done.stdout.split(":")[0] if done.returncode == 0 else done.stderr for done in found.answers
                ],
                "whole": found.is_whole,
            }
        )
        print(f"kill {number + 1}: {log[-1]}", file=sys.stderr)
    [last] = lab.push(lab.first, ["victim"], rounds=0)
    return {
        "kills": sum(not entry["ended_before"] for entry in log),
        "tried": kills,
        "mixes": sum(not entry["whole"] for entry in log),
        "left_pending": sum(entry["pending"] for entry in log),
        "last_push": last.outcome,
        "log": log,
    }


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
        rows.append(f"| switches that the next push had to prove | | {kills['left_pending']} |")
    cpu = found["setting"]["environment"]["cpu"]
    return f"# Fleet\n\n{cpu['model']}, {cpu['cores']} cores, loopback.\n\n" + "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=("push", "many", "kills"), default=["push", "many", "kills"])
    parser.add_argument("--repeats", type=int, default=5, help="pushes and updates that are timed")
    parser.add_argument("--hosts", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=4, help="hosts at a time; they share this machine's cores")
    parser.add_argument("--kills", type=int, default=60, help="some come after the end; 50 should count")
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
