"""What all stages of a run share: its folder, its journal, its events, and the clock of its stages."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ryot.events import Event, EventLog, StageEvent, StageName, StageStatus
from ryot.report.rows import StageTime
from ryot.run.executor import Executor
from ryot.run.folder import RunFolder
from ryot.run.journal import Journal


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings:
    """How a run is carried out; none of it changes what is computed."""

    command: str
    cache_dir: Path
    executor: Executor
    listeners: Sequence[Callable[[Event], None]] = ()


@dataclass(slots=True)
class StageNote:
    """What a stage says about itself while it runs."""

    status: StageStatus = "end"
    detail: str = ""


class RunContext:
    """One driver's hold on a run folder; use it while holding the folder's lock."""

    def __init__(self, folder: RunFolder, settings: RunSettings):
        self.folder, self.settings = folder, settings
        self.executor = settings.executor
        self.journal = Journal(folder)
        self.events = EventLog(folder.events)
        self.events.listeners += settings.listeners
        self.stage_times: list[StageTime] = []

    @contextlib.contextmanager
    def stage(self, name: StageName) -> Iterator[StageNote]:
        """Tell that a stage begins and how it ended, with what the block writes into the note."""
        self.events.emit(StageEvent(stage=name, status="begin"))
        begin = time.monotonic()
        note = StageNote()
        try:
            yield note
        except BaseException as error:
            detail = str(error) or type(error).__name__
            self.events.emit(StageEvent(stage=name, status="failed", wall_s=time.monotonic() - begin, detail=detail))
            raise
        wall_s = time.monotonic() - begin
        self.stage_times.append(StageTime(stage=name, wall_s=round(wall_s, 3)))
        self.events.emit(StageEvent(stage=name, status=note.status, wall_s=wall_s, detail=note.detail))

    def close(self) -> None:
        """Let go of the files."""
        self.events.close()
        self.journal.close()
