"""Checkpoints in a run folder: which count, whether they are still what they were, and which may go.

An attempt writes only below its own folder, and no folder is written twice, so a worker that goes on after it was
given up can spoil nothing.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from ryot.errors import ClusterError
from ryot.run.folder import RunFolder
from ryot.run.journal import CheckpointAccepted, CheckpointRejected, Journal
from ryot.run.metrics import TrainMetrics
from ryot.run.training import Training
from ryot.train.checkpoint import checkpoint_digest

log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of all trainings of one run."""

    def __init__(self, folder: RunFolder, journal: Journal, *, keep: int, reread: bool):
        """`reread`: whether an accepted checkpoint is hashed again here, because another machine wrote it."""
        self.folder, self.journal, self._keep, self._reread = folder, journal, keep, reread

    def attempt_folder(self, training: Training, attempt: int) -> Path:
        """Where an attempt writes."""
        return self.folder.attempt(training.variant.name, training.seed, attempt)

    def find_whole(self, training: Training) -> tuple[list[CheckpointAccepted], list[str]]:
        """The accepted checkpoints, newest first, and what is wrong with newer ones.

        The first is on disk as it was accepted; newer ones that are not are rejected in the journal.
        """
        accepted, problems = self.journal.accepted(training.key, training.digest), []
        while accepted:
            newest = accepted[0]
            path = self.folder.path / newest.path
            if path.is_dir() and checkpoint_digest(path) == newest.sha256:
                break
            problem = "has changed since it was accepted" if path.is_dir() else "is missing"
            self.journal.append(CheckpointRejected(key=training.key, path=newest.path, reason=problem))
            accepted.pop(0)
            then = f"resuming from step {accepted[0].step}" if accepted else "starting over"
            problems.append(f"checkpoint {newest.path} {problem}; {then}")
            log.warning("%s", problems[-1])
        return accepted, problems

    def accept(
        self, training: Training, attempt: int, *, step: int, path: Path, sha256: str, metrics: TrainMetrics
    ) -> CheckpointAccepted:
        """Make a checkpoint count: its files are checked, then the journal names it. Raises `ClusterError`."""
        if not path.is_dir() or (self._reread and checkpoint_digest(path) != sha256):
            raise ClusterError(
                f"checkpoint {path}: the worker wrote it, but it is not what the driver reads there",
                hint="is the shared path mounted here and on every node?",
            )
        accepted = CheckpointAccepted(
            key=training.key,
            digest=training.digest,
            attempt=attempt,
            step=step,
            path=self.folder.relative(path),
            sha256=sha256,
            metrics=metrics,
        )
        self.journal.append(accepted)
        return accepted

    def prune(self, training: Training, accepted: Sequence[CheckpointAccepted], attempt: int) -> None:
        """Remove the files of a training that do not count: old checkpoints and leftovers of earlier attempts."""
        keep = {self.folder.path / a.path for a in accepted[: self._keep]}
        current = self.attempt_folder(training, attempt)
        for folder in self.folder.attempts(training.variant.name, training.seed):
            for path in [p for p in folder.iterdir() if p.is_dir()]:
                # The attempt in progress may be writing a partial one next to its checkpoints.
                if path not in keep and not (folder == current and path.name.startswith(".")):
                    shutil.rmtree(path, ignore_errors=True)
            if folder != current and not any(folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)
