"""What the server counts and times, in Prometheus's text format under the names that vLLM's dashboards know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ryot.edge.scheduler import Scheduler
from ryot.edge.sequence import ActiveSequence, TokenEvent
from ryot.edge.telemetry import FIRST_TOKEN_S, NEXT_TOKEN_S, WHOLE_S, Histogram, Metric, request_metrics

PAGE_TYPE = "text/plain; version=0.0.4"
#: Bounds of counts, as vLLM has them; of the first as far as contexts go.
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
STEP_TOKENS = tuple(1 if power == 0 else 2 ** (power + 2) for power in range(12))
CHOICES = (1, 2, 5, 10, 20)
#: How a request may end, as OpenAI's API names it, and beside it.
ENDINGS = ("stop", "length", "abort", "error")


@dataclass(slots=True)
class TokenTimes:
    """When a sequence's first and last token so far came, on `time.perf_counter`'s clock."""

    first_s: float
    last_s: float


@dataclass(slots=True)
class ModelMetrics:
    """Of one model; its engine's thread writes, any thread reads."""

    first_token_s: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_S))
    next_token_s: Histogram = field(default_factory=lambda: Histogram(NEXT_TOKEN_S))
    queue_s: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_S))
    whole_s: Histogram = field(default_factory=lambda: Histogram(WHOLE_S))
    prefill_s: Histogram = field(default_factory=lambda: Histogram(WHOLE_S))
    decode_s: Histogram = field(default_factory=lambda: Histogram(WHOLE_S))
    inference_s: Histogram = field(default_factory=lambda: Histogram(WHOLE_S))
    mean_next_token_s: Histogram = field(default_factory=lambda: Histogram(NEXT_TOKEN_S))
    prompt_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    answer_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    max_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    choices: Histogram = field(default_factory=lambda: Histogram(CHOICES))
    step_tokens: Histogram = field(default_factory=lambda: Histogram(STEP_TOKENS))
    endings: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ENDINGS, 0))
    generated_tokens: int = 0

    def observe(self, event: TokenEvent, times: TokenTimes | None, now_s: float) -> TokenTimes | None:
        """Count what came at `now_s`, `times` being those of the tokens before it; those with it."""
        sequence = event.sequence
        if event.token is not None:
            self.generated_tokens += 1
            if times is None:
                self.first_token_s.observe(now_s - sequence.queued_s)
                times = TokenTimes(now_s, now_s)
            else:
                self.next_token_s.observe(now_s - times.last_s)
                times.last_s = now_s
        if event.ends:
            reason = "error" if event.error else "length" if event.finish_reason == "length" else "stop"
            self.end(reason, sequence, times, now_s)
        return times

    def end(self, ending: str, sequence: ActiveSequence, times: TokenTimes | None, now_s: float) -> None:
        """Count a request that is over; one that never had a row, or no token, has no time of what it did not reach."""
        self.endings[ending] += 1
        started_s = sequence.started_s
        self.queue_s.observe((started_s or now_s) - sequence.queued_s)
        self.whole_s.observe(now_s - sequence.queued_s)
        self.prompt_tokens.observe(len(sequence.request.prompt_ids))
        self.answer_tokens.observe(sequence.completion_tokens)
        self.max_tokens.observe(sequence.request.max_tokens)
        if started_s is not None and times is not None:
            self.prefill_s.observe(times.first_s - started_s)
            self.decode_s.observe(times.last_s - times.first_s)
            self.inference_s.observe(times.last_s - started_s)
            if sequence.completion_tokens > 1:
                self.mean_next_token_s.observe((times.last_s - times.first_s) / (sequence.completion_tokens - 1))


def render_metrics(models: Mapping[str, tuple[ModelMetrics, Scheduler]], requests: Mapping[int, int]) -> str:
    """The page of `/metrics`: every model's figures, and how many answers had each HTTP status."""
    families: dict[tuple[str, str, str], list[str]] = {}

    def add(name: str, kind: str, text: str, lines: Iterator[str] | list[str]) -> None:
        families.setdefault((name, kind, text), []).extend(lines)

    for model, (metrics, scheduler) in models.items():
        labels = f'model_name="{_escape(model)}"'
        for name, kind, text, value in _values(metrics, scheduler):
            add(name, kind, text, [f"{name}{{{labels}}} {value}"])
        name = "vllm:request_success_total"
        lines = [f'{name}{{{labels},finished_reason="{reason}"}} {count}' for reason, count in metrics.endings.items()]
        add(name, "counter", "Requests that ended, by how", lines)
        for name, text, histogram in _histograms(metrics):
            add(name, "histogram", text, _histogram_lines(histogram, name, labels))
    name = "ryot:http_responses_total"
    lines = [f'{name}{{status="{status}"}} {count}' for status, count in sorted(requests.items())]
    add(name, "counter", "HTTP answers by status", lines)
    page: list[str] = []
    for (name, kind, help_text), rows in families.items():
        page += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", *rows]
    return "\n".join(page) + "\n"


