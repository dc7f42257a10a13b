"""Where everything in a run folder is.

run.toml        the resolved plan, kernel decisions included
events.jsonl    everything that happened
journal.jsonl   what counts: accepted checkpoints and finished stages, fsynced
variants/NAME/seed-K/attempt-N/step-S/      checkpoints
variants/NAME/seed-K/attempt-N/worker.log   what its worker said; worker-R.log of the other ranks
variants/NAME/seed-K/artifacts/PRECISION/   exported artifacts, each a bundle
measure.json    what was measured
report.json report.md report.html           the result
bundle/         the chosen artifact with its record
logs/           what Ray said
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ryot.report.rows import REPORT_FILE


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of one run; nothing here looks at the disk but `is_run` and `attempts`."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def plan(self) -> Path:
        return self.path / "run.toml"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def lock(self) -> Path:
        return self.path / "run.lock"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def measurements(self) -> Path:
        return self.path / "measure.json"

    @property
    def report(self) -> Path:
        return self.path / REPORT_FILE

    @property
    def markdown(self) -> Path:
        return self.path / "report.md"

    @property
    def html(self) -> Path:
        return self.path / "report.html"

    @property
    def bundle(self) -> Path:
        return self.path / "bundle"

    def training(self, variant: str, seed: int) -> Path:
        """The folder of one training."""
        return self.path / "variants" / variant / f"seed-{seed}"

    def attempt(self, variant: str, seed: int, attempt: int) -> Path:
        """Where one attempt at a training writes, and no other."""
        return self.training(variant, seed) / f"attempt-{attempt}"

    def attempts(self, variant: str, seed: int) -> list[Path]:
        """The folders of all attempts at a training that are there."""
        return list(self.training(variant, seed).glob("attempt-*"))

    def artifacts(self, variant: str, seed: int) -> Path:
        """Where the artifacts of a training are, one folder per precision."""
        return self.training(variant, seed) / "artifacts"

    def relative(self, path: Path) -> str:
        """The path as journal and report keep it: a run folder may be moved."""
        return path.relative_to(self.path).as_posix()

    @property
    def is_run(self) -> bool:
        """Whether there is a run."""
        return self.journal.is_file()


def checkpoint_folder(attempt: Path, step: int) -> Path:
    """Where an attempt keeps its checkpoint of a step."""
    return attempt / f"step-{step:08d}"


def worker_log(attempt: Path, rank: int = 0) -> Path:
    """What a worker of an attempt said."""
    return attempt / (f"worker-{rank}.log" if rank else "worker.log")


def resume_hint(path: Path) -> str:
    """The command that resumes a run."""
    return f"To resume: ryot-deploy cluster-run --resume {path}"
