"""Kernel decisions taken where trainings run: in a worker, on a claimed core, with nothing else running there."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ryot.cluster.cores import CoreClaim, pin_process
from ryot.cluster.folders import pack_folder, unpack_folder
from ryot.config import VariantConfig

if TYPE_CHECKING:
    from ryot.cluster.runtime import Cluster
    from ryot.optimize.kernels import KernelDecision
    from ryot.train.dataset import Dataset


def tune_on_cluster(
    cluster: Cluster, variant: VariantConfig, dataset: Dataset, cache_dir: Path, *, threads: int
) -> KernelDecision:
    """The kernel decision for `variant`, taken in a worker of the cluster."""
    import ray

    packed = None if cluster.embedded else pack_folder(dataset.path)
    decide = ray.remote(num_cpus=threads, max_retries=2)(_decide)
    decision: KernelDecision = ray.get(decide.remote(variant, str(dataset.path), packed, str(cache_dir), threads))
    return decision


def _decide(
    variant: VariantConfig, dataset_dir: str, packed: bytes | None, cache_dir: str, threads: int
) -> KernelDecision:
    from ryot.optimize.kernels import choose_kernels
    from ryot.train.dataset import load_dataset

    claim = CoreClaim(threads)
    try:
        if claim.cores:
            pin_process(claim.cores)
        with tempfile.TemporaryDirectory(prefix="ryot-tune-") as scratch:
            path = Path(dataset_dir)
            if packed is not None:
                path = Path(scratch) / "dataset"
                unpack_folder(packed, path)
            return choose_kernels(variant, load_dataset(path), Path(cache_dir), threads=threads)
    finally:
        claim.release()
