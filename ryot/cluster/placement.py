"""Which node has cores free for the next worker."""

from __future__ import annotations

from collections import Counter

from ryot.cluster.runtime import Cluster, Node
from ryot.errors import ClusterError


class Placement:
    """Our own book of CPUs per node.

    Ray would also queue what does not fit, silently and for ever; here a worker is asked for only where there is room.
    """

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self._ours: Counter[str] = Counter()
        self._refused: set[str] = set()

    def only(self, node_ids: set[str]) -> None:
        """Use no other nodes but these, and those that join later."""
        self._refused = {n.node_id for n in self.cluster.nodes()} - node_ids

    def check_fits(self, threads: int, what: str) -> None:
        """Raise `ClusterError` when no node could ever hold a worker of `threads` cores, or none is free at all now."""
        nodes = self.cluster.nodes()
        largest = max((n.cpus for n in nodes), default=0.0)
        if threads > largest:
            raise ClusterError(
                f"{what} needs {threads} CPUs on one node, but the largest of {len(nodes)} nodes has {largest:g}",
                hint="use fewer threads, or a cluster with a larger node",
            )
        if not self.cluster.embedded and not any(self._free(n, self._available()) >= threads for n in nodes):
            used = ", ".join(f"{n.hostname} {self._free(n, self._available()):g} of {n.cpus:g}" for n in nodes)
            raise ClusterError(
                f"{what} needs {threads} free CPUs on one node, but free are: {used}",
                hint="wait until other jobs have ended, or add nodes",
            )

    def take(self, threads: int) -> Node | None:
        """The node with most free CPUs, `threads` of them now ours; None when no node has that many."""
        available = self._available()
        nodes = [n for n in self.cluster.nodes() if n.node_id not in self._refused]
        best = max(nodes, key=lambda n: self._free(n, available), default=None)
        if best is None or self._free(best, available) < threads:
            return None
        self._ours[best.node_id] += threads
        return best

    def give_back(self, node: Node, threads: int) -> None:
        """Say that `threads` CPUs of a node are no longer ours."""
        self._ours[node.node_id] -= threads

    def _available(self) -> dict[str, float]:
        if self.cluster.embedded:
            return {}
        from ray._private.state import available_resources_per_node

        return {node_id: r.get("CPU", 0.0) for node_id, r in available_resources_per_node().items()}

    def _free(self, node: Node, available: dict[str, float]) -> float:
        free = node.cpus - self._ours[node.node_id]
        # Ray's figure knows what others use, ours what we asked for a moment ago.
        return min(free, available.get(node.node_id, 0.0)) if available else free
