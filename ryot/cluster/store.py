"""Checkpoints in a run folder: which count, whether they are still what they were, and which may go.

    variants/NAME/seed-K/attempt-N/step-XXXXXXXX/   worker.log

An attempt writes only below its own folder, and no folder is written twice, so a worker that goes on after it was
given up can spoil nothing.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ryot.cluster.folders import unpack_folder
from ryot.cluster.jobs import PlannedJob
from ryot.cluster.journal import Accepted, Journal
from ryot.cluster.worker import Saved
from ryot.errors import ClusterError
from ryot.train.checkpoint import checkpoint_digest

log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of all trainings of one run."""

    def __init__(self, run_dir: Path, journal: Journal, *, keep: int, reread: bool):
        """`reread`: whether an accepted checkpoint is hashed again here, because another machine wrote it."""
        self.run_dir, self.journal, self._keep, self._reread = run_dir, journal, keep, reread

    def attempt_folder(self, planned: PlannedJob, attempt: int) -> Path:
        """Where an attempt writes."""
        job = planned.job
        return self.run_dir / "variants" / job.variant.name / f"seed-{job.seed}" / f"attempt-{attempt}"

    def find_whole(self, planned: PlannedJob) -> tuple[list[Accepted], list[str]]:
        """The accepted checkpoints, newest first, and what is wrong with newer ones.

        The first is on disk as it was accepted; newer ones that are not are rejected in the journal.
        """
        accepted, problems = self.journal.accepted(planned.key, planned.digest), []
        while accepted:
            newest = accepted[0]
            path = self.run_dir / newest.path
            if path.is_dir() and checkpoint_digest(path) == newest.sha256:
                break
            problem = "has changed since it was accepted" if path.is_dir() else "is missing"
            self.journal.append("rejected", key=planned.key, path=newest.path, reason=problem)
            accepted.pop(0)
            then = f"going on from step {accepted[0].step}" if accepted else "starting over"
            problems.append(f"checkpoint {newest.path} {problem}; {then}")
            log.warning("%s", problems[-1])
        return accepted, problems

    def accept(self, planned: PlannedJob, attempt: int, saved: Saved, facts: dict[str, Any]) -> Accepted:
        """Make a checkpoint count: its files are checked, then the journal names it. Raises `ClusterError`."""
        path = Path(saved.path)
        if saved.packed is not None:
            unpack_folder(saved.packed, path)
        if not path.is_dir() or (self._reread and checkpoint_digest(path) != saved.sha256):
            raise ClusterError(
                f"checkpoint {path}: the worker wrote it, but it is not what the driver reads there",
                hint="is the shared path mounted here and on every node?",
            )
        relative = path.relative_to(self.run_dir).as_posix()
        accepted = Accepted(relative, saved.sha256, saved.step, attempt, dict(facts))
        self.journal.append(
            "checkpoint",
            key=planned.key,
            digest=planned.digest,
            attempt=attempt,
            step=saved.step,
            path=relative,
            sha256=saved.sha256,
            facts=facts,
        )
        return accepted

    def prune(self, planned: PlannedJob, accepted: Sequence[Accepted], attempt: int) -> None:
        """Remove the files of a training that do not count: old checkpoints and leftovers of earlier attempts."""
        keep = {self.run_dir / a.path for a in accepted[: self._keep]}
        current = self.attempt_folder(planned, attempt)
        for folder in current.parent.glob("attempt-*"):
            for path in [p for p in folder.iterdir() if p.is_dir()]:
                # The attempt in progress may be writing a draft next to its checkpoints.
                if path not in keep and not (folder == current and path.name.startswith(".")):
                    shutil.rmtree(path, ignore_errors=True)
            if folder != current and not any(folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)
