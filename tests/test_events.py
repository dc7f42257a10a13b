from __future__ import annotations

import threading
from pathlib import Path

from ryot.events import EventLog, MeasureEvent, StageEvent, read_events


def test_events_come_back_as_they_were_written(tmp_path: Path) -> None:
    log, told = EventLog(tmp_path / "events.jsonl"), []
    log.listeners.append(told.append)
    written = [StageEvent(stage="data", status="begin"), MeasureEvent(arm="a", round=1, ok=False, reason="died")]
    for event in written:
        log.emit(event)
    log.close()
    assert list(read_events(tmp_path / "events.jsonl")) == written == told


def test_a_line_cut_short_by_a_crash_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.emit(StageEvent(stage="data", status="begin"))
    log.close()
    path.write_text(path.read_text() + '{"kind": "stage", "sta')
    assert [e.kind for e in read_events(path)] == ["stage"]


def test_what_a_full_disk_left_of_a_line_does_not_spoil_the_next_ones(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "stage", "stage": "data", "status": "begin"}\n{"kind": "stage", "sta')
    log = EventLog(path)
    log.emit(StageEvent(stage="train", status="begin"))
    log.close()
    assert [e.stage for e in read_events(path) if isinstance(e, StageEvent)] == ["data", "train"]


def test_threads_do_not_tear_lines(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    threads = [
        threading.Thread(
            target=lambda n=n: [log.emit(StageEvent(stage=f"s{n}", status="end", detail="x" * 500)) for _ in range(200)]
        )
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len(list(read_events(tmp_path / "events.jsonl"))) == 800
