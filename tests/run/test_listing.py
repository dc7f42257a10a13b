"""Run folders looked at from outside, through the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ryot.cli.main import main
from ryot.errors import ClusterError, ConfigError
from ryot.run.folder import RunFolder
from ryot.run.journal import AttemptBegun, CheckpointAccepted, Journal, TrainingDone, TrainingFailed
from ryot.run.listing import read_run, remove_run
from ryot.run.lock import RunLock
from ryot.run.metrics import TrainMetrics


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in `runs/` of which one training has ended, one has failed and one has begun."""
    path = tmp_path / "runs/first"
    path.mkdir(parents=True)
    journal = Journal(RunFolder(path))
    journal.open_run()
    for key in ("a/seed-0", "b/seed-0", "c/seed-0"):
        journal.append(AttemptBegun(key=key, digest="d", attempt=1, node="here"))
    metrics = TrainMetrics(val_loss=3.25)
    journal.append(
        CheckpointAccepted(key="a/seed-0", digest="d", attempt=1, step=40, path="p", sha256="s", metrics=metrics)
    )
    journal.append(TrainingDone(key="a/seed-0", digest="d", path="p"))
    journal.append(TrainingFailed(key="b/seed-0", digest="d", reason="gate loss: loss is nan", final=True))
    journal.close()
    (path / "weights").write_bytes(b"\0" * 1_000_000)
    return path


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["runs", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_run_shows_how_far_each_training_is_and_how_to_go_on(run: Path) -> None:
    shown = invoke("show", str(run))
    assert shown.splitlines()[0] == f"{run}: stopped"
    assert "gate loss: loss is nan" in shown
    assert f"To resume: ryot-deploy cluster-run --resume {run}" in shown
    trainings = json.loads(invoke("show", "--format", "json", str(run)))["trainings"]
    assert [(t["key"], t["state"], t["step"], t["val_loss"]) for t in trainings] == [
        ("a/seed-0", "done", 40, 3.25),
        ("b/seed-0", "failed", 0, None),
        ("c/seed-0", "begun", 0, None),
    ]


def test_a_run_that_cannot_be_read_hides_no_other(run: Path) -> None:
    newer = run.with_name("newer")
    newer.mkdir()
    (newer / "journal.jsonl").write_text('{"record": "opened", "schema": 99}\n')
    shown = invoke("list", str(run.parent))
    assert f"{run} " in shown and "stopped" in shown
    assert "damaged" in shown and "schema 99, expected at most" in shown.splitlines()[-1]


def test_a_run_is_running_while_a_driver_holds_it_and_finished_with_its_report(run: Path) -> None:
    with RunLock(RunFolder(run)):
        assert read_run(run).state == "running"
    assert read_run(run).state == "stopped"
    (run / "report.json").write_text("{}")
    assert read_run(run).state == "finished"


def test_runs_are_listed_with_their_size_and_other_folders_are_not(run: Path) -> None:
    (run.parent / "notes").mkdir()
    [line] = invoke("list", str(run.parent)).splitlines()[2:]
    assert line.split()[0] == str(run)
    assert "1 of 3" in line
    assert "1.0 MB" in line


def test_a_removed_run_is_gone_and_a_running_one_stays(run: Path) -> None:
    with RunLock(RunFolder(run)), pytest.raises(ClusterError, match="is working on it"):
        remove_run(run)
    assert read_run(run).trainings
    invoke("remove", "--yes", str(run))
    assert not run.exists()


def test_a_folder_that_is_no_run_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ConfigError, match="is not a run folder"):
        remove_run(tmp_path)
    assert (tmp_path / "precious").exists()
