"""Which modules of ours run on a device: what a bundle's `runtime/` is a copy of. Needs the standard library alone."""

from __future__ import annotations

import ast
import functools
import shutil
from collections.abc import Iterable
from pathlib import Path

import ryot

PACKAGE = Path(ryot.__file__).parent
RUNTIME = "runtime"


@functools.cache
def runtime_modules() -> tuple[Path, ...]:
    """Files of `ryot.edge` and of every module of ours that they import, relative to the package's parent."""
    return find_modules([p.relative_to(PACKAGE.parent) for p in (PACKAGE / "edge").glob("*.py")])


def find_modules(first: Iterable[Path]) -> tuple[Path, ...]:
    """The modules of ours in `first` and all that they import; sorted, relative to the package's parent."""
    pending = sorted(first)
    found: set[Path] = set()
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found.add(path)
        pending += _imported_modules(path)
    packages = {parent / "__init__.py" for path in found for parent in path.parents if parent.parts}
    return tuple(sorted(found | packages))


def _imported_modules(path: Path) -> list[Path]:
    tree = ast.parse((PACKAGE.parent / path).read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = []
    for name in sorted(names):
        if name.split(".")[0] == "ryot":
            stem = Path(*name.split("."))
            files += [p for p in (stem.with_suffix(".py"), stem / "__init__.py") if (PACKAGE.parent / p).is_file()]
    return files


def copy_runtime(folder: Path) -> None:
    """Copy the modules that run on the device to `runtime/`, and `run.py` beside it, byte for byte."""
    for path in runtime_modules():
        destination = folder / RUNTIME / path
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE.parent / path, destination)
    shutil.copyfile(PACKAGE / "deploy" / "bundle_run.py", folder / "run.py")
