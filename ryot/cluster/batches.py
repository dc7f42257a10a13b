"""A file of requests answered by every machine of a Ray cluster, with Ray Data.

Each actor holds the model and answers blocks of requests as `serve.batch` does on one machine. The bundle's files go to
the actors as one object, so no path has to be shared. Answers come back as they are ready and are written by this
process alone: a run that is killed goes on like any other batch.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ryot.cluster.options import ClusterOptions
from ryot.cluster.runtime import open_cluster
from ryot.errors import BundleError, ClusterError
from ryot.serve.batch import READ_AHEAD, Answered, BadLine, Batch, Progress, answer_line, open_batch
from ryot.serve.model import ModelOptions, ServedModel

#: What Ray Data passes between its stages: a column by name.
Block = dict[str, Any]


class Answerer:
    """A model in an actor."""

    def __init__(self, files: Any, options: ModelOptions):
        """`files` refers to the bundle's files by their path in it. Raises like `ServedModel`."""
        import ray

        self._folder = tempfile.TemporaryDirectory(prefix="ryot-bundle-")
        root = Path(self._folder.name) / "bundle"
        for name, data in ray.get(files).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        self._model = ServedModel(root, options)
        self._model.start()

    def __call__(self, block: Block) -> Block:
        """Status, line and tokens of the answer to each request."""
        found = asyncio.run(self._answer(block))
        return {
            "size": block["size"],
            "status": np.array([answered.status for answered in found]),
            "answer": np.array([answered.data for answered in found], object),
            "tokens": np.array([answered.completion_tokens for answered in found]),
        }

    async def _answer(self, block: Block) -> list[Answered]:
        pairs = zip(block["custom_id"], block["data"], strict=True)
        return list(await asyncio.gather(*(answer_line(self._model, str(name), bytes(data)) for name, data in pairs)))


def run_cluster_batch(
    bundle: Path,
    options: ModelOptions,
    requests: Path,
    answers: Path,
    on_progress: Callable[[Progress], None],
    cluster: ClusterOptions,
) -> tuple[Progress, list[BadLine]]:
    """Like `serve.batch.run_batch`, on a cluster. Raises `ClusterError` too."""
    files = {str(path.relative_to(bundle)): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    with (
        open_batch(requests, answers, on_progress) as batch,
        tempfile.TemporaryDirectory(prefix="ryot-batch-") as logs,
    ):
        if batch.missing:
            with open_cluster(cluster, log_dir=Path(logs)):
                _answer_on_ray(batch, files, options)
    return batch.progress, batch.bad


def _answer_on_ray(batch: Batch, files: dict[str, bytes], options: ModelOptions) -> None:
    import ray

    try:
        import ray.data
    except ImportError as error:
        raise ClusterError(
            f"a batch on a cluster needs Ray Data ({error})", hint='pip install "ray[data]" here and on every node'
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    block_size = READ_AHEAD * options.rows
    # An actor takes its cores for good, and nothing else needs any: the requests are made here.
    num_actors = max(1, int(ray.cluster_resources().get("CPU", 1) // options.threads))
    num_blocks = -(-len(batch.missing) // block_size)
    rows = (
        ray.data.from_items(list(_read(batch)), override_num_blocks=max(1, num_blocks))
        .map_batches(
            Answerer,
            fn_constructor_args=(ray.put(files), options),
            batch_size=block_size,
            concurrency=min(num_actors, max(1, num_blocks)),
            num_cpus=options.threads,
        )
        .iter_rows()
    )
    try:
        for row in rows:
            batch.write(int(row["size"]), Answered(int(row["status"]), bytes(row["answer"]), int(row["tokens"])))
    except ray.exceptions.RayError as error:
        raise _explain(error) from error


def _explain(error: Exception) -> Exception:
    """What went wrong in an actor, in one line."""
    cause = getattr(error, "cause", None) or error
    first = next((line for line in reversed(str(cause).splitlines()) if line.strip()), type(error).__name__)
    kind = BundleError if "BundleError" in str(cause) else ClusterError
    return kind(f"a worker of the batch failed: {first.strip()[:300]}", hint="To resume: the same command")


def _read(batch: Batch) -> Iterator[Block]:
    with batch.requests.open("rb") as source:
        for line in batch.missing:
            source.seek(line.offset)
            yield {"custom_id": line.custom_id, "size": line.size, "data": source.readline()}
