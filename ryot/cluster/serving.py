"""`serve --address`: deploys the server on a Ray cluster, where it stays when this process ends."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ryot.cluster.options import ClusterOptions
from ryot.cluster.runtime import open_cluster
from ryot.errors import ClusterError
from ryot.serve.model import ModelOptions
from ryot.serve.server import ServerOptions


def deploy(
    bundles: Sequence[Path],
    model: ModelOptions,
    options: ServerOptions,
    cluster: ClusterOptions,
    *,
    max_replicas: int,
) -> str:
    """Deploy, or replace what was deployed replica by replica; the address when it answers. Raises `ClusterError`."""
    with tempfile.TemporaryDirectory(prefix="ryot-serve-") as logs, open_cluster(cluster, log_dir=Path(logs)):
        from ray import serve

        from ryot.cluster.replicas import APP_NAME, ReplicaOptions, build_application

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options={"host": options.host, "port": options.port})
        asked = ReplicaOptions.of(bundles, model, options, max_replicas=max_replicas)
        try:
            serve.run(build_application(asked), name=APP_NAME, route_prefix="/")
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise ClusterError(f"the server does not start: {first}", hint="'serve status' says more") from error
        return f"http://{options.host}:{options.port}"


def check_installed() -> None:
    """Raise `ClusterError` where Ray Serve is missing."""
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise ClusterError(
            f"a server on a cluster needs Ray Serve ({error})", hint='pip install "ray[serve]" here and on every node'
        ) from error