def merge_pages(pages: Mapping[str, str]) -> str:
    """One page of the pages of several servers, each sample labelled with its server's name."""
    families: dict[str, list[str]] = {}
    for replica, page in pages.items():
        label = f'replica="{_escape(replica)}"'
        family: list[str] = []
        for line in page.splitlines():
            if line.startswith("# HELP "):
                family = families.setdefault(line, [])
            elif line.startswith("#"):
                if not family:
                    family.append(line)
            else:
                name, brace, rest = line.partition("{")
                value = rest if brace else line.partition(" ")[2]
                family.append(f"{name}{{{label},{value}" if brace else f"{line.partition(' ')[0]}{{{label}}} {value}")
    return "".join(f"{head}\n" + "".join(f"{line}\n" for line in lines) for head, lines in families.items())


def telemetry_metrics(metrics: ModelMetrics, scheduler: Scheduler) -> list[Metric]:
    """What an owner's receiver is told of a model."""
    failed = metrics.endings["error"]
    return request_metrics(
        first_token_s=metrics.first_token_s,
        next_token_s=metrics.next_token_s,
        whole_s=metrics.whole_s,
        done=sum(metrics.endings.values()) - failed,
        failed=failed,
        prompt_tokens=scheduler.counters.prompt_tokens,
        generated_tokens=metrics.generated_tokens,
    )


def _histograms(metrics: ModelMetrics) -> list[tuple[str, str, Histogram]]:
    """A request of several answers counts once for each, but for `n`, which counts by prompt."""
    return [
        ("vllm:time_to_first_token_seconds", "From a request's arrival to its first token", metrics.first_token_s),
        ("vllm:inter_token_latency_seconds", "Between two tokens of a request", metrics.next_token_s),
        ("vllm:request_time_per_output_token_seconds", "Mean of these of a request", metrics.mean_next_token_s),
        ("vllm:request_queue_time_seconds", "From a request's arrival to a row of its own", metrics.queue_s),
        ("vllm:request_prefill_time_seconds", "From a row of its own to its first token", metrics.prefill_s),
        ("vllm:request_decode_time_seconds", "From a request's first token to its last one", metrics.decode_s),
        ("vllm:request_inference_time_seconds", "From a row of its own to its last token", metrics.inference_s),
        ("vllm:e2e_request_latency_seconds", "From a request's arrival to its end", metrics.whole_s),
        ("vllm:request_prompt_tokens", "Tokens of a request's prompt", metrics.prompt_tokens),
        ("vllm:request_generation_tokens", "Tokens of a request's answer", metrics.answer_tokens),
        ("vllm:request_params_max_tokens", "Tokens that an answer may have", metrics.max_tokens),
        ("vllm:request_params_n", "Answers asked for to a prompt", metrics.choices),
        ("vllm:iteration_tokens_total", "Tokens that a step of the engine computed", metrics.step_tokens),
    ]


def _histogram_lines(histogram: Histogram, name: str, labels: str) -> Iterator[str]:
    below = 0
    for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
        below += count
        yield f'{name}_bucket{{{labels},le="{bound}"}} {below}'
    yield f"{name}_sum{{{labels}}} {histogram.total:.6f}"
    yield f"{name}_count{{{labels}}} {below}"


def _values(metrics: ModelMetrics, scheduler: Scheduler) -> list[tuple[str, str, str, float]]:
    engine, counters, cache = scheduler.engine, scheduler.counters, scheduler.cache
    held = sum(engine.lengths) * engine.bytes_per_token
    return [
        ("vllm:num_requests_running", "gauge", "Requests that have a row", scheduler.num_running),
        ("vllm:num_requests_waiting", "gauge", "Requests that wait for a row", scheduler.num_waiting),
        ("vllm:kv_cache_usage_perc", "gauge", "Share of the memory for keys and values", held / engine.memory_bytes),
        ("vllm:prefix_cache_queries_total", "counter", "Prompt tokens looked up", counters.prompt_tokens),
        ("vllm:prefix_cache_hits_total", "counter", "Prompt tokens that were known", counters.cached_tokens),
        ("vllm:prompt_tokens_total", "counter", "Tokens of prompts", counters.prompt_tokens),
        ("vllm:generation_tokens_total", "counter", "Tokens generated", metrics.generated_tokens),
        ("vllm:num_preemptions_total", "counter", "Requests that lost their row", counters.preemptions),
        ("vllm:spec_decode_num_drafts_total", "counter", "Drafts that were checked", counters.drafts),
        ("vllm:spec_decode_num_draft_tokens_total", "counter", "Tokens of drafts", counters.draft_tokens),
        ("vllm:spec_decode_num_accepted_tokens_total", "counter", "Of these, right ones", counters.accepted_tokens),
        ("ryot:engine_steps_total", "counter", "Steps of the engine", counters.steps),
        ("ryot:engine_step_tokens_total", "counter", "Tokens that steps computed", counters.step_tokens),
        ("ryot:kv_cache_bytes", "gauge", "Bytes of the key and value buffers", engine.cache_bytes),
        ("ryot:prefix_cache_bytes", "gauge", "Bytes of known beginnings", cache.used_bytes),
    ]


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
