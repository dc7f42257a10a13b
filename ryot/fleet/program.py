"""The program for devices as one file: a zip of `ryot.fleet.device` and the modules of ours that it imports."""

from __future__ import annotations

import functools
import io
import zipfile
from pathlib import Path

from ryot.deploy.runtime import PACKAGE, find_modules

_MAIN = "import sys\nfrom ryot.fleet.device.main import main\nsys.exit(main())\n"


@functools.cache
def build_program() -> bytes:
    """The zip file, the same each time; `python FILE` runs `ryot.fleet.device.main`."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in find_modules([p.relative_to(PACKAGE.parent) for p in (PACKAGE / "fleet" / "device").glob("*.py")]):
            _add(archive, path.as_posix(), (PACKAGE.parent / path).read_bytes())
        _add(archive, "__main__.py", _MAIN.encode())
    return out.getvalue()


def write_program(path: Path) -> None:
    """Write the zip file for a device that nothing can be sent to."""
    path.write_bytes(build_program())


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    info = zipfile.ZipInfo(name)  # of 1980, whatever day it is
    info.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(info, content)
