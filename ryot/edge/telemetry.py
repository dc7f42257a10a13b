"""Counts and latencies of a device, sent to an address that its owner names; without one nothing here is even imported.

The receiver is any of OTLP over HTTP (an OpenTelemetry collector, Prometheus 3), as JSON. It gets numbers: no text, and
nothing that says which device, user or model they are of. Each sending holds what has come since the last
one that arrived (delta temporality), so a receiver adds up many devices without telling them apart.

Latencies have the names of OpenTelemetry's conventions for generative AI (1.37, read in November 2026).
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
import urllib.parse
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ryot.errors import ConfigError

if TYPE_CHECKING:
    from ryot.edge.generate import Completion

_log = logging.getLogger(__name__)

#: Upper bounds of the buckets, in seconds.
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
NEXT_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
WHOLE_S = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)

SEND_EVERY_S = 60.0
#: A receiver that is down must not hold up a program that is done.
TIMEOUT_S = 5.0
#: Where OTLP's receivers take metrics, for an address without a path.
DEFAULT_PATH = "/v1/metrics"
_DELTA = 1


class Histogram:
    """Counts of values by bucket."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self.counts)

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Metric(NamedTuple):
    """A sum or a histogram as it stands now."""

    name: str
    unit: str
    numbers: tuple[float, ...]
    """A sum's value; of a histogram the count of each bucket, and behind them the total of all values."""
    bounds: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets; empty for a sum."""


def count_metric(name: str, unit: str, value: int) -> Metric:
    """A sum that only grows."""
    return Metric(name, unit, (value,))


def time_metric(name: str, histogram: Histogram) -> Metric:
    """A histogram of seconds."""
    return Metric(name, "s", (*histogram.counts, histogram.total), histogram.bounds)


class Sender:
    """Posts what `read` gives to an address, in a thread of its own; a sending that fails is made up for by the next.

    `read` gives metrics by the number of whatever has them, such as a model that is being served: each starts at 0.
    """

    def __init__(self, address: str, read: Callable[[], Mapping[int, Sequence[Metric]]], every_s: float = SEND_EVERY_S):
        """Raises `ConfigError` for an address that is none."""
        self.address = _parse_address(address)
        self._read, self._every_s = read, every_s
        self._sent: dict[tuple[int, str], tuple[float, ...]] = {}
        self._since_ns, self._failed = time.time_ns(), False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ryot-telemetry", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send what is left, and end."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(self._every_s)
            self.send()

    def send(self) -> None:
        """Send what is new. The first of several failures is said."""
        try:
            self._send()
            self._failed = False
        except (OSError, http.client.HTTPException) as error:
            if not self._failed:
                _log.warning("%s: takes no telemetry (%s)", urllib.parse.urlunsplit(self.address), error)
            self._failed = True

    def _send(self) -> None:
        now_ns, sent = time.time_ns(), dict(self._sent)
        fresh: dict[str, Metric] = {}
        for source, metrics in self._read().items():
            for metric in metrics:
                before = self._sent.get((source, metric.name), (0.0,) * len(metric.numbers))
                seen = fresh.get(metric.name, metric._replace(numbers=(0.0,) * len(before)))
                more = tuple(s + n - b for s, n, b in zip(seen.numbers, metric.numbers, before, strict=True))
                fresh[metric.name] = metric._replace(numbers=more)
                sent[source, metric.name] = metric.numbers
        changed = [metric for metric in fresh.values() if any(metric.numbers)]
        if changed:
            self._post(json.dumps(encode_metrics(changed, self._since_ns, now_ns)).encode())
        self._sent, self._since_ns = sent, now_ns

    def _post(self, body: bytes) -> None:
        """Neither a proxy of the environment nor a redirection leads anywhere but to the address."""
        scheme, host, path, query, _ = self.address
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        connection = kind(host, timeout=TIMEOUT_S)
        try:
            connection.request("POST", f"{path}?{query}" if query else path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
        finally:
            connection.close()
        if answer.status >= 300:
            raise http.client.HTTPException(f"it answered {answer.status} {answer.reason}")


def _parse_address(address: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(address)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        right = False
    if not right or parts.username is not None:
        raise ConfigError(f"--metrics-to: got {address!r}, expected http://HOST:PORT, or such with a path")
    return parts if parts.path.strip("/") else parts._replace(path=DEFAULT_PATH)


def encode_metrics(metrics: Sequence[Metric], since_ns: int, now_ns: int) -> dict[str, object]:
    """OTLP's `ExportMetricsServiceRequest` in JSON, whose 64-bit numbers are texts."""
    when = {"startTimeUnixNano": str(since_ns), "timeUnixNano": str(now_ns)}
    encoded: list[dict[str, object]] = []
    for name, unit, numbers, bounds in metrics:
        if bounds:
            *counts, total = numbers
            point = {
                **when,
                "count": str(int(sum(counts))),
                "sum": total,
                "bucketCounts": [str(int(count)) for count in counts],
                "explicitBounds": list(bounds),
            }
            kind = {"histogram": {"aggregationTemporality": _DELTA, "dataPoints": [point]}}
        else:
            point = {**when, "asInt": str(int(numbers[0]))}
            kind = {"sum": {"aggregationTemporality": _DELTA, "isMonotonic": True, "dataPoints": [point]}}
        encoded.append({"name": name, "unit": unit, **kind})
    service = {"key": "service.name", "value": {"stringValue": "ryot"}}
    scoped = {"scope": {"name": "ryot"}, "metrics": encoded}
    return {"resourceMetrics": [{"resource": {"attributes": [service]}, "scopeMetrics": [scoped]}]}


