"""A driver to be killed and stopped: trains two small variants in RUN_DIR and says each event as a JSON line.

    train_program.py RUN_DIR DATASET_DIR [--address HOST:PORT] [--steps N] [--chunk-s S] [--checkpoint-every-s S]

Exits as `ryot-deploy` does: with the code of the error, which is said on stderr.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from ryot.cluster.driver import train_variants
from ryot.cluster.options import ClusterOptions
from ryot.cluster.runtime import open_cluster
from ryot.config import replace
from ryot.errors import EXIT_INTERRUPTED, RyotError
from ryot.events import Event, event_to_dict
from ryot.run.folder import RunFolder
from ryot.run.journal import Journal
from ryot.run.lock import RunLock
from ryot.train.dataset import load_dataset
from tests.cluster.conftest import SHORT, plan_both


def say(values: dict) -> None:
    """One JSON line on stdout, at once."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def say_event(event: Event) -> None:
    say(event_to_dict(event))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("dataset_dir", type=Path)
    parser.add_argument("--address")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--chunk-s", type=float, default=SHORT.chunk_s)
    parser.add_argument("--checkpoint-every-s", type=float, default=SHORT.checkpoint_every_s)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    dataset = load_dataset(arguments.dataset_dir)
    jobs = plan_both(dataset, arguments.steps)
    options = replace(SHORT, chunk_s=arguments.chunk_s, checkpoint_every_s=arguments.checkpoint_every_s)
    run_dir = arguments.run_dir
    run_dir.mkdir(exist_ok=True)
    folder = RunFolder(run_dir)
    with RunLock(folder):
        journal = Journal(folder)
        journal.open_run()
        with open_cluster(ClusterOptions(address=arguments.address), log_dir=run_dir / "logs") as cluster:
            results = train_variants(
                jobs, cluster=cluster, folder=folder, journal=journal, emit=say_event, options=options
            )
    for result in results:
        say({"kind": "result", "variant": result.variant, "checkpoint": str(result.checkpoint)})


if __name__ == "__main__":
    try:
        main()
    except RyotError as error:
        sys.stderr.write(f"Error: {error}\nhint: {error.hint}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
