"""What the C program counts for a device's owner: read by Prometheus's own parser, beside Python's counts and names."""

from __future__ import annotations

import getpass
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from ryot.edge.bundle import load_bundle
from ryot.edge.capi import CApiEngine
from ryot.edge.generate import Completion, generate
from ryot.edge.telemetry import FIRST_TOKEN_S, NEXT_TOKEN_S, WHOLE_S, Histogram, request_metrics
from ryot.edge.tokenizer import load_tokenizer

from .native import Native

#: Prompt, tokens and a stop string or none. The first ends by its stop string, the last one has one token only.
ASKED: list[tuple[str, int, str | None]] = [
    ("class", 40, "{stop}"),
    ("def secret", 9, None),
    ("", 30, None),
    ("x", 1, None),
]


@pytest.fixture(scope="module")
def tiny(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle()


def read(path: Path) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(path.read_text())}


def values(families: dict[str, Metric]) -> dict[tuple[str, str | None], float]:
    """Each sample's value by its name and bucket."""
    return {(s.name, s.labels.get("le")): s.value for family in families.values() for s in family.samples}


def as_prometheus(completions: Sequence[Completion]) -> dict[str, Metric]:
    """What OpenTelemetry's own exporter makes of Python's metrics of these answers."""
    first, following, whole = Histogram(FIRST_TOKEN_S), Histogram(NEXT_TOKEN_S), Histogram(WHOLE_S)
    metrics = request_metrics(
        first_token_s=first,
        next_token_s=following,
        whole_s=whole,
        done=len(completions),
        failed=0,
        prompt_tokens=sum(len(c.prompt_ids) for c in completions),
        generated_tokens=sum(len(c.tokens) for c in completions),
    )
    registry = CollectorRegistry()
    meter = MeterProvider([PrometheusMetricReader(True, registry=registry)]).get_meter("ryot")
    for name, unit, numbers, bounds in metrics:
        if bounds:
            histogram = meter.create_histogram(name, unit, explicit_bucket_boundaries_advisory=bounds)
            answers = [c for c in completions if len(c.tokens) > 1 or "per_output" not in name]
            for _ in answers:
                histogram.record(0)
        else:
            meter.create_counter(name, unit).add(numbers[0])
    return {f.name: f for f in text_string_to_metric_families(generate_latest(registry).decode())}


def test_counts_and_names_are_those_of_python(native: Native, tiny: Path, tmp_path: Path) -> None:
    bundle = load_bundle(tiny)
    engine, tokenizer = CApiEngine(bundle), load_tokenizer(bundle)
    stop = "".join(generate(engine, tokenizer, "class", max_new_tokens=40))[7:10]
    path, completions = tmp_path / "ryot.prom", []
    for prompt, num_tokens, stopped_by in ASKED:
        stops = (stop,) if stopped_by else ()
        generation = generate(engine, tokenizer, prompt or "a", max_new_tokens=num_tokens, stop=stops)
        list(generation)
        completions.append(generation.completion)
        arguments = [part for text in stops for part in ("--stop", text)]
        done = native.run(tiny, prompt or "a", "--max-new-tokens", num_tokens, "--metrics-to", path, *arguments)
        assert (done.returncode, done.stderr) == (0, b"")
    assert completions[0].finish_reason == "stop"
    found, expected = read(path), as_prometheus(completions)
    assert {name: family.type for name, family in found.items()} == {n: f.type for n, f in expected.items()}
    got, told = values(found), values(expected)
    assert got.keys() == told.keys()
    is_latency = [key for key in got if key[0].endswith("_sum") or key[1] not in (None, "+Inf")]
    assert {key: v for key, v in got.items() if key not in is_latency} == {
        key: v for key, v in told.items() if key not in is_latency
    }
    assert got["gen_ai_server_time_to_first_token_seconds_sum", None] > 0
    assert got["gen_ai_server_time_to_first_token_seconds_sum", None] < 60
    said = path.read_text()
    for text in ("secret", bundle.name, socket.gethostname(), getpass.getuser(), str(tiny)):
        assert text not in said
    assert [p.name for p in tmp_path.iterdir()] == ["ryot.prom"]


