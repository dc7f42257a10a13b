"""Kernel decisions taken where trainings run: in a worker, on a claimed core, with nothing else running there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ryot.cluster.cores import CoreClaim, pin_process
from ryot.cluster.folders import pack_folder, unpack_folder
from ryot.config import VariantConfig
from ryot.errors import ClusterError
from ryot.scratch import scratch_folder

if TYPE_CHECKING:
    from ryot.cluster.runtime import Cluster
    from ryot.optimize.kernels import KernelDecision
    from ryot.train.dataset import Dataset

#: Timing every candidate takes seconds, with a cold compiler minutes.
TIMEOUT_S = 900.0


def tune_on_cluster(
    cluster: Cluster, variant: VariantConfig, dataset: Dataset, cache_dir: Path, *, threads: int
) -> KernelDecision:
    """The kernel decision for `variant`, taken in a worker of the cluster, which must have room for one.

    Raises `ClusterError` when the worker is lost or says nothing for `TIMEOUT_S`.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    packed = None if cluster.embedded else pack_folder(dataset.path)
    gpus = 1 if variant.kernels.device == "cuda" else 0
    decide = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=2)(_decide)
    ref = decide.remote(variant, str(dataset.path), packed, str(cache_dir), threads)
    hint = "resume the run, or start it with --no-tune"
    ready, _ = ray.wait([ref], timeout=TIMEOUT_S)
    if not ready:
        ray.cancel(ref, force=True)
        raise ClusterError(f"tuning {variant.name}: no answer within {TIMEOUT_S:g} s", hint=hint)
    try:
        decision: KernelDecision = ray.get(ref)
    except RayTaskError as error:
        raise ClusterError(f"tuning {variant.name}: {type(error.cause).__name__}: {error.cause}", hint=hint) from error
    except RayError as error:
        reason = " ".join(str(error).split())[:200]
        raise ClusterError(f"tuning {variant.name}: its worker was lost ({reason})", hint=hint) from error
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
        with scratch_folder("tune") as scratch:
            path = Path(dataset_dir)
            if packed is not None:
                path = scratch / "dataset"
                unpack_folder(packed, path)
            return choose_kernels(variant, load_dataset(path), Path(cache_dir), threads=threads)
    finally:
        claim.release()
