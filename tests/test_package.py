"""The wheel holds only `ryot/`; a base install imports all of `ryot.edge`; the README's commands are the Makefile's."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import build_environment

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    left_out = shutil.ignore_patterns("__pycache__", "results", "node_modules")
    for folder in ("ryot", "deploy", "cluster", "benchmarks"):
        shutil.copytree(ROOT / folder, source / folder, ignore=left_out)
    out = source / "dist"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    built = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_only_ryot(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if not n.split("/")[0].endswith(".dist-info")} == {"ryot"}
    for needed in ("ryot/presets/reference.toml", "ryot/targets/phase1.toml", "ryot/report/report.schema.json"):
        assert needed in names
    assert sum(n.endswith(".py") for n in names) == sum(1 for _ in (ROOT / "ryot").rglob("*.py"))


def test_a_base_install_imports_all_of_edge_and_shows_help(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    python = build_environment(venv, wheel)
    code = """
import importlib, importlib.util, pkgutil, ryot.edge
for module in pkgutil.iter_modules(ryot.edge.__path__):
    importlib.import_module(f"ryot.edge.{module.name}")
assert not [m for m in ("torch", "ray", "onnx") if importlib.util.find_spec(m)]
"""
    imported = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert imported.returncode == 0, imported.stderr
    shown = subprocess.run(
        [venv / "bin" / "ryot-deploy", "-h"], capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 0 and "cluster-run" in shown.stdout
    refused = subprocess.run(
        [venv / "bin" / "ryot-deploy", "train", "-o", tmp_path / "c"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 1 and "pip install 'ryot[" in refused.stderr


def test_where_things_are_in_a_run_folder_is_said_once() -> None:
    names = r"run\.toml|run\.lock|\w*\.jsonl|measure\.json|worker\S*\.log|report\.(md|html)|(attempt|step)-\S*"
    inside = rf"""["']({names})["']"""
    for path in (p for room in ("run", "cluster") for p in (ROOT / "ryot" / room).rglob("*.py")):
        if path.name != "folder.py":
            assert not re.findall(inside, path.read_text()), path


def test_every_command_of_the_readme_exists() -> None:
    from ryot.cli.main import COMMANDS

    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"^\| `ryot-deploy ([a-z-]+)", text, re.M)) == set(COMMANDS)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make ([a-z]+)", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
