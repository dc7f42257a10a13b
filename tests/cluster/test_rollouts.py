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
from ryot.events import Event
from ryot.reinforce.rollouts import Group, LocalFleet, Policy
from ryot.reinforce.trainer import build_trainer
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


def test_a_run_whose_rollout_worker_and_then_its_trainer_are_killed_learns_what_an_undisturbed_one_learns(
    cluster: EmbeddedCluster, dataset: Dataset, tmp_path: Path
) -> None:
    training = reinforced(dataset, tmp_path)
    alone = build_trainer(training, training.kernels)
    alone.run_chunk(600)
    alone.save(tmp_path / "alone")
    alone.close()
    lost_before: list[str] = []

    def kill_rollouts() -> None:
        victims = rollout_workers(cluster.folder)
        assert victims
        for pid in victims:
            os.kill(pid, signal.SIGKILL)

    def kill_trainer() -> None:
        # The rollout worker's death cost no attempt.
        lost_before.extend(seen.details("lost"))
        [worker] = workers_of(cluster.folder)
        os.kill(worker, signal.SIGKILL)

    class Both(Recorder):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if event.kind == "reinforce" and len([e for e in self.events if e.kind == "reinforce"]) == 4:
                kill_trainer()

    seen = Both("reinforce", kill_rollouts, after=2)
    [result] = train(tmp_path / "run", [training], cluster, emit=seen)
    assert lost_before == []
    assert (result.error, result.attempts) == (None, 2)
    assert learned(result.checkpoint) == learned(tmp_path / "alone")
    deadline = time.monotonic() + 30
    while rollout_workers(cluster.folder):
        assert time.monotonic() < deadline, "rollout workers outlive their trainer"


def test_a_reinforcement_has_one_trainer(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="workers per variant: got 2, but tiny reinforces, which one trainer does"):
        plan_training(make_variant(), 0, dataset.path, KernelPlan(), workers=2)
