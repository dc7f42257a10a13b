"""Measuring on a node of a joined cluster: the device class that matters, alone on it for the time it takes."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ryot.artifact import ArtifactId
from ryot.cluster.folders import pack_folder, unpack_folder
from ryot.cluster.options import ClusterOptions
from ryot.cluster.remote import task_on
from ryot.cluster.runtime import Cluster, Node, open_cluster
from ryot.edge.measure import measure_rounds, record_environment
from ryot.edge.protocol import MeasureResult, MeasureSpec
from ryot.errors import ClusterError
from ryot.run.executor import Measured
from ryot.scratch import scratch_folder

if TYPE_CHECKING:
    from ray import ObjectRef

log = logging.getLogger(__name__)


def find_node(cluster: Cluster, label: str, threads: int) -> Node:
    """The largest node that carries `label`: a custom resource `NAME`, or a label `NAME=VALUE`; ours without one.

    Raises `ClusterError` that lists what there is, or says that the node has fewer CPUs than `threads`.
    """
    import ray

    nodes = cluster.nodes()
    name, separator, value = label.partition("=")
    if not label:
        own = ray.get_runtime_context().get_node_id()
        found = [n for n in nodes if n.node_id == own]
    elif separator:
        found = [n for n in nodes if n.labels.get(name) == value]
    else:
        found = [n for n in nodes if n.resources.get(name, 0) > 0]
    if not found:
        there = sorted(
            {r for n in nodes for r in n.resources if not r.startswith(("node:", "CPU", "memory", "object_store"))}
            | {f"{k}={v}" for n in nodes for k, v in n.labels.items() if not k.startswith("ray.io/")}
        )
        raise ClusterError(
            f"bench-on: no node of {cluster.address} carries {label!r} (there are: {', '.join(there) or 'none'})",
            hint=f"start a node with --resources='{{\"{name}\": 1}}'",
        )
    node = max(found, key=lambda n: n.cpus)
    if label and node.cpus < threads:
        raise ClusterError(
            f"bench-on: {node.name} has {node.cpus:g} CPUs, the targets ask for {threads} threads",
            hint="measure on a larger node, or judge by a target with fewer threads",
        )
    return node


def measure_on_node(
    cluster: Cluster,
    specs: Mapping[ArtifactId, MeasureSpec],
    *,
    label: str,
    rounds: int,
    seed: int = 0,
    timeout_s: float = 3600.0,
) -> Measured:
    """`measure_rounds` on a node that carries `label` (ours without one), holding all its CPUs meanwhile.

    The bundles go to the node and are removed from it. Raises `ClusterError` when no node carries the label, none
    becomes free in `timeout_s`, or the node is lost.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    needed = max(spec.threads for spec in specs.values())
    node = find_node(cluster, label, needed)
    if node.cpus < needed:
        # A head that offers Ray no CPUs, as in the files of `cluster/`: no job of the cluster can disturb it.
        cores = sorted(os.sched_getaffinity(0))
        here = {artifact: _pinned(spec, cores) for artifact, spec in specs.items()}
        results = measure_rounds(here, rounds=rounds, seed=seed)
        return Measured(results=results, machine={**record_environment(), "node": node.name}, node=node.name)
    bundles = {artifact: ray.put(pack_folder(Path(spec.bundle))) for artifact, spec in specs.items()}
    log.info("measuring on %s, alone, %g CPUs", node.name, node.cpus)
    task = task_on(node.node_id, _measure, num_cpus=node.cpus)
    ref = task.remote(dict(specs), list(bundles), list(bundles.values()), rounds, seed)
    ready, _ = ray.wait([ref], timeout=timeout_s)
    if not ready:
        ray.cancel(ref, force=True)
        raise ClusterError(
            f"bench-on: {node.name} was not free, or not done, within {timeout_s:g} s",
            hint="wait until other jobs on it have ended, then resume the run",
        )
    try:
        results, machine, niceness = ray.get(ref)
    except RayTaskError as error:
        raise ClusterError(f"bench-on: measuring on {node.name} failed: {error.cause}") from error
    except RayError as error:
        reason = " ".join(str(error).split())[:200]
        raise ClusterError(f"bench-on: {node.name} was lost ({reason})", hint="resume the run") from error
    if niceness > 0:
        log.warning(
            "node %s runs Ray's workers at niceness %d; set RAY_worker_niceness=0 where it starts", node.name, niceness
        )
    machine |= {"node": node.name, "niceness": niceness}
    return Measured(results=results, machine=machine, node=node.name)


def measure_on_cluster(
    options: ClusterOptions, specs: Mapping[ArtifactId, MeasureSpec], *, rounds: int, log_dir: Path
) -> Measured:
    """Join the cluster for the time of a measurement on a node that carries `options.bench_label`, or on ours."""
    with open_cluster(options, log_dir=log_dir) as cluster:
        return measure_on_node(cluster, specs, label=options.bench_label, rounds=rounds)


def _measure(
    specs: dict[ArtifactId, MeasureSpec],
    artifacts: list[ArtifactId],
    packed: list[ObjectRef[bytes]],
    rounds: int,
    seed: int,
) -> tuple[dict[ArtifactId, list[MeasureResult]], dict[str, object], int]:
    """Runs on the node; the last is the niceness of what measured: above 0 it yields to all else there."""
    import ray

    # The workers' settings are for training; a device has glibc's own.
    os.environ.pop("GLIBC_TUNABLES", None)
    cores = sorted(os.sched_getaffinity(0))
    with scratch_folder("measure") as scratch:
        here = {}
        for number, (artifact, ref) in enumerate(zip(artifacts, packed, strict=True)):
            unpack_folder(ray.get(ref), scratch / str(number))
            here[artifact] = _pinned(dataclasses.replace(specs[artifact], bundle=str(scratch / str(number))), cores)
        return measure_rounds(here, rounds=rounds, seed=seed), record_environment(), os.nice(0)


def _pinned(spec: MeasureSpec, cores: Sequence[int]) -> MeasureSpec:
    """The spec on the last of `cores`, as many as it has threads."""
    threads = min(spec.threads, len(cores))
    return dataclasses.replace(spec, threads=threads, cpus=tuple(cores[-threads:]))
