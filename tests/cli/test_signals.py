"""Commands that a signal ends: they say so, and nothing of theirs is left on the disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ryot.train.checkpoint import load_training_state
from tests.cli.test_train import RECIPE

#: As `nohup ryot-deploy ... &` starts it.
NOHUP = ["sh", "-c", 'trap "" INT HUP; exec "$@"', "sh"]
RYOT = [sys.executable, "-c", "from ryot.cli.main import run; run()"]


def wait_until(happened: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def start(temporary: Path, *command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command],
        env=os.environ | {"TMPDIR": str(temporary), "RYOT_CACHE_DIR": str(temporary.parent / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("trained", ["optimized"], indirect=True)
def test_an_export_that_is_ended_leaves_no_temporary_folder(trained: Path, text_folder: Path, temporary: Path) -> None:
    out = temporary.parent / "out"
    with start(temporary, *NOHUP, *RYOT, "export", trained, "--data", text_folder, "-o", out) as process:
        wait_until(lambda: list(temporary.glob("ryot-tune-*/*")), process)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said.splitlines()[-1]) == (130, "Error: interrupted")
    assert list(temporary.glob("ryot-*")) == []
    assert not out.exists()


def test_a_training_with_ctrl_c_ignored_ends_by_sigterm(text_folder: Path, temporary: Path) -> None:
    recipe, out = temporary.parent / "recipe.toml", temporary.parent / "out"
    recipe.write_text(RECIPE.replace("tokens = 128000", "tokens = 640000"))
    command = [*NOHUP, *RYOT, "train", "--variant", recipe, "--data", text_folder, "--no-tune", "-o", out]
    with start(temporary, *command) as process:
        assert process.stderr is not None
        assert "step" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert load_training_state(out)[0]["step"] > 0