def request_metrics(
    *,
    first_token_s: Histogram,
    next_token_s: Histogram,
    whole_s: Histogram,
    done: int,
    failed: int,
    prompt_tokens: int,
    generated_tokens: int,
) -> list[Metric]:
    """What is told of requests, wherever they are answered."""
    return [
        time_metric("gen_ai.server.time_to_first_token", first_token_s),
        time_metric("gen_ai.server.time_per_output_token", next_token_s),
        time_metric("gen_ai.server.request.duration", whole_s),
        count_metric("ryot.requests", "{request}", done),
        count_metric("ryot.requests.failed", "{request}", failed),
        count_metric("ryot.tokens.prompt", "{token}", prompt_tokens),
        count_metric("ryot.tokens.generated", "{token}", generated_tokens),
    ]


class Meter:
    """Counts what a program answers, one request after another, and has it sent."""

    def __init__(self, address: str):
        self._first_token_s, self._next_token_s = Histogram(FIRST_TOKEN_S), Histogram(NEXT_TOKEN_S)
        self._whole_s = Histogram(WHOLE_S)
        self._done = self._failed = self._prompt_tokens = self._generated_tokens = 0
        self._sender = Sender(address, lambda: {0: self._metrics()})

    def observe(self, completion: Completion) -> None:
        """Count a prompt that was answered to the end."""
        tokens = len(completion.tokens)
        self._done += 1
        self._prompt_tokens += len(completion.prompt_ids)
        self._generated_tokens += tokens
        self._first_token_s.observe(completion.first_token_s)
        self._whole_s.observe(completion.whole_s)
        if tokens > 1:
            self._next_token_s.observe((completion.whole_s - completion.first_token_s) / (tokens - 1))

    def fail(self) -> None:
        """Count one that was not."""
        self._failed += 1

    def close(self) -> None:
        """Send what is left."""
        self._sender.close()

    def _metrics(self) -> list[Metric]:
        return request_metrics(
            first_token_s=self._first_token_s,
            next_token_s=self._next_token_s,
            whole_s=self._whole_s,
            done=self._done,
            failed=self._failed,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
        )
