"""Drivers that are stopped and killed: what they leave, and what a resumed one makes of it."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from ryot.errors import EXIT_INTERRUPTED
from ryot.train.dataset import Dataset
from ryot.train.loop import Trainer
from tests.cluster.conftest import (
    cluster_folders,
    learned,
    planned,
    processes_of,
    records,
    train_program,
    wait_for_event,
)

STEPS = 60


@pytest.fixture(scope="module")
def expected(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the program's two trainings learn when nothing disturbs them, without any of the driver."""
    digests = {}
    for name in ("baseline", "optimized"):
        job = planned(dataset, name, steps=STEPS)
        trainer = Trainer(job.job, job.plan)
        trainer.run_slice(600)
        path = tmp_path_factory.mktemp(name) / "checkpoint"
        trainer.save(path)
        digests[name] = learned(path)
    return digests


def finish(run_dir: Path, dataset: Dataset) -> dict[str, str]:
    """Resume the run to its end; what its variants have learned."""
    with train_program(run_dir, dataset) as driver:
        digests = {}
        for _ in range(2):
            result = wait_for_event(driver, "result")
            digests[result["variant"]] = learned(Path(result["checkpoint"]))
        driver.communicate(timeout=60)
        assert driver.returncode == 0
    return digests


def wait_until_gone(folders: set[Path]) -> None:
    """Wait until the clusters in these folders have no process and no folder."""
    deadline = time.monotonic() + 15
    while any(folder.exists() or processes_of(folder) for folder in folders):
        assert time.monotonic() < deadline, [(f, f.exists(), processes_of(f)) for f in folders]


def test_a_killed_driver_leaves_no_process_and_no_folder_and_its_run_resumes_to_the_same_weights(
    dataset: Dataset, expected: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    before = cluster_folders()
    with train_program(run_dir, dataset) as driver:
        wait_for_event(driver, "checkpoint", count=3)
        folders = cluster_folders() - before
        assert len(folders) == 1
        driver.send_signal(signal.SIGKILL)
    wait_until_gone(folders)
    accepted = {r["key"]: r["step"] for r in records(run_dir, "checkpoint")}
    # The driver may have died within a write.
    with (run_dir / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"record": "checkpoint", "key": "opti')
    assert finish(run_dir, dataset) == expected
    for key, step in accepted.items():
        assert all(r["step"] > step for r in records(run_dir, "checkpoint") if r["key"] == key and r["attempt"] == 2)


def test_a_stopped_driver_accepts_the_slice_in_flight_exits_130_and_resumes_from_there(
    dataset: Dataset, expected: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    before = cluster_folders()
    with train_program(run_dir, dataset) as driver:
        wait_for_event(driver, "checkpoint", count=2)
        folders = cluster_folders() - before
        driver.send_signal(signal.SIGINT)
        _, said = driver.communicate(timeout=60)
    assert driver.returncode == EXIT_INTERRUPTED
    assert "stopping after the slice in flight" in said
    assert "Error: stopped by a signal; what was accepted so far is in" in said
    assert "Traceback" not in said
    wait_until_gone(folders)
    newest = {r["key"]: r for r in records(run_dir, "checkpoint")}
    for record in newest.values():
        assert (run_dir / record["path"]).is_dir()
    assert finish(run_dir, dataset) == expected


def test_a_driver_stopped_twice_ends_at_once_and_cleanly(dataset: Dataset, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    before = cluster_folders()
    with train_program(run_dir, dataset) as driver:
        wait_for_event(driver, "checkpoint")
        folders = cluster_folders() - before
        driver.send_signal(signal.SIGINT)
        driver.send_signal(signal.SIGTERM)
        _, said = driver.communicate(timeout=60)
    assert driver.returncode == EXIT_INTERRUPTED
    assert "Error: stopped at once" in said
    wait_until_gone(folders)
    for record in records(run_dir, "checkpoint"):
        assert record["attempt"] == 1


def test_ray_itself_may_die_twice_under_a_running_driver(
    dataset: Dataset, expected: dict[str, str], tmp_path: Path
) -> None:
    before = cluster_folders()
    folders = set()
    with train_program(tmp_path / "run", dataset) as driver:
        for program in ("raylet", "gcs_server"):
            wait_for_event(driver, "checkpoint", count=2)
            [folder] = cluster_folders() - before
            folders.add(folder)
            [victim] = [p for p in processes_of(folder) if p.name() == program]
            victim.kill()
        digests = {}
        for _ in range(2):
            result = wait_for_event(driver, "result")
            digests[result["variant"]] = learned(Path(result["checkpoint"]))
        driver.communicate(timeout=60)
        assert driver.returncode == 0
    assert digests == expected
    assert len(folders) == 2
    wait_until_gone(folders | (cluster_folders() - before))
