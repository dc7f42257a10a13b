"""`cluster-run` as a user runs it, small: from text to a bundle, stopped and resumed, finished and asked again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from ryot.cli.main import main
from ryot.errors import RyotError
from ryot.events import EvalEvent, Event, StageEvent, StepEvent, read_events
from ryot.report.rows import load_report
from ryot.run.journal import AttemptBegun, parse_journal
from tests.run.tiny import QUICK, tiny_recipes

RYOT = [sys.executable, "-c", "from ryot.cli.main import run; run()"]


@pytest.fixture(scope="module")
def quick(text_folder: Path) -> list[str]:
    """Options for a small run on some text of the standard library."""
    return ["--data", str(text_folder), *QUICK]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, quick: list[str]) -> list[str]:
    """Both recipes as they are packaged, at a tiny size."""
    return [*tiny_recipes(tmp_path_factory.mktemp("inputs"), "baseline", "optimized"), *quick]


def start(*arguments: str, cache: Path, through: Sequence[str] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*through, *RYOT, "cluster-run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RYOT_CACHE_DIR": str(cache)},
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(
    options: list[str], cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A whole run, undisturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    process = start(*options, "-o", str(run_dir), cache=cache)
    out, err = process.communicate(timeout=600)
    return run_dir, subprocess.CompletedProcess([], process.returncode, out, err)


def test_a_run_whose_report_could_not_be_drawn_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused = CliRunner().invoke(main, ["cluster-run", *options, "-o", str(tmp_path / "run")])
    assert refused.exit_code == 1 and isinstance(refused.exception, RyotError), refused.output
    assert (str(refused.exception), refused.exception.hint) == (
        "report.html needs matplotlib",
        "pip install 'ryot[report]'",
    )
    assert not (tmp_path / "run").exists()


def test_a_run_ends_with_a_table_a_report_and_a_bundle(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run_dir, result = finished
    assert result.returncode == 0, result.stderr
    assert "phase1" in result.stdout and "PASS" in result.stdout and "(raylet)" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    report = load_report(run_dir)
    assert {(r.variant, r.precision) for r in report.rows} == {
        (v, p) for v in ("baseline", "optimized") for p in ("fp32", "int8-dyn", "int8", "int4")
    }
    assert report.quick and report.corpus["sha256"] and report.bundle == "bundle"
    for training in report.variants:
        assert training.val_loss is not None and training.initial_val_loss is not None
        assert training.val_loss < training.initial_val_loss - 0.3
        assert training.concurrent
    for row in report.rows:
        assert row.runs_ok == row.runs == 3 and row.ttft_ms and row.decode_tok_s and row.peak_rss_bytes
    assert sum(row.chosen for row in report.rows) == 1
    assert (run_dir / "report.html").read_text().startswith("<!doctype html>")
    assert "PASS" in (run_dir / "report.md").read_text()


def test_the_report_fits_its_schema(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    import jsonschema

    from ryot.report.rows import load_schema

    report = json.loads((finished[0] / "report.json").read_text())
    jsonschema.validate(report, load_schema())
    with pytest.raises(jsonschema.ValidationError, match="size_bytes"):
        jsonschema.validate(
            report | {"rows": [{k: v for k, v in report["rows"][0].items() if k != "size_bytes"}]}, load_schema()
        )


def test_the_bundle_runs_verifies_and_carries_its_record(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    bundle = finished[0] / "bundle"
    program = [sys.executable, str(bundle / "run.py")]
    verified = subprocess.run([*program, "--verify"], capture_output=True, text=True, timeout=600, check=False)
    assert verified.returncode == 0 and "files as in the manifest" in verified.stdout, verified.stderr
    text = subprocess.run(
        [*program, "--prompt", "def ", "--max-new-tokens", "8"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert text.returncode == 0 and text.stdout.strip()
    record = load_report(bundle)
    assert record.kind == "record" and len(record.rows) == 1 and record.rows[0].samples


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: variants take turns on it")
def test_each_variant_trains_on_a_core_of_its_own(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    trained = [
        e
        for e in read_events(finished[0] / "events.jsonl")
        if isinstance(e, StageEvent) and e.stage == "train" and e.variant
    ]
    begun = [e for e in trained if e.status == "begin"]
    assert {e.variant for e in begun} == {"baseline", "optimized"}
    first_end = min(e.time for e in trained if e.status == "end")
    records, _ = parse_journal(finished[0] / "journal.jsonl")
    placed = [r.time for r in records if isinstance(r, AttemptBegun)]
    assert len(placed) == 2 and max(placed) < first_end
    if any("not pinned" in e.detail or e.time > first_end for e in begun):
        pytest.skip("another run on this machine held a core, so one waited for it or went without")
    cores = {e.detail.split("cores ")[1].split(",")[0] for e in begun}
    assert len(cores) == 2


def test_a_finished_run_is_told_again_and_nothing_is_done_twice(
    finished: tuple[Path, subprocess.CompletedProcess[str]], cache: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    before = len((run_dir / "events.jsonl").read_text().splitlines())
    process = start("--resume", str(run_dir), cache=cache)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    figures = [line for line in finished[1].stdout.splitlines() if line.startswith(("baseline", "optimized"))]
    assert figures == [line for line in out.splitlines() if line.startswith(("baseline", "optimized"))]
    new = list(read_events(run_dir / "events.jsonl"))[before:]
    assert not [e for e in new if isinstance(e, StepEvent)]
    ended = {e.stage: e.status for e in new if isinstance(e, StageEvent) and e.status != "begin" and not e.variant}
    assert ended["data"] == ended["measure"] == "cached"


def wait_for_events(
    run_dir: Path, process: subprocess.Popen[str], wanted: Callable[[Event], bool], count: int = 1
) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if sum(map(wanted, read_events(run_dir / "events.jsonl"))) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {count} such events within ten minutes")


def wait_for_steps(run_dir: Path, process: subprocess.Popen[str], count: int) -> None:
    wait_for_events(run_dir, process, lambda event: isinstance(event, StepEvent), count)


def losses(run_dir: Path) -> dict[tuple[str, int, str], float]:
    """The held-out losses of each training by step and split; the last one told counts."""
    return {
        (e.variant, e.step, e.split): e.loss for e in read_events(run_dir / "events.jsonl") if isinstance(e, EvalEvent)
    }


def test_a_run_under_nohup_is_stopped_by_sigterm_alone_and_goes_on_to_the_same_result(
    finished: tuple[Path, subprocess.CompletedProcess[str]], quick: list[str], cache: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "stopped"
    # What a shell does for `nohup ... &`; test_recovery has Ctrl-C.
    nohup = ["sh", "-c", 'trap "" INT HUP; exec "$@"', "sh"]
    asked = [*tiny_recipes(tmp_path, "optimized"), *quick, "--precisions", "fp32", "-o", str(run_dir)]
    process = start(*asked, cache=cache, through=nohup)
    wait_for_steps(run_dir, process, 2)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert out == "" and f"--resume {run_dir}" in err and "Traceback" not in err
    assert not (run_dir / "report.json").exists()

    resumed = start("--resume", str(run_dir), cache=cache)
    _, err = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, err
    found = losses(run_dir)
    assert found == {key: loss for key, loss in losses(finished[0]).items() if key[0] == "optimized"}
    assert {step for _, step, _ in found} >= {0, 60}


def find_worker(process: subprocess.Popen[str]) -> psutil.Process:
    """A worker that trains for a run."""
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # others come and go
            if child.name().startswith("ray::TrainW"):
                return child
    raise AssertionError("no worker trains")


def test_a_run_whose_worker_and_then_driver_are_killed_says_so_and_goes_on(
    quick: list[str], cache: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "killed"
    # Long enough that it cannot be over before its worker is found.
    longer = [*tiny_recipes(tmp_path, "optimized"), *quick[:-1], str(20 * int(quick[-1]))]
    process = start(*longer, "--precisions", "fp32", "-o", str(run_dir), cache=cache)
    wait_for_steps(run_dir, process, 1)
    find_worker(process).kill()
    wait_for_events(
        run_dir, process, lambda e: isinstance(e, StageEvent) and (e.stage, e.status) == ("measure", "begin")
    )
    process.kill()
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (-signal.SIGKILL, "")
    assert "its worker failed: " in err and "Traceback" not in err
    events = list(read_events(run_dir / "events.jsonl"))
    assert [e.status for e in events if isinstance(e, StageEvent) and e.status == "lost"] == ["lost"]
    assert not (run_dir / "report.json").exists() and not (run_dir / "bundle").exists()

    resumed = start("--resume", str(run_dir), cache=cache)
    out, err = resumed.communicate(timeout=600)
    assert resumed.returncode == 0 and "optimized" in out and "Traceback" not in err, err
    after = list(read_events(run_dir / "events.jsonl"))[len(events) :]
    assert not [e for e in after if isinstance(e, StepEvent)]
    ended = [(e.stage, e.status) for e in after if isinstance(e, StageEvent) and e.status != "begin"]
    done_before = [("data", "cached"), ("train", "cached"), ("export", "cached")]
    assert ended == [*done_before, ("train", "end"), ("measure", "end"), ("report", "end")]
    [row] = load_report(run_dir).rows
    assert row.chosen and row.runs_ok == row.runs == 3 and (run_dir / "bundle" / "run.py").exists()


def test_what_the_machine_cannot_do_is_refused_before_anything_waits(
    options: list[str], cache: Path, tmp_path: Path
) -> None:
    tuned = [o for o in options if o != "--quick"]
    process = start(*tuned, "--threads", "512", "-o", str(tmp_path / "run"), cache=cache)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1 and "Error: training needs 512 CPUs on one node" in err


def test_a_changed_corpus_is_refused_on_resume_and_a_moved_target_file_is_not_missed(
    finished: tuple[Path, subprocess.CompletedProcess[str]], cache: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    plan = (run_dir / "run.toml").read_text()
    [data] = re.findall(r'data = \[\s*"(.*)",\s*\]', plan)
    copy = Path(shutil.copytree(data, tmp_path / "text"))
    (run_dir / "run.toml").write_text(plan.replace(data, str(copy)).replace('"phase1",', '"/gone/mine.toml",'))
    process = start("--resume", str(run_dir), "--format", "json", cache=cache)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert [t["name"] for t in json.loads(out)["targets"]] == ["phase1"]
    changed = next(copy.rglob("*.py"))
    changed.write_text(changed.read_text() + "# one more line\n")
    process = start("--resume", str(run_dir), cache=cache)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1 and "Error: data: the corpus has changed since this run began (sha256" in err


def ryot(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*RYOT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_a_run_can_be_watched_listed_and_removed(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished[0], tmp_path / "runs" / "copy"))
    watched = ryot("watch", run_dir)
    assert watched.returncode == 0 and "step 60/60" in watched.stderr and "report done" in watched.stderr
    assert "copy" in ryot("runs", "list", tmp_path / "runs").stdout
    assert "optimized" in ryot("runs", "show", run_dir).stdout
    assert ryot("runs", "remove", tmp_path / "runs", "--yes").returncode != 0 and run_dir.exists()
    assert ryot("runs", "remove", run_dir, "--yes").returncode == 0 and not run_dir.exists()


def test_a_finished_run_is_compared_and_reproduced(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir = finished[0]
    same = ryot("compare", run_dir, run_dir)
    assert same.returncode == 0 and "no difference" in same.stdout
    assert not {"lower", "higher"} & set(same.stdout.split())
    bundle = run_dir / "bundle"
    measured = ryot("compare", bundle, run_dir / "variants/optimized/seed-0/artifacts/fp32", "--measure", "--rounds", 1)
    assert measured.returncode == 0 and "size (MB)" in measured.stdout, measured.stderr
    again = ryot("reproduce", bundle, "--rounds", 1, "--format", "json")
    found = json.loads(again.stdout)
    # Whether one round on a busy machine agrees is no matter of this test; that the code says what the text says is.
    assert again.returncode == (0 if found["agrees"] else 1), again.stderr
    lines = {line["key"]: line for line in found["lines"]}
    stored = load_report(bundle).rows[0]
    assert lines["decode_tok_s"]["b"] == stored.decode_tok_s and lines["size_bytes"]["ratio"] == 1
    assert set(lines) == {"ttft_ms", "decode_tok_s", "load_ms", "peak_rss_bytes", "size_bytes"}


def test_artifacts_are_benched_and_scored(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    bundle = finished[0] / "bundle"
    benched = ryot("bench", bundle, "-p", "8,32", "-n", "16", "-d", "8", "-r", "1", "--format", "json")
    rows = json.loads(benched.stdout)["rows"]
    assert [r["test"] for r in rows] == ["pp8", "tg16 @ d8", "pp32"] and all(r["samples_ms"] for r in rows)
    refused = ryot("bench", bundle, "-p", "33")
    assert refused.returncode == 1 and "pp33: needs 33 tokens, the bundle's context holds 32" in refused.stderr
    fp32 = finished[0] / "variants/optimized/seed-0/artifacts/fp32"
    scored = ryot("eval", bundle, "--reference", fp32, "--tokens", "2000", "--format", "json")
    assert json.loads(scored.stdout)["bpb_ratio"] == pytest.approx(1, abs=0.02), scored.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can be mounted by root alone")
def test_a_full_disk_is_refused_before_anything_is_done(options: list[str], cache: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        process = start(*options, "-o", str(disk / "run"), cache=cache)
        out, err = process.communicate(timeout=600)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert process.returncode == 1 and out == ""
    assert "MB free on the disk, expected about" in err and "Traceback" not in err


def test_options_cannot_change_when_a_run_is_resumed(
    finished: tuple[Path, subprocess.CompletedProcess[str]], cache: Path
) -> None:
    process = start("--resume", str(finished[0]), "--seeds", "2", cache=cache)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2 and "--seeds: cannot be changed when a run is resumed" in err


def test_a_running_run_is_not_taken_twice(finished: tuple[Path, subprocess.CompletedProcess[str]], cache: Path) -> None:
    from ryot.run.folder import RunFolder
    from ryot.run.lock import RunLock

    with RunLock(RunFolder(finished[0])):
        process = start("--resume", str(finished[0]), cache=cache)
        _, err = process.communicate(timeout=600)
    assert process.returncode == 1 and "is working on it" in err
