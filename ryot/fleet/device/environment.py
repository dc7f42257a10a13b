"""The Python that runs a bundle on a device: one that has what `requirements.txt` lists, or an environment made for it.

With wheels that were sent along an environment is made by unpacking them, which is all that installing these packages
takes: the device needs neither pip nor ensurepip, no network and no right clock.
"""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from ryot.errors import FleetError
from ryot.fleet.device.processes import error_of, run
from ryot.fleet.device.store import Root, identify, sync

#: Prints what an interpreter has of the packages that it is given.
_ASK = """
import importlib.metadata as m, sys
for name in sys.argv[1:]:
    try: print(m.version(name))
    except m.PackageNotFoundError: print("-")
"""
_PIP_TIMEOUT_S = 1800
#: An environment that pip made of onnxruntime 1.32, numpy 2.4, tokenizers 0.23 and what they ask for had 235 MB on
#: x86_64 in November 2026; pip unpacks the 60 MB of wheels elsewhere.
PIP_ENVIRONMENT_BYTES = 250_000_000
#: Wheels beside what is unpacked from them, which is some four times their size.
UNPACKED = 5
#: Of a wheel's `.data` folder, what goes to where modules are found.
_LIBRARY_PARTS = ("purelib", "platlib")


def find_python(
    root: Root, requirements: str, *, python: str, wheels: Sequence[tuple[str, str]], tell: Callable[[str], None]
) -> str:
    """A Python that has what `requirements` (a bundle's file) lists: `python` itself, or an environment made from it.

    `wheels` are the names and hashes of those that came along; without any, pip on the device installs from its index.
    """
    if there := existing_python(root, requirements, python=python, wheels=wheels):
        return there
    wanted = _wanted(requirements)
    target = _place(root, wanted, python, wheels)
    own = str(target / "bin" / "python")
    shutil.rmtree(target, ignore_errors=True)
    # pip may outlive a push that was killed: what it goes on to write must not be in the way of the next one.
    stage = target.with_name(f".{target.name}-{os.getpid()}")
    if wheels:
        tell(f"making an environment from {len(wheels)} wheels")
        _run([python, "-I", "-m", "venv", "--without-pip", str(stage)])
        library = next((stage / "lib").glob("python*/site-packages"))
        for name, digest in wheels:
            unpack_wheel(root.incoming / digest, name, library)
    else:
        tell("making an environment with pip")
        _run([python, "-I", "-m", "venv", str(stage)], hint="push with --offline, which needs no pip")
        (stage / "requirements.txt").write_text(requirements)
        pip = [str(stage / "bin" / "python"), "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run(
            [*pip, "--only-binary=:all:", "-r", str(stage / "requirements.txt")],
            hint="push with --offline, which takes the wheels along",
            cwd=str(stage),
        )
    os.sync()
    stage.rename(target)
    sync(target.parent)
    if lacking := _lacking(own, wanted):
        shutil.rmtree(target, ignore_errors=True)
        raise FleetError(f"the environment that was made lacks {', '.join(lacking)}")
    return own


def check_can_make(python: str, *, with_pip: bool) -> None:
    """Raise `FleetError` when no environment can be made from `python`, which Debian's own needs a package for."""
    modules = "venv, ensurepip" if with_pip else "venv"
    if run([python, "-I", "-c", f"import {modules}"], timeout_s=60).returncode:
        raise FleetError(
            f"{python} cannot make an environment: it lacks {modules.replace(', ', ' or ')}",
            hint="install python3-venv there (Debian, Ubuntu)" + (", or push with --offline" if with_pip else ""),
        )


def existing_python(root: Root, requirements: str, *, python: str, wheels: Sequence[tuple[str, str]]) -> str | None:
    """What `find_python` would give, where that is there already."""
    wanted = _wanted(requirements)
    if not _lacking(python, wanted):
        return python
    own = str(_place(root, wanted, python, wheels) / "bin" / "python")
    return own if Path(own).exists() and not _lacking(own, wanted) else None


def _wanted(requirements: str) -> list[str]:
    return [line.strip() for line in requirements.splitlines() if line[:1].isalpha()]


def _place(root: Root, wanted: Sequence[str], python: str, wheels: Sequence[tuple[str, str]]) -> Path:
    """Where an environment made from just these lies."""
    version = _output([python, "-I", "-c", "import sys; print(*sys.version_info[:2], sys.executable)"])
    return root.environment(identify(version, *wanted, *(name for pair in sorted(wheels) for name in pair)))


def unpack_wheel(wheel: Path, name: str, library: Path) -> None:
    """Unpack a wheel (its file's name is `name`) to where an environment's modules are. Raises `FleetError`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                inside = _place_in_library(info.filename)
                if inside is None or info.is_dir():
                    continue
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise FleetError(f"wheel {name}: {info.filename} is a link")
                path = library / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, path.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
                path.chmod(0o755 if info.external_attr >> 16 & 0o111 else 0o644)
    except zipfile.BadZipFile as error:
        raise FleetError(f"wheel {name}: is damaged ({error})") from error


def _place_in_library(name: str) -> str | None:
    """Where a wheel's file goes, relative to the modules; None for what only pip's scripts and headers need."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name:
        raise FleetError(f"a wheel holds the path {name!r}")
    if parts[0].endswith(".data"):
        return "/".join(parts[2:]) if len(parts) > 2 and parts[1] in _LIBRARY_PARTS else None
    return name


def _lacking(python: str, wanted: Sequence[str]) -> list[str]:
    """The requirements that an interpreter does not meet; all of them when it cannot be run."""
    names = [_split(line)[0] for line in wanted]
    try:
        done = run([python, "-I", "-c", _ASK, *names], timeout_s=60)
    except OSError:
        return list(wanted)
    versions = done.stdout.split()
    if len(versions) != len(names):
        return list(wanted)
    return [line for line, version in zip(wanted, versions) if not _meets(version, _split(line)[1])]


def _split(requirement: str) -> tuple[str, list[tuple[str, str]]]:
    """`numpy>=2.0,<3` as its name and its bounds."""
    end = next((i for i, c in enumerate(requirement) if c in "<>=!~; "), len(requirement))
    bounds = []
    for part in requirement[end:].split(","):
        sign = next((s for s in (">=", "<=", "==", "<", ">") if part.strip().startswith(s)), None)
        if sign:
            bounds.append((sign, part.strip().removeprefix(sign).strip()))
    return requirement[:end], bounds


def _meets(version: str, bounds: Sequence[tuple[str, str]]) -> bool:
    if version == "-":
        return False
    own = _numbers(version)
    for sign, bound in bounds:
        other = _numbers(bound)
        if not {
            ">=": own >= other,
            "<=": own <= other,
            "==": own == other,
            "<": own < other,
            ">": own > other,
        }[sign]:
            return False
    return True


def _numbers(version: str) -> list[int]:
    numbers = []
    for part in version.split("+")[0].split(".")[:4]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return numbers + [0] * (4 - len(numbers))


def _output(command: list[str]) -> str:
    done = run(command, timeout_s=60)
    if done.returncode:
        raise FleetError(f"{command[0]} cannot be run: {error_of(done)}")
    return done.stdout.strip()


def _run(command: list[str], *, hint: str | None = None, cwd: str = "/") -> None:
    done = run(command, timeout_s=_PIP_TIMEOUT_S, cwd=cwd)
    if done.returncode:
        raise FleetError(f"{Path(command[0]).name} {' '.join(command[2:5])}: {error_of(done)}", hint=hint)
