"""A bundle of the version before, `data/bundle_0_1_0.tar.zst`: exported by it as it is, runtime and all, and small.

A llama with random weights and two precisions in one (int8-dyn to prefill, int4 to decode) over an int8 cache, from
before a manifest named its family's blocks, signatures, templates and rounding by today's words.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ryot.cli.main import main
from ryot.deploy.archive import unpack_archive
from ryot.deploy.bundle import finish_bundle
from ryot.edge.bundle import load_bundle, read_manifest
from ryot.edge.cli import run
from ryot.edge.engine import Engine
from ryot.edge.generate import check_golden
from ryot.edge.measure import build_spec, measure_once
from ryot.edge.trust import check_whole


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old") / "bundle"
    unpack_archive(Path(__file__).with_name("data") / "bundle_0_1_0.tar.zst", folder)
    return folder


def test_it_is_verified_as_it_was_made(old: Path) -> None:
    verified = CliRunner().invoke(main, ["verify", str(old)], catch_exceptions=False)
    assert verified.exit_code == 0, verified.output
    assert "llama-int8-dyn+int4, 33 files as in the manifest, 8 of 8 golden tokens" in verified.output


def test_either_engine_answers_its_golden_prompts(old: Path, make_engine: type[Engine]) -> None:
    assert check_golden(make_engine(load_bundle(old))) == 8


@pytest.mark.parametrize("engine", ["capi", "python"])
def test_it_is_measured(old: Path, engine: str) -> None:
    measured = measure_once(build_spec(load_bundle(old), engine=engine, min_runs=1, min_time_s=0.0))
    assert measured.ok, measured.reason
    assert (measured.engine, measured.precision, measured.runs_ok) == (engine, "int8-dyn+int4", measured.runs)


def test_it_is_finished_as_a_run_that_is_resumed_finishes_it(old: Path, tmp_path: Path) -> None:
    finished = finish_bundle(old, tmp_path / "finished", {"report": "chosen"})
    assert read_manifest(finished)["quality"] == read_manifest(old)["quality"]
    check_whole(finished, None)


def test_its_own_runtime_answers_as_ours_does(old: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    options = ["--prompt", "def ", "--max-new-tokens", "8"]
    own = subprocess.run([sys.executable, str(old / "run.py"), *options], capture_output=True, check=True)
    assert run(old, options) == 0
    assert capfdbinary.readouterr().out == own.stdout
