"""A folder for a device that nothing can be sent to: bundle, wheels, and the program that installs them, on a stick."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from ryot.atomic import atomic_folder, open_to_all
from ryot.edge.bundle import hash_file
from ryot.edge.trust import check_whole
from ryot.errors import ConfigError
from ryot.fleet.device.kit_hashes import HASHES_NAME, SIGNATURE_NAME
from ryot.fleet.facts import GLIBC_MIN, MACHINES, Facts
from ryot.fleet.program import write_program
from ryot.fleet.wheels import collect_wheels

PROGRAM_NAME = "ryot-device.pyz"
INSTALL_NAME = "install.sh"


def write_kit(
    bundle: Path,
    target: Path,
    *,
    machine: str,
    python: str,
    wheels: Path | None,
    sign: Callable[[bytes], bytes] | None = None,
) -> Path:
    """Make the kit for such a device, whole or not at all: `machine` as `uname -m` says it, `python` as 3.11.

    Wheels come from the folder `wheels`, or pip's own index. `sign` makes the Ed25519 signature of their hashes.
    """
    version = tuple(int(part) for part in python.split(".") if part.isdigit())
    if machine not in MACHINES or len(version) != 2:
        raise ConfigError(f"got {machine} and Python {python}, expected one of {', '.join(MACHINES)} and such as 3.11")
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise ConfigError(f"{target}: exists; a kit is written to a new or empty folder")
    check_whole(bundle)
    device = Facts(
        system="Linux", machine=machine, bits=64, libc=f"glibc {'.'.join(map(str, GLIBC_MIN))}", cores=1,
        memory_bytes=0, available_bytes=0, isa=(), clock_ahead_s=0.0, disk_free_bytes=0, writable=True, python="",
        python_version=version, python_bits=64,
    )  # fmt: skip
    with atomic_folder(target) as kit:
        shutil.copytree(bundle, kit / "bundle")
        collect_wheels(bundle / "requirements.txt", device, kit / "wheels", wheels)
        write_program(kit / PROGRAM_NAME)
        (kit / INSTALL_NAME).write_text((files("ryot.fleet") / INSTALL_NAME).read_text(encoding="utf-8"))
        (kit / INSTALL_NAME).chmod(0o755)
        hashes = _hash_all(kit)
        (kit / HASHES_NAME).write_bytes(hashes)
        if sign is not None:
            (kit / SIGNATURE_NAME).write_bytes(sign(hashes))
        open_to_all(kit)
    return target


def _hash_all(kit: Path) -> bytes:
    """What sha256sum would say of the kit's files; those of the bundle are in its own manifest."""
    names = [path.relative_to(kit).as_posix() for path in kit.rglob("*") if path.is_file()]
    own = sorted(name for name in names if not name.startswith("bundle/"))
    return "".join(f"{hash_file(kit / name)}  {name}\n" for name in own).encode()
