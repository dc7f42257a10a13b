"""Wheels that are taken along to a device without network: chosen by pip here, for the processor and Python there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ryot.errors import FleetError
from ryot.fleet.facts import Facts

#: Older names of platforms, for the wheels that still carry them (PEP 600).
_LEGACY = {(2, 17): "manylinux2014"}
_OLDEST_GLIBC = 17


def platform_tags(facts: Facts) -> list[str]:
    """Tags of wheels that such a device takes, newest first."""
    major, minor = facts.glibc[:2]
    tags = [f"manylinux_{major}_{n}_{facts.machine}" for n in range(minor, _OLDEST_GLIBC - 1, -1)]
    return tags + [f"{name}_{facts.machine}" for version, name in _LEGACY.items() if version <= facts.glibc]


def collect_wheels(requirements: Path, facts: Facts, folder: Path, source: Path | None) -> list[Path]:
    """The wheels of a bundle's requirements for a device, in `folder`; from `source`, a folder, or pip's own index.

    Raises `FleetError` when they cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    major, minor = facts.python_version[:2]
    options = ["--only-binary=:all:", "--implementation=cp", f"--python-version={major}.{minor}"]
    options += [f"--abi={abi}" for abi in (f"cp{major}{minor}", "abi3", "none")]
    options += [f"--platform={tag}" for tag in platform_tags(facts)]
    if source is not None:
        options += ["--no-index", f"--find-links={source}"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", f"--dest={folder}"]
    command += [*options, "-r", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=1800, check=False)
    except subprocess.TimeoutExpired as error:
        raise FleetError(
            "pip has not collected its wheels in half an hour", hint="give a folder that has them with --wheels DIR"
        ) from error
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.startswith("ERROR")]
        reason = said[-1].removeprefix("ERROR: ") if said else done.stderr.strip()[-200:]
        raise FleetError(
            f"no wheels for {facts.machine} and Python {major}.{minor}: {reason}",
            hint="give a folder that has them with --wheels DIR",
        )
    return sorted(folder.glob("*.whl"))
