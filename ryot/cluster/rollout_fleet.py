"""A fleet of rollout workers: Ray actors on the trainer's node that sample for it, and are replaced when they die.

The trainer is their owner: they end with it, and a trainer that begins again makes new ones. Groups are handed out one
by one, so what a dead worker takes with it is the group that it was at; another worker samples that anew, with the same
seeds and so the same answers.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ryot.adaptation import RlvrConfig, RolloutPrecision
from ryot.cluster.remote import actor_on
from ryot.config import KernelPlan
from ryot.errors import ClusterError
from ryot.models.tensors import FloatArray
from ryot.reinforce.rollouts import Fleet, Group, LocalFleet, Policy, Sample
from ryot.reinforce.trainer import make_local_fleet

if TYPE_CHECKING:
    from ray import ObjectRef

log = logging.getLogger(__name__)

#: Groups that a worker is given at a time: the more, the better its batches are filled, and the more a death costs.
GROUPS_AT_ONCE = 4
#: Workers that may die without any group being sampled in between.
MAX_DEATHS_IN_A_ROW = 8


class RolloutWorker:
    """The body of the Ray actor; plain methods, so that it can be read without Ray."""

    def __init__(self, policy: Policy, rows: int, precision: RolloutPrecision):
        self._fleet = LocalFleet(policy, rows=rows, precision=precision)
        self._version = -1

    def pid(self) -> int:
        """Of its process."""
        return os.getpid()

    def sample(self, version: int, arrays: Mapping[str, FloatArray], groups: Sequence[Group]) -> list[list[Sample]]:
        """The samples of groups by the weights of a version, which are taken up where they are new."""
        if version != self._version:
            self._fleet.update(arrays)
            self._version = version
        return self._fleet.sample(groups)

    def leave(self) -> None:
        """Remove what this worker wrote on its machine."""
        self._fleet.close()


class RayFleet:
    """Samples with `workers` actors."""

    def __init__(self, policy: Policy, *, workers: int, rows: int, precision: RolloutPrecision = "fp32"):
        self._policy, self._rows, self._precision = policy, rows, precision
        self._version = -1
        self._arrays: ObjectRef[object] | None = None
        self._policy_ref: ObjectRef[object] | None = None
        self._actors: list[Any] = [self._make_actor() for _ in range(workers)]
        #: Workers that were replaced, and groups that were sampled again because of that.
        self.deaths = self.sampled_again = 0

    def update(self, arrays: Mapping[str, FloatArray]) -> None:
        import ray

        self._version += 1
        # Put once; workers on one machine read the same memory. The old ones go when no one holds them any more.
        self._arrays = ray.put(dict(arrays))

    def sample(self, groups: Sequence[Group]) -> list[list[Sample]]:
        """Raises `ClusterError` where workers die one after the other and nothing comes of it."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        found: dict[int, list[Sample]] = {}
        numbers = range(len(groups))
        waiting = deque(numbers[at : at + GROUPS_AT_ONCE] for at in range(0, len(groups), GROUPS_AT_ONCE))
        idle = list(range(len(self._actors)))
        at_work: dict[ObjectRef[object], tuple[int, range]] = {}
        deaths_in_a_row = 0
        while waiting or at_work:
            while waiting and idle:
                index, chunk = idle.pop(), waiting.popleft()
                chosen = [groups[number] for number in chunk]
                ref = self._actors[index].sample.remote(self._version, self._arrays, chosen)
                at_work[ref] = (index, chunk)
            ready, _ = ray.wait(list(at_work), num_returns=1)
            index, chunk = at_work.pop(ready[0])
            try:
                found |= zip(chunk, ray.get(ready[0]), strict=True)
                deaths_in_a_row = 0
            except RayTaskError as error:
                raise error.cause from None
            except RayError as error:
                deaths_in_a_row += 1
                self.deaths += 1
                self.sampled_again += len(chunk)
                if deaths_in_a_row > MAX_DEATHS_IN_A_ROW:
                    raise ClusterError(f"{deaths_in_a_row} rollout workers died in a row: {error}") from error
                log.warning("a rollout worker died; its %d groups are sampled again by another", len(chunk))
                self._actors[index] = self._make_actor()
                waiting.appendleft(chunk)
            idle.append(index)
        return [found[number] for number in numbers]

    def pids(self) -> list[int]:
        """Of the workers' processes."""
        import ray

        found: list[int] = ray.get([actor.pid.remote() for actor in self._actors])
        return found

    def close(self) -> None:
        import ray
        from ray.exceptions import RayError

        try:
            ray.get([actor.leave.remote() for actor in self._actors], timeout=5)
        except RayError as error:
            log.info("rollout workers did not leave in order (%s)", type(error).__name__)
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        self._actors = []

    def _make_actor(self) -> Any:
        import ray

        if self._policy_ref is None:
            self._policy_ref = ray.put(self._policy)
        node_id = ray.get_runtime_context().get_node_id()
        # No CPUs of their own: the trainer's request has theirs too, so that the driver's book is right.
        one_thread = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        worker = actor_on(node_id, RolloutWorker, num_cpus=0, runtime_env=one_thread)
        return worker.remote(self._policy_ref, self._rows, self._precision)


def make_ray_fleet(policy: Policy, rlvr: RlvrConfig, plan: KernelPlan) -> Fleet:
    """The fleet that a recipe asks for: actors, or this process."""
    if not rlvr.rollout_workers:
        return make_local_fleet(policy, rlvr, plan)
    rows = GROUPS_AT_ONCE * max(rlvr.samples_per_prompt, rlvr.eval_samples)
    return RayFleet(policy, workers=rlvr.rollout_workers, rows=rows, precision=rlvr.rollout_precision)
