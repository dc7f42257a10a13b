"""The protocol with real processes: what they report, and what becomes of those that fail."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ryot.edge.bundle import Bundle, hash_file, load_bundle
from ryot.edge.limits import PREFIX, open_memory_cgroup
from ryot.edge.measure import build_spec, measure_once, measure_rounds, record_environment
from ryot.edge.protocol import MeasureResult, MeasureSpec, is_steady
from ryot.errors import ConfigError
from ryot.mapping import read_mapping, to_mapping

from .tiny_bundle import write_manifest

QUICK = {"min_runs": 3, "min_time_s": 0.0, "warmup": 1}


@pytest.fixture(scope="module")
def llama(llama_path: Path) -> Bundle:
    return load_bundle(llama_path)


@pytest.fixture(scope="module")
def result(llama: Bundle) -> MeasureResult:
    return measure_once(build_spec(llama, **QUICK))


def cgroup_or_skip() -> None:
    cgroup = open_memory_cgroup(1 << 30)
    if cgroup is None:
        pytest.skip("no memory control group can be made here")
    with cgroup:
        pass


def test_the_default_lengths_follow_the_context(llama: Bundle) -> None:
    spec = build_spec(llama)
    assert (spec.prompt_tokens, spec.decode_tokens, spec.decode_depth) == (64, 48, 16)
    assert len(spec.cpus) == 1
    assert MeasureSpec.from_json(spec.to_json()) == spec


def test_every_figure_comes_with_its_samples(llama: Bundle, result: MeasureResult) -> None:
    assert result.ok, result.reason
    assert result.runs == result.runs_ok == len(result.ttft_ms) == len(result.e2e_ttft_ms) == 3
    assert all(e2e > ttft > 0 for e2e, ttft in zip(result.e2e_ttft_ms, result.ttft_ms))
    assert [len(run) for run in result.token_ms] == [48] * 3
    for rate, run in zip(result.decode_tok_s, result.token_ms):
        assert rate == pytest.approx(48 / sum(run) * 1e3)
    assert result.cold_start_ms is not None and result.import_ms is not None and result.load_ms is not None
    assert result.first_ttft_ms is not None and result.first_ttft_ms > 0
    assert result.cold_start_ms > result.import_ms + result.load_ms + result.first_ttft_ms
    assert len(result.calibration_ms) == len(result.load_average) == 2
    assert result.manifest_sha256 == hash_file(llama.path / "ryot_manifest.json")
    assert read_mapping(MeasureResult, json.loads(json.dumps(to_mapping(result, keep_none=True)))) == result


def test_the_process_is_pinned(llama: Bundle) -> None:
    last = max(os.sched_getaffinity(0))
    assert measure_once(build_spec(llama, cpus=(last,), **QUICK)).cpus == [last]


def test_memory_is_the_process_own_peak_and_not_its_parents(result: MeasureResult) -> None:
    ballast = b"x" * 300_000_000
    assert len(ballast) > 0
    assert result.peak_rss_bytes is not None and result.peak_rss_outside_bytes is not None
    # The peak covers an interpreter with numpy and onnxruntime; this test process holds several times as much.
    assert 30e6 < result.peak_rss_bytes < 150e6
    # Between the readings the answer is written, which takes 1 MB, and the kernel's count lags by some pages a core.
    assert result.peak_rss_outside_bytes == pytest.approx(result.peak_rss_bytes, abs=2e6)


def test_peak_memory_is_what_the_kernel_accounts_to_the_same_command(llama: Bundle) -> None:
    spec = build_spec(llama, **QUICK)
    # A shell starts Python: from a small parent ru_maxrss is the child's own, from pytest it would be pytest's.
    script = (
        "import os, sys; pid = os.fork()\n"
        "if pid == 0: os.execv(sys.executable, [sys.executable, '-P', '-m', 'ryot.edge.measure'])\n"
        "print(os.wait4(pid, 0)[2].ru_maxrss)"
    )
    run = subprocess.run(
        ["/bin/sh", "-c", f'exec {sys.executable} -S -c "$0"', script],
        input=spec.to_json() + "\n",
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    answer, max_rss_kb = run.stdout.splitlines()
    peak, lifetime_peak = json.loads(answer)["peak_rss_bytes"], int(max_rss_kb) * 1024
    # The kernel's figure has the end of the process in it, too.
    assert 0.98 * peak <= lifetime_peak <= 1.02 * peak + 4.5e6


def test_a_batch_is_timed_as_one(llama: Bundle) -> None:
    result = measure_once(build_spec(llama, batch_size=4, end_to_end=False, **QUICK))
    assert result.ok, result.reason
    assert result.e2e_ttft_ms == []
    assert result.tokenizer_load_ms is None
    assert result.decode_tok_s[0] == pytest.approx(4 * 48 / sum(result.token_ms[0]) * 1e3)


def test_rounds_are_interleaved_in_an_order_that_the_seed_decides(llama: Bundle) -> None:
    specs = {case: build_spec(llama, **QUICK) for case in ("a", "b", "c")}
    seen: list[MeasureResult] = []
    results = measure_rounds(specs, rounds=2, seed=1, on_result=lambda _, result: seen.append(result))
    assert results == {case: [r for r in seen if r.case == case] for case in specs}
    assert [r.round for r in seen] == [0, 0, 0, 1, 1, 1]
    assert {r.case for r in seen[:3]} == {r.case for r in seen[3:]} == {"a", "b", "c"}
    assert [r.case for r in seen[:3]] != [r.case for r in seen[3:]]


def test_the_processes_of_a_round_live_side_by_side_and_run_by_turns(llama: Bundle) -> None:
    specs = {case: build_spec(llama, **QUICK | {"min_runs": 5}) for case in ("a", "b", "c")}
    alive: list[int] = []

    def look(case: str, _: MeasureResult) -> None:
        children = psutil.Process().children()
        alive.append(sum("ryot.edge.probe" in c.cmdline() for c in children if c.status() != psutil.STATUS_ZOMBIE))

    results = measure_rounds(specs, rounds=1, on_result=look)
    assert [r.runs for found in results.values() for r in found] == [5, 5, 5]
    # Nobody ends before all have had four turns, so the first to end leaves two behind (and may still be ending).
    assert alive[0] >= 2


def test_a_failing_case_leaves_the_others_standing(llama: Bundle, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(llama.path, tmp_path / "broken"))
    (broken / "fast.onnx").write_bytes(b"not a graph")
    write_manifest(broken)
    specs = {"broken": dataclasses.replace(build_spec(llama, **QUICK), bundle=str(broken))}
    specs["whole"] = build_spec(llama, **QUICK)
    by_case = {case: found[0] for case, found in measure_rounds(specs, rounds=1).items()}
    assert not by_case["broken"].ok
    assert "fast.onnx: onnxruntime" in by_case["broken"].reason
    assert (by_case["broken"].runs, by_case["broken"].runs_ok) == (1, 0)
    assert by_case["whole"].ok


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt_tokens": 65}, "need 65 tokens, the context of tiny-0 holds 64"),
        ({"decode_depth": 30}, r"pp64, tg48 @ d30 need 78 tokens"),
        ({"prompts": ((1, 2, 3),)}, "prompts of at least 64 tokens are needed, the shortest has 3"),
        ({"cpus": (4095,)}, r"cpus: cannot pin to \[4095\]"),
        ({"bundle": "/nowhere"}, "/nowhere: not a bundle"),
    ],
)
def test_what_cannot_be_measured_says_why(llama: Bundle, changes: dict[str, object], reason: str) -> None:
    result = measure_once(build_spec(llama, **QUICK | changes))
    assert not result.ok
    assert re.search(reason, result.reason), result.reason


def test_a_process_that_takes_too_long_is_killed(llama: Bundle) -> None:
    begin = time.monotonic()
    result = measure_once(build_spec(llama, timeout_s=0.8, min_time_s=60.0))
    assert (result.ok, result.reason) == (False, "timed out after 0.8 s")
    assert time.monotonic() - begin < 20


def test_a_process_that_dies_at_its_memory_limit_is_a_result(llama: Bundle) -> None:
    cgroup_or_skip()
    result = measure_once(build_spec(llama, memory_limit_bytes=8_000_000, **QUICK))
    assert (result.ok, result.memory_limit) == (False, "enforced")
    assert result.reason == "killed at the memory limit of 8.0 MB"
    assert result.memory_limit_bytes == 8_000_000


def test_a_process_within_its_memory_limit_says_that_it_was_enforced(llama: Bundle) -> None:
    cgroup_or_skip()
    result = measure_once(build_spec(llama, memory_limit_bytes=300_000_000, **QUICK))
    assert (result.ok, result.memory_limit) == (True, "enforced")
    own = Path("/sys/fs/cgroup")
    assert not list(own.rglob(f"{PREFIX}{os.getpid()}-*"))


def measuring_parent(spec: MeasureSpec) -> subprocess.Popen[str]:
    """A process that measures for a minute; it prints its child's id once the child runs."""
    script = (
        "import sys, threading, pathlib, time\n"
        "from ryot.edge.measure import MeasureSpec, measure_once\n"
        "def tell():\n"
        "    me = pathlib.Path('/proc/self/task', str(threading.main_thread().native_id), 'children')\n"
        "    while not me.read_text().strip(): time.sleep(0.01)\n"
        "    print(me.read_text().split()[0], flush=True)\n"
        "threading.Thread(target=tell, daemon=True).start()\n"
        "measure_once(MeasureSpec.from_json(sys.argv[1]))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, spec.to_json()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_no_process_is_left_when_the_parent_is_stopped(llama: Bundle, number: signal.Signals) -> None:
    parent = measuring_parent(build_spec(llama, min_time_s=60.0))
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    # The child asks to die with its parent as its first act; wait until it is past that, at its first library.
    deadline = time.monotonic() + 20
    while "onnxruntime" not in Path(f"/proc/{child}/maps").read_text():
        assert time.monotonic() < deadline and is_running(child)
        time.sleep(0.01)
    parent.send_signal(number)
    parent.communicate(timeout=20)
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline, "the measuring process is still there"
        time.sleep(0.01)


def test_a_child_killed_by_another_hand_is_named(llama: Bundle) -> None:
    parent_script = (
        "import dataclasses, json, os, signal, sys, threading, time, pathlib\n"
        "from ryot.edge.measure import MeasureSpec, measure_once\n"
        "def kill():\n"
        "    me = pathlib.Path('/proc/self/task', str(threading.main_thread().native_id), 'children')\n"
        "    while not me.read_text().strip(): time.sleep(0.01)\n"
        "    os.kill(int(me.read_text().split()[0]), signal.SIGKILL)\n"
        "threading.Thread(target=kill, daemon=True).start()\n"
        "print(json.dumps(dataclasses.asdict(measure_once(MeasureSpec.from_json(sys.argv[1])))))\n"
    )
    spec = build_spec(llama, min_time_s=60.0)
    run = subprocess.run(
        [sys.executable, "-c", parent_script, spec.to_json()], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout)["reason"] == "killed by SIGKILL"


def test_warm_up_ends_when_both_times_have_settled() -> None:
    assert not is_steady([(1.0, 1.0)] * 5)
    assert is_steady([(9.0, 9.0)] + [(1.0, 1.0)] * 6)
    assert not is_steady([(2.0, 1.0)] * 3 + [(1.0, 1.0)] * 3)
    assert not is_steady([(1.0, 2.0)] * 3 + [(1.0, 1.0)] * 3)
    assert is_steady([(1.00, 1.0), (1.00, 1.0), (7.0, 1.0), (1.04, 1.0), (1.04, 1.0), (5.0, 1.0)])


def test_the_environment_names_machine_and_versions() -> None:
    environment = record_environment()
    assert environment["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert environment["packages"]["onnxruntime"]
    json.dumps(environment)


@pytest.mark.parametrize(
    "changes", [{"threads": 0}, {"batch_size": 0}, {"min_runs": 0}, {"memory_limit_bytes": 0}, {"timeout_s": 0.0}]
)
def test_a_spec_that_makes_no_sense_is_refused(llama: Bundle, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(changes))}: got 0"):
        build_spec(llama, **changes)
