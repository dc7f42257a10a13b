"""Drivers that are killed and stopped, and Ray with them: what they leave, and what a resumed one makes of it."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from ryot.errors import EXIT_INTERRUPTED
from ryot.train.dataset import Dataset
from tests.cluster.conftest import (
    cluster_folders,
    learned,
    learned_alone,
    plan_both,
    processes_of,
    records,
    train_program,
    wait_for_event,
)

STEPS = 240


@pytest.fixture(scope="module")
def expected(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the program's two trainings learn when nothing disturbs them."""
    return learned_alone(plan_both(dataset, STEPS), tmp_path_factory.mktemp("alone"))


def wait_until_gone(folders: set[Path]) -> None:
    """Wait until the clusters in these folders have no process and no folder."""
    deadline = time.monotonic() + 60
    while any(folder.exists() or processes_of(folder) for folder in folders):
        assert time.monotonic() < deadline, [(f, f.exists(), processes_of(f)) for f in folders]


def test_a_run_that_is_killed_and_stopped_and_whose_ray_dies_twice_learns_what_an_undisturbed_one_learns(
    dataset: Dataset, expected: dict[str, str], tmp_path: Path, temporary: Path
) -> None:
    run_dir = tmp_path / "run"

    # Killed: what the driver started ends without it.
    with train_program(run_dir, dataset, "--steps", str(STEPS)) as driver:
        wait_for_event(driver, "checkpoint", count=2)
        folders = cluster_folders()
        assert len(folders) == 1
        driver.send_signal(signal.SIGKILL)
    wait_until_gone(folders)
    accepted = newest_steps(run_dir)
    # The driver may have died within a write.
    with (run_dir / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"record": "checkpoint", "key": "opti')

    # Stopped: the chunk in flight is finished and counts.
    with train_program(run_dir, dataset, "--steps", str(STEPS)) as driver:
        wait_for_event(driver, "checkpoint")
        folders = cluster_folders()
        driver.send_signal(signal.SIGINT)
        _, said = driver.communicate(timeout=600)
    assert driver.returncode == EXIT_INTERRUPTED
    assert "stopping after the chunk in flight" in said
    assert "Error: stopped by a signal; what was accepted so far is in" in said
    assert "Traceback" not in said
    wait_until_gone(folders)
    later = newest_steps(run_dir)
    assert all(later[key] >= step for key, step in accepted.items())
    assert sum(later.values()) > sum(accepted.values())

    # Stopped twice: at once.
    with train_program(run_dir, dataset, "--steps", str(STEPS)) as driver:
        wait_for_event(driver, "checkpoint")
        folders = cluster_folders()
        driver.send_signal(signal.SIGINT)
        driver.send_signal(signal.SIGTERM)
        _, said = driver.communicate(timeout=600)
    assert driver.returncode == EXIT_INTERRUPTED
    assert "Error: stopped at once" in said
    wait_until_gone(folders)

    # Ray itself dies twice under the driver that goes on to the end.
    clusters: set[Path] = set()
    with train_program(run_dir, dataset, "--steps", str(STEPS)) as driver:
        for program in ("raylet", "gcs_server"):
            wait_for_status(driver, "begin")
            wait_for_event(driver, "checkpoint", count=2)
            [folder] = cluster_folders() - clusters  # the dead one may still be on its way out
            clusters.add(folder)
            [victim] = [p for p in processes_of(folder) if p.name() == program]
            victim.kill()
            wait_for_status(driver, "lost")
        digests = {}
        for _ in range(2):
            result = wait_for_event(driver, "result")
            digests[result["variant"]] = learned(Path(result["checkpoint"]))
        driver.communicate(timeout=600)
        assert driver.returncode == 0
    assert digests == expected
    wait_until_gone(clusters | cluster_folders())
    for record in records(run_dir, "checkpoint"):
        older = accepted.get(record["key"], 0)
        assert record["attempt"] == 1 or record["step"] > older


def wait_for_status(driver: subprocess.Popen[str], status: str) -> None:
    """Read the program's events until a stage has this status."""
    while wait_for_event(driver, "stage")["status"] != status:
        pass


def newest_steps(run_dir: Path) -> dict[str, int]:
    """The step of the newest accepted checkpoint of each training."""
    return {r["key"]: r["step"] for r in records(run_dir, "checkpoint")}
