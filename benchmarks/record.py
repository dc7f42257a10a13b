"""Dated results beside the scripts: `results/DATE-NAME.md` for people, the same name `.json` with every raw sample."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ryot.edge.measure import record_environment

RESULTS = Path(__file__).parent / "results"


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
    path = folder / f"{datetime.date.today().isoformat()}-{name}.md"
    path.write_text(text.rstrip("\n") + "\n")
    path.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")
    return path


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return result.stdout.strip()
