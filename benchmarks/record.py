"""Dated results beside the scripts: `results/DATE-NAME-ISA.md` for people, the same `.json` with every raw sample.

ISA is the part of the CPU's instruction set that decides such figures, so that one day can hold two machines.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ryot.edge.machine import describe_cpu
from ryot.edge.measure import record_environment

RESULTS = Path(__file__).parent / "results"
#: The most capable part of an instruction set is the one a result is named after.
DECISIVE = ("amx-int8", "avx512-vnni", "avx-vnni", "avx512", "avx2", "neon")


def describe_setting() -> dict[str, Any]:
    """What a result has to say about where it comes from: commit, command, machine, versions."""
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed_files": len(_git("status", "--porcelain", "--untracked-files=no").splitlines()),
        "command": shlex.join(["python", *sys.argv]),
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        "environment": record_environment(),
    }


def write_result(name: str, values: Mapping[str, Any], text: str, folder: Path = RESULTS) -> Path:
    """Write both files of a result and return the one for people."""
    folder.mkdir(parents=True, exist_ok=True)
    isa = describe_cpu()["isa"]
    decisive = next((known for known in DECISIVE if known in isa), platform.machine())
    path = folder / f"{datetime.date.today().isoformat()}-{name}-{decisive}.md"
    path.write_text(text.rstrip("\n") + "\n")
    path.with_suffix(".json").write_text(dump_compact(values) + "\n")
    return path


def dump_compact(value: Any, indent: int = 0) -> str:
    """JSON with a line for each entry of an object, and for each series of numbers."""
    if isinstance(value, Mapping):
        pad = " " * (indent + 1)
        lines = [f"{pad}{json.dumps(str(key))}: {dump_compact(entry, indent + 1)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}" if lines else "{}"
    if isinstance(value, (list, tuple)) and any(isinstance(entry, Mapping) for entry in value):
        pad = " " * (indent + 1)
        lines = [pad + dump_compact(entry, indent + 1) for entry in value]
        return "[\n" + ",\n".join(lines) + "\n" + " " * indent + "]"
    return json.dumps(value)


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return result.stdout.strip()
