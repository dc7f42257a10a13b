from __future__ import annotations

import threading
from pathlib import Path

from ryot.events import EventLog, EventReader, MeasureEvent, StageEvent, read_events


def test_events_come_back_as_they_were_written(tmp_path: Path) -> None:
    log, told = EventLog(tmp_path / "events.jsonl"), []
    log.listeners.append(told.append)
    written = [StageEvent(stage="data", status="begin"), MeasureEvent(case="a", round=1, ok=False, reason="died")]
    for event in written:
        log.emit(event)
    log.close()
    assert list(read_events(tmp_path / "events.jsonl")) == written == told


def test_events_of_the_version_before_are_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "measure", "time": 1.0, "arm": "a/seed-0/fp32", "round": 1, "ok": true, "gone": 1}\n')
    assert list(read_events(path)) == [MeasureEvent(time=1.0, case="a/seed-0/fp32", round=1, ok=True)]


def test_a_file_that_is_still_written_is_read_on_from_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "stage", "stage": "data", "status": "begin"}\n{"kind": "sta')
    reader = EventReader(path)
    assert [e.status for e in reader.read()] == ["begin"]
    with path.open("a") as file:
        file.write('ge", "stage": "data", "status": "end", "detail": "\u2028"}\n')
    assert [(e.status, e.detail) for e in reader.read()] == [("end", "\u2028")]
    reader.close()


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
            target=lambda n=n: [
                log.emit(StageEvent(stage="train", status="end", seed=n, detail="x" * 500)) for _ in range(200)
            ]
        )
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len(list(read_events(tmp_path / "events.jsonl"))) == 800
