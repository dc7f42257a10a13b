"""The nodes of a cluster as a driver finds them: which can be used, and what they see of the driver's folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ryot.cluster.placement import Placement
from ryot.cluster.probe import probe_nodes
from ryot.cluster.runtime import Cluster


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where workers can be asked for."""

    placement: Placement
    unseen: frozenset[Path]
    """Folders of the driver that not every node sees."""


def find_workplace(cluster: Cluster, folders: Sequence[Path]) -> Workplace:
    """Look at the nodes of an open cluster once. Raises `ClusterError` when they cannot run ryot's workers."""
    placement = Placement(cluster)
    if cluster.embedded:
        return Workplace(placement, frozenset())
    facts = probe_nodes(cluster, folders)
    placement.only(set(facts))
    unseen = {path for path in folders if not all(f.seen.get(str(path), False) for f in facts.values())}
    return Workplace(placement, frozenset(unseen))
