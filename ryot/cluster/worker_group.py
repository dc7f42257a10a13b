"""The actors that work on one training: one, or a group of ranks that lives and dies as one."""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ryot.cluster.placement import ResourceRequest
from ryot.cluster.remote import actor_on
from ryot.cluster.runtime import Node
from ryot.cluster.worker import TrainWorker
from ryot.errors import RyotError

if TYPE_CHECKING:
    from ray import ObjectRef

log = logging.getLogger(__name__)

#: A rank that is left alone by a dead one says so at once; this long the dead one may take to be known as dead.
_BLAME_S = 30.0


class WorkerLost(Exception):
    """An actor is gone, or cannot be reached, or its group has come apart."""


class WorkerFailed(Exception):
    """A method of an actor raised; `cause` is what."""

    def __init__(self, cause: BaseException):
        super().__init__(str(cause))
        self.cause = cause


class Call(enum.Enum):
    """What a group can be asked for; the value is the method of `TrainWorker`."""

    START = "start"
    CHUNK = "run_chunk"
    SAVE = "save"


class WorkerGroup:
    """Actors, the cores they hold, and the call that they are at."""

    def __init__(self, nodes: Sequence[Node], request: ResourceRequest):
        """Ask for an actor on each of `nodes` (a node may come several times)."""
        self.nodes = list(nodes)
        self.request = request
        self.actors = [_make_actor(node, request) for node in nodes]
        self.call_in_flight: Call | None = None
        self.since = 0.0
        self._refs: list[ObjectRef[object]] = []
        self._answers: dict[int, object] = {}
        self._failed_at = 0.0

    @property
    def refs(self) -> list[ObjectRef[object]]:
        """What is still waited for."""
        return [ref for rank, ref in enumerate(self._refs) if rank not in self._answers]

    @property
    def where(self) -> str:
        """Names of its nodes."""
        return ", ".join(dict.fromkeys(n.name for n in self.nodes))

    def call(self, call: Call, *arguments: tuple[object, ...]) -> None:
        """Call a method of all actors, with the same arguments or, given several tuples, each with its own."""
        per_rank = arguments if len(arguments) == len(self.actors) else arguments * len(self.actors)
        self.call_in_flight, self.since, self._failed_at = call, time.monotonic(), 0.0
        self._answers = {}
        self._refs = [getattr(actor, call.value).remote(*own) for actor, own in zip(self.actors, per_rank, strict=True)]

    def collect(self, ready: set[ObjectRef[object]]) -> object:
        """The answer of the first rank once all have answered, else None.

        Raises `WorkerLost`, and `WorkerFailed` when a method raised although all actors live.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        for rank, ref in enumerate(self._refs):
            if rank in self._answers or ref not in ready:
                continue
            try:
                self._answers[rank] = ray.get(ref)
            except RayTaskError as error:
                self._answers[rank] = WorkerFailed(error.cause)
                self._failed_at = self._failed_at or time.monotonic()
            except RayError as error:
                raise WorkerLost(_say_why(error)) from error
        failures = [a for a in self._answers.values() if isinstance(a, WorkerFailed)]
        if failures and len(self._answers) < len(self._refs) and time.monotonic() - self._failed_at < _BLAME_S:
            # In a group the ranks that live fail first: the others' silence is the reason.
            return None
        if failures:
            if len(self.actors) > 1 and not all(isinstance(f.cause, RyotError) for f in failures):
                raise WorkerLost(f"the group came apart: {failures[0]}") from failures[0].cause
            raise failures[0]
        return self._answers[0] if len(self._answers) == len(self._refs) else None

    def close(self, *, kill: bool) -> None:
        """End the actors; without `kill` they tidy up first."""
        import ray
        from ray.exceptions import RayError

        if not kill:
            try:
                ray.get([actor.leave.remote() for actor in self.actors], timeout=5)
            except RayError as error:
                log.info("workers on %s did not leave in order (%s)", self.where, type(error).__name__)
        for actor in self.actors:
            ray.kill(actor, no_restart=True)


def _say_why(error: Exception) -> str:
    """Ray's reason in a few words: of its paragraph on a dead actor, the sentence that says why."""
    text = " ".join(str(error).split())
    _, found, why = text.partition("The actor is dead because ")
    return why.split(". ")[0] if found else f"{type(error).__name__}: {text}"


def _make_actor(node: Node, request: ResourceRequest) -> Any:
    worker = actor_on(node.node_id, TrainWorker, num_cpus=request.threads, num_gpus=request.gpus)
    return worker.remote(request.threads)
