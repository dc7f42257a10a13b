"""Rollout workers and their trainer as Ray actors: whichever is killed, the run goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from ryot.cluster.rollout_fleet import GROUPS_AT_ONCE, RayFleet
from ryot.cluster.runtime import EmbeddedCluster
from ryot.config import KernelPlan
from ryot.errors import ConfigError
from ryot.reinforce.rollouts import Group, LocalFleet, Policy
from ryot.run.training import Training, plan_training
from ryot.train.dataset import Dataset
from ryot.train.model import Decoder
from tests.cluster.conftest import Recorder, learned, processes_of, train, workers_of
from tests.reinforce.conftest import MODEL, dataset, make_variant, policy

__all__ = ["dataset", "policy"]


def rollout_workers(folder: Path) -> list[int]:
    """Ids of the actors that sample in the cluster in `folder`."""
    found = []
    for process in processes_of(folder):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "RolloutWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def reinforced(dataset: Dataset, tmp_path: Path, **rlvr: object) -> Training:
    variant = make_variant(rollout_workers=1, steps=6, **rlvr)
    return plan_training(variant, 0, dataset.path, KernelPlan())


def test_a_killed_rollout_worker_costs_the_samples_it_was_at_and_nothing_else(
    cluster: EmbeddedCluster, policy: Policy
) -> None:
    weights = {name: tensor.detach().numpy() for name, tensor in Decoder(MODEL.spec).state_dict().items()}
    groups = [Group((0, 50 + n), 64, 30, seed=n) for n in range(5 * GROUPS_AT_ONCE)]
    alone = LocalFleet(policy, rows=64)
    alone.update(weights)
    expected = [[sample.tokens for sample in members] for members in alone.sample(groups)]
    alone.close()
    fleet = RayFleet(policy, workers=2, rows=64)
    try:
        fleet.update(weights)
        victim = fleet.pids()[0]
        killer = threading.Timer(0.3, os.kill, (victim, signal.SIGKILL))
        killer.start()
        # More than once, so that the kill falls into the sampling on any machine.
        while not fleet.deaths:
            found = fleet.sample(groups)
            assert [[sample.tokens for sample in members] for members in found] == expected
        killer.join()
        assert (fleet.deaths, len(fleet.pids())) == (1, 2)
        assert fleet.sampled_again <= GROUPS_AT_ONCE
    finally:
        fleet.close()


@pytest.mark.slow
def test_a_run_whose_rollout_worker_and_trainer_are_killed_learns_what_an_undisturbed_one_learns(
    cluster: EmbeddedCluster, dataset: Dataset, tmp_path: Path
) -> None:
    training = reinforced(dataset, tmp_path)
    [undisturbed] = train(tmp_path / "a", [training], cluster)
    assert undisturbed.error is None and undisturbed.attempts == 1

    def kill_rollouts() -> None:
        for pid in rollout_workers(cluster.folder):
            os.kill(pid, signal.SIGKILL)

    seen = Recorder("reinforce", kill_rollouts, after=2)
    [result] = train(tmp_path / "b", [training], cluster, emit=seen)
    assert (result.error, result.attempts) == (None, 1)
    assert learned(result.checkpoint) == learned(undisturbed.checkpoint)

    def kill_trainer() -> None:
        [worker] = workers_of(cluster.folder)
        os.kill(worker, signal.SIGKILL)

    seen = Recorder("reinforce", kill_trainer, after=2)
    [result] = train(tmp_path / "c", [training], cluster, emit=seen)
    assert (result.error, result.attempts) == (None, 2)
    assert learned(result.checkpoint) == learned(undisturbed.checkpoint)
    deadline = time.monotonic() + 30
    while rollout_workers(cluster.folder):
        assert time.monotonic() < deadline, "rollout workers outlive their trainer"


def test_a_reinforcement_has_one_trainer(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="workers per variant: got 2, but tiny reinforces, which one trainer does"):
        plan_training(make_variant(), 0, dataset.path, KernelPlan(), workers=2)
