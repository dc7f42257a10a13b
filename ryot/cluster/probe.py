"""What each node of a joined cluster has and sees, asked before anything is scheduled on it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ryot.cluster.remote import task_on
from ryot.cluster.runtime import Cluster, Node
from ryot.errors import ClusterError

if TYPE_CHECKING:
    from ray import ObjectRef

log = logging.getLogger(__name__)

#: Modules that a worker imports, by the name of their distribution.
_NEEDED = ("torch", "safetensors", "tokenizers", "psutil", "numpy")


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a node said about itself."""

    hostname: str
    python: str
    missing: list[str]
    """Modules that training needs and the node lacks."""
    seen: dict[str, bool]
    """For each path asked about, whether the driver's mark was found there and one could be left."""
    clock: float
    """Its seconds since the epoch."""


def look_around(marks: dict[str, str]) -> NodeFacts:
    """Runs on the node: `marks` maps folders to the name of a file that the driver has put there."""
    seen = {}
    for folder, name in marks.items():
        seen[folder] = False
        with contextlib.suppress(OSError):
            seen[folder] = (Path(folder) / name).read_text() == name and os.access(folder, os.R_OK)
    missing = [m for m in _NEEDED if importlib.util.find_spec(m) is None]
    return NodeFacts(socket.gethostname(), sys.version.split()[0], missing, seen, time.time())


def probe_nodes(cluster: Cluster, folders: Sequence[Path], *, timeout_s: float = 60.0) -> dict[str, NodeFacts]:
    """What each living node says about itself, by node id.

    A node that does not answer is left out with a warning. Raises `ClusterError` when a node lacks modules or none
    answers.
    """
    import ray
    from ray.exceptions import RayError

    nodes = cluster.nodes()
    with _marks(folders) as marks:
        asked: dict[ObjectRef[NodeFacts], Node] = {}
        for node in nodes:
            asked[task_on(node.node_id, look_around, num_cpus=0).remote(marks)] = node
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
        facts, problems = {}, [f"{asked[ref].name}: no answer within {timeout_s:g} s" for ref in late]
        for ref in ready:
            try:
                facts[asked[ref].node_id] = ray.get(ref)
            except RayError as error:
                problems.append(f"{asked[ref].name}: {' '.join(str(error).split())[-200:]}")
    for problem in problems:
        log.warning("node %s; it is not used", problem)
    if not facts:
        raise ClusterError(
            f"cluster {cluster.address}: no node can run ryot's workers ({'; '.join(problems) or 'it has no nodes'})",
            hint="each node needs Python, Ray and torch in the versions of constraints.txt",
        )
    check_facts(facts.values())
    return facts


def check_facts(facts: Iterable[NodeFacts]) -> None:
    """Raise `ClusterError` for a node that lacks what training needs; warn of one whose clock is off."""
    for answer in facts:
        if answer.missing:
            raise ClusterError(
                f"node {answer.hostname}: {', '.join(answer.missing)} not installed",
                hint="install 'ryot[train]' (or the image of cluster/Dockerfile) on each node",
            )
        if abs(answer.clock - time.time()) > 60:
            log.warning(
                "node %s: its clock differs by %.0f s; times of its events are off",
                answer.hostname,
                answer.clock - time.time(),
            )


@contextlib.contextmanager
def _marks(folders: Sequence[Path]) -> Iterator[dict[str, str]]:
    name = f".ryot-probe-{secrets.token_hex(8)}"
    marks: dict[str, str] = {}
    try:
        for folder in folders:
            # A read-only folder (a shared data set) carries no mark; it counts as not shared, and its data travels.
            with contextlib.suppress(OSError):
                (folder / name).write_text(name)
                marks[str(folder)] = name
        yield marks
    finally:
        for marked in marks:
            (Path(marked) / name).unlink(missing_ok=True)
