from __future__ import annotations

import subprocess
import sys

import pytest

from ryot.cli.main import COMMANDS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"from ryot.cli.main import run; run({list(arguments)!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_works_everywhere_and_ends_with_an_example(command: str, flag: str) -> None:
    result = run(*([command] if command else []), flag)
    assert result.returncode == 0 and result.stderr == ""
    assert "Example: ryot-deploy " in " ".join(result.stdout.split())


def test_every_command_is_listed() -> None:
    listed = run("-h").stdout
    assert all(f"  {name} " in listed for name in COMMANDS)


@pytest.mark.parametrize("arguments", [["-h"], ["cluster-run", "-h"], ["--version"], ["cluster-run", "--preset", "no"]])
def test_help_and_refusals_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from ryot.cli.main import run
try:
    run({arguments!r})
except SystemExit:
    pass
heavy = {{"torch", "ray", "onnx", "onnxruntime", "numpy", "tokenizers", "matplotlib"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
