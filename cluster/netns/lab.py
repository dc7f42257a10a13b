#!/usr/bin/env python3
"""Several hosts on one Linux machine: network namespaces joined by a bridge, a Ray node in each.

    lab.py up [HOSTS] [CPUS]   start HOSTS hosts (2) of CPUS cores each (1); the first is Ray's head
    lab.py exec HOST CMD...    run CMD on host HOST (1 is the head) with the cluster's token
    lab.py cut HOST            cut the host's link; what runs there goes on, unreachable
    lab.py heal HOST           put the link back (Ray wants its node started again: `lab.py join HOST`)
    lab.py join HOST           start the Ray node of a host again
    lab.py kill HOST           SIGKILL the Ray node of a host; its workers are orphans for some seconds
    lab.py down                end everything and remove it

It needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN), `ip`, and the Python of an environment with ryot and Ray. Its state is
in RYOT_LAB (/tmp/ryot-lab), a folder that only its owner can read; two labs need different ones, and different
networks in RYOT_LAB_NET (10.77.0). Never use `ray stop` here: it ends every Ray of the machine.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

from ryot.cluster import reaper

LAB = Path(os.environ.get("RYOT_LAB", "/tmp/ryot-lab"))
NET = os.environ.get("RYOT_LAB_NET", "10.77.0")
HEAD = f"{NET}.1:6379"
NAME = f"ryot{zlib.crc32(str(LAB).encode()) % 10000:04d}"

#: A node counts as lost after at most 3 x (1.5 + 2.5) s, as with the other files here: see `cluster/README.md`.
HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "1500",
    "RAY_health_check_timeout_ms": "2500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "0",
}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def namespace(host: object) -> str:
    return f"{NAME}-{host}"


def token_environment() -> dict[str, str]:
    return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": (LAB / "token").read_text()}


def start_node(host: int, cpus: int) -> None:
    """Start a host's Ray node in the background, on cores of its own as far as there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    own = {cores[((host - 1) * cpus + i) % len(cores)] for i in range(cpus)}
    role = ["--head", "--port=6379", "--include-dashboard=false"] if host == 1 else [f"--address={HEAD}"]
    command = [
        *("ip", "netns", "exec", namespace(host), str(Path(sys.executable).with_name("ray")), "start", *role),
        *(f"--node-ip-address={NET}.{host}", f"--num-cpus={cpus}", f'--resources={{"host{host}": 1}}'),
        *("--object-store-memory=80000000", f"--temp-dir={LAB / str(host)}", "--disable-usage-stats", "--block"),
    ]
    environment = {**token_environment(), **HEALTH_CHECKS, "RAY_worker_niceness": "0", reaper.MARK: str(LAB)}
    with (LAB / f"{host}.log").open("ab") as said:
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, own),
        )


_COUNT_NODES = "from ray._raylet import GcsClient; import sys; \
print(sum(n.state == 0 for n in GcsClient(address=sys.argv[1]).get_all_node_info().values()))"


def wait_for_nodes(count: int, timeout_s: float = 60.0) -> None:
    """Wait until the head knows `count` living nodes."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        asked = subprocess.run(
            ["ip", "netns", "exec", namespace(1), sys.executable, "-c", _COUNT_NODES, HEAD],
            env=token_environment(),
            capture_output=True,
            text=True,
        )
        if asked.returncode == 0 and int(asked.stdout) >= count:
            return
        time.sleep(0.3)
    logs = "\n".join(p.read_text()[-500:] for p in sorted(LAB.glob("*.log")))
    raise SystemExit(f"lab: {count} nodes expected within {timeout_s:g} s\n{logs}")


def up(hosts: int, cpus: int) -> None:
    LAB.mkdir(mode=0o700)
    (LAB / "token").touch(mode=0o600)
    (LAB / "token").write_text(secrets.token_hex(32))
    (LAB / "cpus").write_text(str(cpus))
    switch = namespace("switch")
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for host in range(1, hosts + 1):
            own = namespace(host)
            ip("netns", "add", own)
            ip("-n", own, "link", "set", "lo", "up")
            ip(*f"link add eth0 netns {own} type veth peer name port{host} netns {switch}".split())
            ip("-n", switch, "link", "set", f"port{host}", "master", "bridge", "up")
            ip("-n", own, "addr", "add", f"{NET}.{host}/24", "dev", "eth0")
            ip("-n", own, "link", "set", "eth0", "up")
        start_node(1, cpus)
        wait_for_nodes(1)
        for host in range(2, hosts + 1):
            start_node(host, cpus)
        wait_for_nodes(hosts)
    except BaseException:
        down()
        raise


def kill(host: int) -> None:
    """End the host's raylet, and nothing else, without a word."""
    for pid in reaper.find_marked(LAB, programs=("raylet",)):
        inside = subprocess.run(["ip", "netns", "identify", str(pid)], capture_output=True, text=True, check=True)
        if inside.stdout.strip() == namespace(host):
            os.kill(pid, signal.SIGKILL)


def down() -> None:
    reaper.end_marked(LAB)
    known = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for line in known.splitlines():
        if line.startswith(f"{NAME}-"):
            ip("netns", "del", line.split()[0])
    shutil.rmtree(LAB, ignore_errors=True)


def main(arguments: list[str]) -> int:
    match arguments:
        case ["up", *numbers] if len(numbers) <= 2:
            hosts, cpus = [*map(int, numbers), *(2, 1)[len(numbers) :]]
            up(hosts, cpus)
            sys.stdout.write(f"{HEAD}\n")
        case ["exec", host, *command] if command:
            os.execvpe("ip", ["ip", "netns", "exec", namespace(host), *command], token_environment())
        case ["cut" | "heal" as action, host]:
            state = "down" if action == "cut" else "up"
            ip("-n", namespace("switch"), "link", "set", f"port{host}", state)
        case ["join", host]:
            start_node(int(host), int((LAB / "cpus").read_text()))
        case ["kill", host]:
            kill(int(host))
        case ["down"]:
            down()
        case _:
            sys.stderr.write(__doc__ or "")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
