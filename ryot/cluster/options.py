"""How a cluster is used and how trainings are driven on it; none of it changes what is computed.

A field with an option's text is an option of `cluster-run`. Nothing here imports Ray.
"""

from __future__ import annotations

from dataclasses import dataclass

from ryot.config import CHECKPOINT_EVERY_S
from ryot.run.options import option

#: Keeps large tensors on the heap and backs them with huge pages: 1.0 to 1.15x in training, for every variant alike.
MALLOC_TUNABLES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592:glibc.malloc.hugetlb=1"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterOptions:
    """Which Ray a run uses."""

    address: str | None = option(
        None,
        "Use this Ray cluster: HOST:PORT or auto  [env: RAY_ADDRESS; default: one on this machine for this run alone]",
        metavar="HOST:PORT",
        envvar="RAY_ADDRESS",
    )
    bench_label: str = option(
        "",
        "Measure on a node with this custom resource or NAME=VALUE label, not on ours",
        metavar="LABEL",
        flag="bench-on",
    )
    num_cpus: int | None = None
    """Cores of an embedded cluster; None for all that this process may use."""
    object_store_bytes: int = 80 * 2**20
    """Shared memory of an embedded cluster; Ray takes no less than 78,643,200."""
    malloc_tunables: str = MALLOC_TUNABLES
    """GLIBC_TUNABLES of the workers; empty for glibc's own settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriverOptions:
    """How trainings are cut into chunks, kept and retried."""

    max_hours: float | None = option(None, "Stop, resumably, after so long", metavar="H", above=0)
    keep_checkpoints: int = option(2, "Checkpoints of each training that stay on disk", metavar="N", at_least=1)
    chunk_s: float = 3.0
    """Seconds of training between two reports of a worker."""
    checkpoint_every_s: float = CHECKPOINT_EVERY_S
    """Seconds between two checkpoints; a chunk longer than that ends with one."""
    max_failures: int = 6
    """Failures of workers in a row, without a checkpoint accepted in between, after which a training is given up."""
    backoff_s: float = 0.5
    """Wait before the first retry; doubles with each further failure, up to 30 s."""
    start_timeout_s: float = 120.0
    """Time in which a worker must have built its trainer."""
    chunk_timeout_s: float = 1800.0
    """Time after which a chunk that has not reported (a hung worker) counts as failed."""
    cores_timeout_s: float = 600.0
    """Time after which a run that finds no free core anywhere is given up."""
