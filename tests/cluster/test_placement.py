"""Where workers find room, without Ray: the nodes are made up, since no machine here has a GPU."""

from __future__ import annotations

import pytest

from ryot.cluster.placement import Placement, ResourceRequest
from ryot.cluster.runtime import Node
from ryot.errors import ClusterError


class MadeUp:
    """What `Placement` asks of a cluster."""

    embedded = True

    def __init__(self, *nodes: tuple[float, float]):
        self._nodes = [Node(f"id{i}", f"node{i}", "127.0.0.1", *node) for i, node in enumerate(nodes)]

    def nodes(self) -> list[Node]:
        return self._nodes


def test_each_worker_gets_a_gpu_of_its_own_and_waits_for_one() -> None:
    placement = Placement(MadeUp((8, 2), (8, 0), (1, 4)))  # type: ignore[arg-type]
    request = ResourceRequest(2, gpus=1)
    # The third node has GPUs without cores to feed them.
    assert placement.count_places(request) == 2 and placement.count_places(ResourceRequest(1, gpus=1)) == 3
    placement.check_fits(request, 2, "training")
    with pytest.raises(ClusterError, match="needs 3 workers of 2 CPUs and 1 GPU, but the nodes have room for 2"):
        placement.check_fits(request, 3, "training")
    [first, second] = placement.acquire(request, 2)
    assert first.name == second.name == "node0"
    assert placement.acquire(request) == [] and placement.acquire(ResourceRequest(2)) != []
    placement.release(first, request)
    assert placement.acquire(request) == [first]


def test_a_cluster_without_a_gpu_has_no_place_for_one() -> None:
    assert Placement(MadeUp((8, 0))).count_places(ResourceRequest(1, gpus=1)) == 0  # type: ignore[arg-type]
