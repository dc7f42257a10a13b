"""Which node has cores, and GPUs, free for the next worker."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

from ryot.cluster.runtime import Cluster, Node
from ryot.errors import ClusterError

#: How old what is known of the nodes may be when a worker is placed.
_FRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class ResourceRequest:
    """What one worker takes up on its node."""

    threads: int
    gpus: int = 0

    def __str__(self) -> str:
        return f"{self.threads} CPUs" + (f" and {self.gpus} GPU" if self.gpus else "")


class Placement:
    """Our own book of CPUs and GPUs per node.

    Ray would also queue what does not fit, silently and for ever; here a worker is asked for only where there is room.
    """

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self._ours: dict[str, Counter[str]] = {"CPU": Counter(), "GPU": Counter()}
        self._refused: set[str] = set()
        self._nodes: list[Node] = []
        self._available: dict[str, dict[str, float]] = {}
        self._looked_at = float("-inf")
        self._checked: set[tuple[ResourceRequest, int]] = set()

    def only(self, node_ids: set[str]) -> None:
        """Use no other nodes but these, and those that join later."""
        self._refused = {n.node_id for n in self.cluster.nodes()} - node_ids

    def look(self) -> None:
        """Ask Ray for its nodes, unless that was done a moment ago."""
        if time.monotonic() - self._looked_at < _FRESH_S:
            return
        self._nodes = [n for n in self.cluster.nodes() if n.node_id not in self._refused]
        if not self.cluster.embedded:
            from ray._private.state import available_resources_per_node

            self._available = available_resources_per_node()
        self._looked_at = time.monotonic()

    def count_places(self, request: ResourceRequest) -> int:
        """Workers that the nodes have room for when nothing else runs there."""
        self.look()
        return sum(self._places(request, n.cpus, n.gpus) for n in self._nodes)

    def check_fits(self, request: ResourceRequest, workers: int, what: str) -> None:
        """Raise `ClusterError` when `workers` actors never fit, or not one of them fits now; asked once."""
        if (request, workers) in self._checked:
            return
        self.look()
        nodes = self._nodes
        able = [n for n in nodes if n.cpus >= request.threads and n.gpus >= request.gpus]
        if not able:
            largest = max((n.cpus for n in nodes), default=0.0)
            gpus = f" and the most GPUs {max((n.gpus for n in nodes), default=0.0):g}" if request.gpus else ""
            raise ClusterError(
                f"{what} needs {request} on one node, but the largest of {len(nodes)} nodes has {largest:g}{gpus}",
                hint="use fewer threads, or a cluster with a larger node" + (" and a GPU" if request.gpus else ""),
            )
        places = self.count_places(request)
        if workers > places:
            raise ClusterError(
                f"{what} needs {workers} workers of {request}, but the nodes have room for {places}",
                hint="use fewer workers per variant or fewer threads, or add nodes",
            )
        if not any(self._has_room(n, request) for n in able):
            used = ", ".join(f"{n.name} {self._free(n, 'CPU', n.cpus):g} of {n.cpus:g}" for n in nodes)
            raise ClusterError(
                f"{what} needs {request} free on one node, but free CPUs are: {used}",
                hint="wait until other jobs have ended, or add nodes",
            )
        self._checked.add((request, workers))

    def acquire(self, request: ResourceRequest, workers: int = 1) -> list[Node]:
        """Nodes for `workers` actors, those with most free CPUs, now ours; empty without room for all of them."""
        taken: list[Node] = []
        for _ in range(workers):
            able = [n for n in self._nodes if self._has_room(n, request)]
            if not able:
                for node in taken:
                    self.release(node, request)
                return []
            taken.append(max(able, key=lambda n: self._free(n, "CPU", n.cpus)))
            self._book(taken[-1], request, 1)
        return taken

    def release(self, node: Node, request: ResourceRequest) -> None:
        """Say that what one worker took up on a node is no longer ours."""
        self._book(node, request, -1)

    def _book(self, node: Node, request: ResourceRequest, sign: int) -> None:
        self._ours["CPU"][node.node_id] += sign * request.threads
        self._ours["GPU"][node.node_id] += sign * request.gpus

    def _has_room(self, node: Node, request: ResourceRequest) -> bool:
        return bool(self._places(request, self._free(node, "CPU", node.cpus), self._free(node, "GPU", node.gpus)))

    @staticmethod
    def _places(request: ResourceRequest, cpus: float, gpus: float) -> int:
        """Workers that find room among so many CPUs and GPUs."""
        places = int(cpus // request.threads)
        return min(places, int(gpus // request.gpus)) if request.gpus else places

    def _free(self, node: Node, kind: str, total: float) -> float:
        free = total - self._ours[kind][node.node_id]
        # Ray's figure knows what others use, ours what we asked for a moment ago.
        return min(free, self._available.get(node.node_id, {}).get(kind, 0.0)) if self._available else free
