"""The same program run on a device by hand, for one that nothing can be sent to: `python ryot-device.pyz -h`."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ryot.edge.bundle import hash_file
from ryot.edge.trust import UNLISTED, check_whole
from ryot.errors import FleetError, RyotError
from ryot.fleet.device.agent import Agent, describe_error, open_root
from ryot.fleet.device.checks import BRIEF, MAX_SLOWDOWN
from ryot.fleet.device.environment import PIP_ENVIRONMENT_BYTES, UNPACKED
from ryot.fleet.device.kit_hashes import hash_wheels
from ryot.fleet.device.processes import user_name
from ryot.fleet.device.store import Root, identify


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks; returns the exit code."""
    os.umask(0o022)  # whoever runs the bundle may be another user, and so need the environment that is made
    parser = argparse.ArgumentParser(prog="ryot-device.pyz", description="Install a bundle on this device, or go back.")
    parser.add_argument("--root", type=Path, default=Path("~/.local/share/ryot"), help="default: %(default)s")
    parser.add_argument("--restart", default="", metavar="COMMAND", help="what makes a service take up a new version")
    parser.add_argument("--health", default="", metavar="COMMAND", help="what has to succeed for a new version to stay")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to make an environment from")
    parser.add_argument("--trusted-keys", type=Path, help="take only what these keys signed, from now on")
    parser.add_argument(
        "--max-slowdown", type=float, default=MAX_SLOWDOWN, metavar="X",
        help="keep the version before when the new one takes more than X times as long, default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--python", default=sys.executable, help="default: the one that runs this")
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install", help="install a bundle from a folder, and switch to it when it works")
    install.add_argument("bundle", type=Path)
    commands.add_parser("status", help="show what is installed")
    commands.add_parser("rollback", help="return to the last good version before the current one")
    options = parser.parse_args(arguments)
    try:
        for line in _run(options):
            sys.stdout.write(f"{line}\n")
    except (RyotError, OSError) as error:
        said = describe_error(error)
        sys.stderr.write(f"Error: {said['error']}\n" + (f"hint: {said['hint']}\n" if said["hint"] else ""))
        return 1
    return 0


def _run(options: argparse.Namespace) -> Iterator[str]:
    root = Root(options.root.expanduser().absolute())
    agent = Agent(root, lambda what: _note(what))
    if options.command == "status":
        if not root.path.is_dir():
            raise FleetError(f"{root.path}: nothing was installed there")
        yield from _describe(agent.status({"check": True}))
        return
    owner: dict[str, Any] = {"restart": options.restart, "health": options.health, "health_wait_s": 30.0}
    with open_root(root, secrets.token_hex(16), user_name()):
        agent.recover()
        if options.command == "rollback":
            agent.rollback(owner)
        else:
            _install(root, agent, options, owner)
        yield from _describe(agent.status({}))


def _install(root: Root, agent: Agent, options: argparse.Namespace, owner: dict[str, Any]) -> None:
    if options.trusted_keys is not None:
        agent.trust({"keys": options.trusted_keys.read_text(encoding="utf-8")})
    bundle, _ = check_whole(options.bundle, root.load_keys())
    named = options.python
    python = shutil.which(str(Path(named).expanduser()) if named.startswith("~") else named)
    if python is None:
        raise FleetError(f"--python: got {options.python!r}, expected a Python that can be run")
    python = str(Path(python).absolute())
    unlisted = {name: hash_file(bundle.path / name) for name in UNLISTED if (bundle.path / name).exists()}
    files = {name: entry.sha256 for name, entry in bundle.files.items()} | unlisted
    hashed = hash_wheels(options.wheels, root.load_keys()) if options.wheels else []
    wheels = [(path.name, digest) for path, digest in hashed]
    requirements = (bundle.path / "requirements.txt").read_text(encoding="utf-8")
    there = agent.python({"requirements": requirements, "python": python, "wheels": wheels})["python"]
    needed = sum((bundle.path / name).stat().st_size for name in files)
    if there is None:
        needed += (1 + UNPACKED) * sum(path.stat().st_size for path, _ in hashed) if hashed else PIP_ENVIRONMENT_BYTES
    if needed > (free := shutil.disk_usage(root.path).free):
        raise FleetError(f"the disk has {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB are needed")
    for name, digest in files.items():
        root.adopt(bundle.path / name, digest)
    for path, digest in hashed if there is None else ():
        root.adopt(path, digest)
    built = agent.build(
        {
            "bundle": identify(*(unlisted.get(name, "-") for name in UNLISTED)),
            "files": files,
            "python": python,
            "wheels": wheels,
        }
    )
    asked = {"spec": BRIEF, "rounds": 1, "max_slowdown": options.max_slowdown}
    measured = agent.measure({"release": built["release"], **asked})
    if dead := [r for r in measured["results"] if not r["ok"]]:
        raise FleetError(f"the new version cannot be measured: {dead[0]['reason']}")
    if measured["slower"]:
        raise FleetError(f"not switched to: {measured['slower']}", hint="--max-slowdown N takes slower ones")
    agent.activate({"release": {**built["release"], "figures": measured["figures"]}, **owner})


def _note(what: str) -> None:
    sys.stderr.write(f"{what}\n")


def _describe(status: dict[str, Any]) -> Iterator[str]:
    current = status["current"]
    if current is None:
        yield "nothing runs"
        return
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(current["installed_at"]))
    yield f"runs: {current['name']} {current['precision']} {current['id']}, installed {since}"
    for name, unit in (("ttft_ms", "ms to the first token"), ("decode_tok_s", "tokens/s")):
        if name in current["figures"]:
            yield f"  {current['figures'][name]:.2f} {unit}"
    if status.get("golden"):
        yield f"  {status['golden']}"
    for release in status["good"]:
        if release["id"] != current["id"]:
            yield f"before: {release['name']} {release['precision']} {release['id']}"
