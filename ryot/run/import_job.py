"""The export of one model that exists, as whatever computes for a run carries it out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ryot.deploy.artifact import ExportOptions
from ryot.deploy.export import ArtifactResult, export_variant
from ryot.deploy.text_check import open_text
from ryot.deploy.weights import source_spec
from ryot.errors import CheckpointError, DataError, RyotError
from ryot.models.sources.opening import open_checkpoint
from ryot.train.corpus import load_corpus


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportJob:
    """One export of a model, for any process that sees the model, the text and the run folder."""

    name: str
    source: str
    sha256: str
    data: tuple[str, ...]
    corpus_sha256: str
    precisions: tuple[str, ...]
    options: ExportOptions
    artifacts: Path
    """Where the artifacts go, one folder per precision."""
    cost: int
    """Rough work in it, to start long ones first."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """What must be seen where it is done."""
        local = [self.source] if Path(self.source).exists() else []
        paths = [Path(path) for path in (*local, *self.data)]
        near = [next(p for p in (path, *path.parents) if p.is_dir()) for path in paths]
        return tuple(dict.fromkeys([self.artifacts.parents[3], *near]))


def export_model(job: ImportJob, tell: Callable[[str], None]) -> list[ArtifactResult]:
    """Carry out an export; `tell` hears of each of its stages.

    Raises as `export_variant` does, and when model or text are not what the run looked at.
    """
    checkpoint = open_checkpoint(job.source)
    if checkpoint.sha256 != job.sha256:
        raise CheckpointError(
            f"checkpoint {job.source}: has changed since the run looked at it", hint="resume the run; it is read anew"
        )
    corpus = load_corpus(job.data)
    if corpus.sha256 != job.corpus_sha256:
        raise DataError(
            f"data: {corpus.name} is another text here (sha256 {corpus.sha256[:12]}…, expected "
            f"{job.corpus_sha256[:12]}…)",
            hint="give text with --data that lies on a path that all nodes share",
        )
    text = open_text(checkpoint, corpus, source_spec(checkpoint, job.options.context))
    shutil.rmtree(job.artifacts, ignore_errors=True)  # what a worker that died left
    return export_variant(checkpoint, job.artifacts, job.precisions, text, options=job.options, tell=tell)


class ImportListener(Protocol):
    """Who wants to know what becomes of jobs; called in the thread that gave them."""

    def begun(self, job: ImportJob, where: str) -> None:
        """A worker has been asked to do a job."""

    def told(self, job: ImportJob, detail: str) -> None:
        """A job has come to its next stage."""

    def lost(self, job: ImportJob, reason: str) -> None:
        """The worker of a job is gone; the job begins again."""

    def done(self, job: ImportJob, exported: list[ArtifactResult]) -> None:
        """A job has given its artifacts."""

    def failed(self, job: ImportJob, error: RyotError) -> None:
        """A job cannot be done."""
