"""Which node has cores free for the next worker."""

from __future__ import annotations

import time
from collections import Counter

from ryot.cluster.runtime import Cluster, Node
from ryot.errors import ClusterError

#: How old what is known of the nodes may be when a worker is placed.
_FRESH_S = 1.0


class Placement:
    """Our own book of CPUs per node.

    Ray would also queue what does not fit, silently and for ever; here a worker is asked for only where there is room.
    """

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self._ours: Counter[str] = Counter()
        self._refused: set[str] = set()
        self._nodes: list[Node] = []
        self._available: dict[str, float] = {}
        self._looked_at = float("-inf")

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

            self._available = {node_id: r.get("CPU", 0.0) for node_id, r in available_resources_per_node().items()}
        self._looked_at = time.monotonic()

    def check_fits(self, threads: int, workers: int, what: str) -> None:
        """Raise `ClusterError` when `workers` actors of `threads` cores never fit, or not one of them fits now."""
        self.look()
        largest = max((n.cpus for n in self._nodes), default=0.0)
        if threads > largest:
            raise ClusterError(
                f"{what} needs {threads} CPUs on one node, but the largest of {len(self._nodes)} nodes has {largest:g}",
                hint="use fewer threads, or a cluster with a larger node",
            )
        places = sum(int(n.cpus // threads) for n in self._nodes)
        if workers > places:
            raise ClusterError(
                f"{what} needs {workers} workers of {threads} CPUs, but the nodes have room for {places}",
                hint="use fewer workers per variant or fewer threads, or add nodes",
            )
        if not any(self._free(n) >= threads for n in self._nodes):
            used = ", ".join(f"{n.name} {self._free(n):g} of {n.cpus:g}" for n in self._nodes)
            raise ClusterError(
                f"{what} needs {threads} free CPUs on one node, but free are: {used}",
                hint="wait until other jobs have ended, or add nodes",
            )

    def take(self, threads: int, workers: int = 1) -> list[Node]:
        """Nodes for `workers` actors, those with most free CPUs, `threads` on each now ours; empty without room."""
        taken: list[Node] = []
        for _ in range(workers):
            best = max(self._nodes, key=self._free, default=None)
            if best is None or self._free(best) < threads:
                for node in taken:
                    self.give_back(node, threads)
                return []
            self._ours[best.node_id] += threads
            taken.append(best)
        return taken

    def give_back(self, node: Node, threads: int) -> None:
        """Say that `threads` CPUs of a node are no longer ours."""
        self._ours[node.node_id] -= threads

    def _free(self, node: Node) -> float:
        free = node.cpus - self._ours[node.node_id]
        # Ray's figure knows what others use, ours what we asked for a moment ago.
        return min(free, self._available.get(node.node_id, 0.0)) if self._available else free
