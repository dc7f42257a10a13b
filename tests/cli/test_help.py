from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ryot.cli.main import COMMANDS, main


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_works_everywhere_and_ends_with_an_example(command: str, flag: str) -> None:
    result = CliRunner().invoke(main, [*([command] if command else []), flag])
    assert result.exit_code == 0 and result.stderr == ""
    assert "Example: ryot-deploy " in " ".join(result.stdout.split())


def test_every_command_is_listed() -> None:
    listed = CliRunner().invoke(main, ["-h"]).output
    assert all(f"  {name} " in listed for name in COMMANDS)


def imported_by(*arguments: str) -> set[str]:
    """The heavy packages that a command has imported when it ends."""
    code = """
import sys
from ryot.cli.main import run
try:
    run(sys.argv[1:])
except SystemExit:
    pass
heavy = {"torch", "ray", "onnx", "onnxruntime", "numpy", "tokenizers", "matplotlib"}
print("imported:", *(heavy & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return set(result.stdout.rpartition("imported:")[2].split())


@pytest.mark.parametrize("arguments", [["-h"], ["cluster-run", "-h"], ["--version"], ["cluster-run", "--preset", "no"]])
def test_help_and_refusals_import_nothing_heavy(arguments: list[str]) -> None:
    assert imported_by(*arguments) == set()


@pytest.mark.parametrize("command", ["show", "list"])
def test_runs_are_listed_without_what_trains(command: str) -> None:
    run = Path(__file__).parents[1] / "run/data/run_0_1_0"
    assert imported_by("runs", command, str(run if command == "show" else run.parent)) <= {"numpy"}