def test_latencies_lie_in_the_buckets_of_their_sum(native: Native, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "ryot.prom"
    native.text(tiny, "class", "--max-new-tokens", 5, "--metrics-to", path)
    for family in read(path).values():
        if family.type != "histogram":
            continue
        total = next(s.value for s in family.samples if s.name.endswith("_sum"))
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                assert sample.value == (total <= float(sample.labels["le"])), sample


def test_a_prompt_that_fails_and_one_that_nobody_reads_to_its_end(native: Native, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "ryot.prom"
    assert native.run(tiny, "a", "--max-new-tokens", 64, "--metrics-to", path).returncode == 1
    counted = values(read(path))
    assert (counted["ryot_requests_failed_total", None], counted["ryot_requests_total", None]) == (1, 0)
    # What reads has gone before the first byte is written.
    deaf = "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.execv(sys.argv[1], sys.argv[1:])"
    done = native.run(tiny, "class", "--ignore-eos", "--metrics-to", path, through=(sys.executable, "-c", deaf))
    assert (done.returncode, done.stderr) == (0, b"")
    assert values(read(path)) == counted


def test_processes_at_once_all_count(native: Native, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "ryot.prom"

    def ask(_: int) -> bytes:
        return native.run(tiny, "a", "--max-new-tokens", 2, "--metrics-to", path).stderr

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(ask, range(12))) == {b""}
    assert values(read(path))["ryot_requests_total", None] == 12


@pytest.mark.parametrize(
    "text", ["mine\n", "# mine\n", "up 1\n", "ryot_requests_total -1\n", "ryot_requests_total 1.5\n", "\0", "\n"]
)
def test_a_file_of_something_else_is_refused_before_any_work(
    text: str, native: Native, tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "ryot.prom"
    path.write_text(text)
    done = native.run(tiny, "a", "--metrics-to", path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(f"Error: metrics file {path}: line 1 is none of this program's\nhint: ".encode())
    assert path.read_text() == text


def test_an_address_or_a_device_is_refused(native: Native, tiny: Path, tmp_path: Path) -> None:
    done = native.run(tiny, "a", "--metrics-to", "http://127.0.0.1:9")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.endswith(b"hint: this program writes a file; run.py sends to an address\n")
    for path in ("/dev/null", tmp_path):
        assert native.run(tiny, "a", "--metrics-to", path).returncode == 1
    for wrong in (["--verify", "--metrics-to", tmp_path / "a"], ["a", "--metrics-to", ""]):
        assert native.run(tiny, *wrong).returncode == 2


def test_figures_that_cannot_be_kept_are_a_note_and_leave_those_of_before(
    native: Native, tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "ryot.prom"
    text = native.text(tiny, "class", "--max-new-tokens", 2, "--metrics-to", path)
    before = path.read_text()
    (tmp_path / "ryot.prom.part").mkdir()  # what would be written first
    done = native.run(tiny, "class", "--max-new-tokens", 2, "--metrics-to", path)
    assert (done.returncode, done.stdout.decode()) == (0, text)
    assert done.stderr == f"note: metrics file {path}: cannot be written (Is a directory)\n".encode()
    assert path.read_text() == before


def test_no_access_outside_memory_on_the_way(checked: Native, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "ryot.prom"
    for _ in range(2):
        # onnxruntime 1.32 keeps 56 bytes of its own for good.
        done = checked.run(tiny, "class", "--max-new-tokens", 3, "--metrics-to", path, ASAN_OPTIONS="detect_leaks=0")
        assert (done.returncode, done.stderr) == (0, b"")
    assert values(read(path))["ryot_requests_total", None] == 2
    shutil.copy(tiny / "ryot_manifest.json", path)
    assert checked.run(tiny, "class", "--metrics-to", path).returncode == 2
