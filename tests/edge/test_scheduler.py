"""Sequences that join, leave, wait and are cancelled: each gets the tokens that it gets alone."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ryot.edge.bundle import Bundle, load_bundle
from ryot.edge.generate import generate
from ryot.edge.pieces import PIECE_SIZES, PieceCosts
from ryot.edge.sampling_params import SamplingParams
from ryot.edge.scheduler import Scheduler, run_all
from ryot.edge.sequence import ActiveSequence, Request
from ryot.edge.session import OnnxruntimeEngine
from ryot.edge.slots import SlotEngine
from ryot.edge.tokenizer import load_tokenizer
from ryot.errors import ConfigError, ContextError

from .reference import TOLERANCE, full_logits
from .tiny_bundle import write_bundle

CONTEXT = 600
SAMPLING = SamplingParams(temperature=0.8, top_k=40)


@pytest.fixture(scope="module", params=["llama", "opt", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = {
        "llama": {},
        "opt": {"position_ids": True, "two_sessions": True, "seed": 3},
        "int8": {"kv_dtype": "int8", "seed": 5},
    }[request.param]
    return load_bundle(write_bundle(tmp_path_factory.mktemp("slots") / request.param, context=CONTEXT, **options))


def build_scheduler(
    bundle: Bundle,
    *,
    rows: int = 4,
    memory_tokens: int | None = None,
    cache_bytes: int = 0,
    even_pieces: bool = False,
) -> Scheduler:
    token_bytes = bundle.model.kv_cache_bytes(1, 1, np.dtype(bundle.kv_dtype).itemsize)
    engine = SlotEngine(bundle, batch_size=rows, memory_bytes=(memory_tokens or rows * CONTEXT) * token_bytes)
    return Scheduler(engine, load_tokenizer(bundle), prefix_cache_bytes=cache_bytes, even_pieces=even_pieces)


def random_request(rng: random.Random, **values: object) -> Request:
    size = rng.choice((1, 3, 20, 90, 300))
    options: dict[str, object] = {
        "prompt_ids": [rng.randrange(1, 300) for _ in range(size)],
        "max_tokens": rng.randrange(1, 40),
        "sampling": SamplingParams(temperature=0.8, top_k=40, seed=rng.randrange(1000))
        if rng.random() < 0.5
        else (SamplingParams()),
        "ignore_eos": rng.random() < 0.5,
    }
    return Request(**(options | values))  # type: ignore[arg-type]


def tokens_alone(bundle: Bundle, request: Request) -> list[int]:
    """The same request by the engine and the loop that serve one prompt."""
    generation = generate(
        OnnxruntimeEngine(bundle),
        load_tokenizer(bundle),
        request.prompt_ids,
        max_new_tokens=request.max_tokens,
        sampling=request.sampling,
        stop=request.stop,
        ignore_eos=request.ignore_eos,
    )
    list(generation)
    return generation.completion.tokens


def assert_tokens(bundle: Bundle, request: Request, found: list[int]) -> None:
    """`found` begins as the tokens that `request` gets alone; where they part, two logits are as good as equal.

    Drawn tokens may part where a draw falls on the edge between two, which these seeds do not.
    """
    expected = tokens_alone(bundle, request)
    differ = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
    if differ is None:
        assert len(found) <= len(expected)
        return
    logits = full_logits(bundle, np.array([*request.prompt_ids, *expected[:differ]]))[-1]
    assert request.sampling.greedy
    assert abs(logits[expected[differ]] - logits[found[differ]]) < (TOLERANCE if bundle.kv_dtype != "int8" else 5e-3)


def play(scheduler: Scheduler, rng: random.Random, requests: list[Request], cancel: float) -> dict[int, list[int]]:
    """Arrivals between steps, and some that are given up on; the tokens of each, by the request's number."""
    tokens: dict[int, list[int]] = {}
    numbers: dict[ActiveSequence, int] = {}
    ended: set[ActiveSequence] = set()
    todo = list(enumerate(requests))
    while todo or not scheduler.idle:
        while todo and rng.random() < 0.6:
            number, request = todo.pop(0)
            sequence = scheduler.add(request)
            numbers[sequence], tokens[number] = number, []
        for event in scheduler.step():
            assert event.error is None and not event.sequence.cancelled and event.sequence not in ended
            if event.token is not None:
                tokens[numbers[event.sequence]].append(event.token)
            if event.ends:
                ended.add(event.sequence)
        for sequence in numbers:
            if sequence not in ended and not sequence.cancelled and rng.random() < cancel:
                sequence.cancelled = True
    assert all(sequence in ended or sequence.cancelled for sequence in numbers)
    for sequence, number in numbers.items():
        if not sequence.cancelled:
            assert len(tokens[number]) == sequence.completion_tokens
    return tokens


@pytest.mark.parametrize("cache_bytes", [0, 300_000], ids=["no prefixes", "prefixes"])
def test_every_sequence_gets_the_tokens_it_gets_alone(bundle: Bundle, cache_bytes: int) -> None:
    rng = random.Random(1)
    scheduler = build_scheduler(bundle, cache_bytes=cache_bytes)
    requests = []
    for _ in range(10):
        requests.append(random_request(rng))
        # One that begins as another does.
        beginning = rng.choice(requests[-3:]).prompt_ids[:70]
        requests.append(random_request(rng, prompt_ids=[*beginning, rng.randrange(1, 300), 9]))
    tokens = play(scheduler, rng, requests, cancel=0.0)
    for number, request in enumerate(requests):
        assert_tokens(bundle, request, tokens[number])
        assert len(tokens[number]) == request.max_tokens or tokens[number][-1] == 0
    assert scheduler.cache.used_bytes <= cache_bytes
    assert (scheduler.counters.cached_tokens > 0) == (cache_bytes > 0)


def test_cancelled_sequences_give_their_rows_back_and_disturb_nobody(bundle: Bundle) -> None:
    rng = random.Random(2)
    scheduler = build_scheduler(bundle, rows=3, cache_bytes=100_000)
    requests = [random_request(rng) for _ in range(24)]
    tokens = play(scheduler, rng, requests, cancel=0.03)
    for number, request in enumerate(requests):
        assert_tokens(bundle, request, tokens[number])
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert set(scheduler.engine.lengths) == {0}


class AnyOfSome:
    """A constraint: one of some tokens, another set at each place, and complete after so many."""

    def __init__(self, seed: int, length: int):
        self._rng, self._left = random.Random(seed), length
        self._mask = self._draw()

    def allowed(self) -> np.ndarray:
        return self._mask

    def push(self, token: int) -> bool:
        assert self._mask[token], "a token that was not allowed"
        self._left -= 1
        self._mask = self._draw()
        return self._left == 0

    def _draw(self) -> np.ndarray:
        mask = np.zeros(384, bool)
        mask[self._rng.sample(range(1, 300), 5)] = True
        return mask


def any_request(rng: random.Random, earlier: Sequence[Request]) -> list[Request]:
    """One to three answers to a prompt that is new, or begins or is as an earlier one: greedy, drawn in several ways,
    of a form, with probabilities, with a stop string."""
    ids = [rng.randrange(1, 300) for _ in range(rng.choice((1, 2, 31, 32, 33, 64, 150, 257)))]
    if earlier and rng.random() < 0.6:
        before = list(rng.choice(earlier[-6:]).prompt_ids)
        ids = before if rng.random() < 0.5 else before[: rng.randrange(1, len(before) + 1)] + ids[:20]
    sampling = rng.choice(
        (
            SamplingParams(),
            SamplingParams(temperature=1.0, seed=rng.randrange(99)),
            SamplingParams(temperature=0.7, top_p=0.9, min_p=0.01, seed=rng.randrange(99)),
            SamplingParams(
                temperature=1.2, top_k=7, repetition_penalty=1.3, presence_penalty=0.5, seed=rng.randrange(99)
            ),
            SamplingParams(logit_bias=((11, 50.0), (57, 50.0)), frequency_penalty=0.2),
        )
    )
    form = (rng.randrange(99), rng.randrange(1, 12)) if rng.random() < 0.3 else None
    options: dict[str, Any] = {
        "prompt_ids": ids,
        "max_tokens": rng.randrange(0, 25),
        "sampling": sampling,
        "ignore_eos": rng.random() < 0.5,
        "stop": ("a",) if form is None and rng.random() < 0.2 else (),
        "top_logprobs": rng.choice((None, 0, 2)),
        "owner": rng.choice("ab"),
    }
    n = rng.choice((1, 1, 1, 2, 3))
    return [
        Request(**options, choice=choice, constraint=None if form is None else AnyOfSome(*form)) for choice in range(n)
    ]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("bundle", ["llama"], indirect=True)
def test_what_comes_does_not_depend_on_who_else_is_there(bundle: Bundle, seed: int) -> None:
    rng = random.Random(seed)
    options = {
        "rows": rng.choice((1, 2, 3, 5)),
        "cache_bytes": rng.choice((0, 20_000, 300_000)),
        "memory_tokens": rng.choice((None, 700)),
    }
    requests: list[Request] = []
    while len(requests) < 24:
        requests += any_request(rng, requests)
    # A constraint remembers what it was told, so each run has its own.
    alone_scheduler = build_scheduler(bundle, rows=1)
    alone = []
    for request in requests:
        form = request.constraint
        fresh = replace(request, constraint=copy.deepcopy(form)) if form is not None else request
        (events,) = run_all(alone_scheduler, [fresh])
        alone.append(([event.token for event in events if event.token is not None], "".join(e.text for e in events)))
    scheduler = build_scheduler(bundle, **options)  # type: ignore[arg-type]
    tokens = play(scheduler, rng, requests, cancel=rng.choice((0.0, 0.02)))
    for number, (expected, _) in enumerate(alone):
        found = tokens[number]
        # Where one was given up on it is a beginning.
        assert found == expected[: len(found)], (seed, options, number)
    assert scheduler.idle and set(scheduler.engine.lengths) == {0}
    assert scheduler.cache.used_bytes <= options["cache_bytes"]  # type: ignore[operator]


def test_memory_for_two_sequences_serves_eight_one_after_the_other(bundle: Bundle) -> None:
    rng = random.Random(3)
    # Room for 4 rows of 256 positions, and for one of more than that.
    scheduler = build_scheduler(bundle, rows=8, memory_tokens=1024)
    requests = [
        random_request(rng, prompt_ids=[rng.randrange(1, 300) for _ in range(n)], max_tokens=60, ignore_eos=True)
        for n in (200, 210, 220, 230, 30, 400, 240, 10)
    ]
    tokens = play(scheduler, rng, requests, cancel=0.0)
    for number, request in enumerate(requests):
        assert_tokens(bundle, request, tokens[number])
        assert len(tokens[number]) == 60
    assert scheduler.counters.preemptions > 0
    assert scheduler.engine.cache_bytes <= scheduler.engine.memory_bytes


def test_a_cancelled_sequence_frees_its_row_within_a_step(bundle: Bundle) -> None:
    scheduler = build_scheduler(bundle, rows=1)
    first, second = (scheduler.add(Request(prompt_ids=[n, 7], max_tokens=300, ignore_eos=True)) for n in (5, 6))
    scheduler.step()
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    first.cancelled = True
    assert {event.sequence for event in scheduler.step()} == {second}


def test_a_long_prompt_comes_in_pieces_between_the_steps_of_a_stream(bundle: Bundle) -> None:
    scheduler = build_scheduler(bundle)
    stream = scheduler.add(Request(prompt_ids=[1, 2, 3], max_tokens=200, ignore_eos=True))
    while stream.completion_tokens < 5:
        scheduler.step()
    # As if a piece took what many steps take; the smallest piece is what is left then.
    scheduler._piece_costs.observe(PIECE_SIZES[0], 1e9)
    long = scheduler.add(Request(prompt_ids=[7] * 500, max_tokens=1))
    steps = 0
    while not long.completion_tokens:
        scheduler._piece_costs.observe(PIECE_SIZES[0], 1e9)
        before = stream.completion_tokens
        scheduler.step()
        assert stream.completion_tokens == before + 1
        steps += 1
    assert steps == -(-500 // PIECE_SIZES[0])


@pytest.mark.parametrize("even", [True, False])
def test_even_pieces_do_not_depend_on_the_clock(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, even: bool) -> None:
    def pieces(clock: Iterator[float]) -> list[int]:
        scheduler, sizes = build_scheduler(bundle, even_pieces=even), []
        extend = scheduler.engine.extend

        def counting(ids: Sequence[int], row: int) -> None:
            sizes.append(len(ids))
            extend(ids, row)

        monkeypatch.setattr(scheduler.engine, "extend", counting)
        monkeypatch.setattr("ryot.edge.scheduler.time.perf_counter", lambda: next(clock))
        prompts = [[1 + (7 * i + n) % 290 for i in range(300)] for n in range(6)]
        run_all(scheduler, [Request(prompt_ids=ids, max_tokens=20, ignore_eos=True) for ids in prompts])
        return sizes

    # One clock by which all takes as long, and one by which steps take nothing and pieces very long, by turns.
    steady = pieces(itertools.count(0.0, 0.01))
    erratic = pieces(itertools.accumulate(itertools.cycle((1e-6, 0.5, 0.5, 1e-6, 2.0))))
    assert (steady == erratic) == even


def test_pieces_grow_again_after_small_ones_took_long() -> None:
    costs, sizes = PieceCosts(), []
    # 2 ms a call and 0.1 ms a token, where 10 ms are left beside a step of 5; once a call takes much longer.
    for number in range(30):
        sizes.append(costs.fitting(0.010, 0.005) if costs.known else 256)
        costs.observe(sizes[-1], (0.002 + 0.0001 * sizes[-1]) * (20 if number == 10 else 1))
    assert sizes[9] == sizes[-1] == 64
    assert min(sizes[11:]) < 64
    # Behind a long past 8 tokens take more than three steps.
    costs.observe(64, 64 * 0.005)
    assert costs.fitting(0.010, 0.005) == 4


def test_a_prompt_on_its_way_goes_on_when_a_stream_before_it_ends(bundle: Bundle) -> None:
    scheduler = build_scheduler(bundle)
    streams = [scheduler.add(Request(prompt_ids=[n, 2, 3], max_tokens=20, ignore_eos=True)) for n in (4, 5)]
    while any(stream.completion_tokens < 5 for stream in streams):
        scheduler.step()
    request = Request(prompt_ids=[(7 * i) % 300 + 1 for i in range(500)], max_tokens=5, ignore_eos=True)
    long = scheduler.add(request)
    computed: list[int] = []
    while not long.completion_tokens:
        scheduler._piece_costs.observe(PIECE_SIZES[0], 1e9)
        scheduler.step()
        computed.append(scheduler.engine.lengths[scheduler.num_running - 1])
    assert all(stream.completion_tokens == 20 for stream in streams)
    # Each step goes on where the one before was, at whichever row.
    assert computed == sorted(computed)
    while not scheduler.idle:
        scheduler.step()
    assert_tokens(bundle, request, long.ids[500:])


def test_answers_to_one_prompt_differ_by_choice_and_repeat_by_seed(bundle: Bundle) -> None:
    def answers() -> list[list[int | None]]:
        requests = [
            Request(prompt_ids=[4, 5], max_tokens=12, sampling=SAMPLING, choice=choice, ignore_eos=True)
            for choice in (0, 1, 2)
        ]
        scheduler = build_scheduler(bundle, cache_bytes=100_000)
        return [[event.token for event in events] for events in run_all(scheduler, requests)]

    first = answers()
    assert first == answers()
    assert len({tuple(a) for a in first}) == 3


@pytest.mark.parametrize("cache_bytes", [0, 20_000])
def test_answers_to_one_prompt_share_its_prefill_whatever_the_cache_holds(bundle: Bundle, cache_bytes: int) -> None:
    prompt = [1 + (7 * i) % 290 for i in range(300)]
    requests = [
        # They end one after the other, so that one of them is always there.
        Request(
            prompt_ids=prompt, max_tokens=9 + choice, sampling=SAMPLING, choice=choice, owner=owner, ignore_eos=True
        )
        for owner in ("a", "b")
        for choice in range(6)
    ]
    scheduler = build_scheduler(bundle, cache_bytes=cache_bytes)
    found = [[event.token for event in events] for events in run_all(scheduler, requests)]
    # Another owner's has to be computed.
    assert scheduler.counters.prefill_tokens == 2 * 300
    assert scheduler.counters.cached_tokens == 10 * 300
    expected = tokens_alone(bundle, requests[0])
    assert found[0] == found[6] == expected and len({tuple(tokens) for tokens in found}) == 6


def test_logprobs_are_those_of_the_whole_pass(bundle: Bundle) -> None:
    prompt = [9, 8, 7, 6, 5]
    scheduler = build_scheduler(bundle)
    other = scheduler.add(Request(prompt_ids=[3] * 40, max_tokens=30, ignore_eos=True))
    sequence = scheduler.add(
        Request(prompt_ids=prompt, max_tokens=4, top_logprobs=3, prompt_logprobs=True, ignore_eos=True)
    )
    events = []
    while not scheduler.idle:
        events += [event for event in scheduler.step() if event.sequence is sequence]
    assert other.completion_tokens == 30
    ids = sequence.ids
    logits = full_logits(bundle, np.array(ids)).astype(np.float64)
    reference = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = [*sequence.prompt_logprobs, *(event.logprobs for event in events)]
    assert len(found) == len(ids) - 1
    tolerance = 2e-5 if bundle.kv_dtype == "float32" else 5e-3
    for position, logprobs in enumerate(found):
        assert logprobs is not None
        assert logprobs.logprob == pytest.approx(reference[position, ids[position + 1]], abs=tolerance)
        best = np.sort(reference[position])[::-1][:3]
        np.testing.assert_allclose([value for _, value in logprobs.top], best, atol=tolerance)


def test_a_stop_string_and_a_bias_end_and_steer_a_sequence(bundle: Bundle) -> None:
    scheduler = build_scheduler(bundle)
    a = load_tokenizer(bundle).encode("a")[-1]
    biased = Request(
        prompt_ids=[5], max_tokens=20, sampling=SamplingParams(logit_bias=((a, 100.0),)), stop=("aaa",), ignore_eos=True
    )
    plain = Request(prompt_ids=[5], max_tokens=6, sampling=SamplingParams(frequency_penalty=1000.0), ignore_eos=True)
    events, others = run_all(scheduler, [biased, plain])
    assert [event.token for event in events] == [a, a, a]
    assert "".join(event.text for event in events) == ""
    assert events[-1].finish_reason == "stop"
    assert len({event.token for event in others}) == 6


def test_what_can_never_run_is_refused(bundle: Bundle) -> None:
    scheduler = build_scheduler(bundle)
    with pytest.raises(ContextError, match=r"599 tokens and 2 new ones do not fit the context of 600 tokens") as caught:
        scheduler.add(Request(prompt_ids=[1] * 599, max_tokens=2))
    assert caught.value.hint == "ask for at most 1 new tokens"
    with pytest.raises(ConfigError, match="got 384, expected a number from 0 to 383"):
        scheduler.add(Request(prompt_ids=[384], max_tokens=2))
    with pytest.raises(ConfigError, match="memory for keys and values"):
        build_scheduler(bundle, memory_tokens=CONTEXT - 1)


def test_a_full_context_is_used_to_its_last_token(tmp_path: Path) -> None:
    bundle = load_bundle(write_bundle(tmp_path / "short", context=64))
    engine = SlotEngine(bundle, batch_size=2, memory_bytes=1_000_000)
    scheduler = Scheduler(engine, load_tokenizer(bundle))
    request = Request(prompt_ids=[5] * 24, max_tokens=40, ignore_eos=True)
    events, others = run_all(scheduler, [request, request])
    expected = tokens_alone(bundle, request)
    assert [event.token for event in events] == [event.token for event in others] == expected


def test_after_a_step_that_failed_the_next_sequences_run(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = build_scheduler(bundle)
    request = Request(prompt_ids=[3] * 20, max_tokens=30, ignore_eos=True)
    lost = [scheduler.add(request) for _ in range(3)]
    for _ in range(5):
        scheduler.step()

    # The memory of the machine is the one part that cannot be real here.
    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("ryot.edge.slots.aligned_zeros", fail)
        with pytest.raises(MemoryError):
            scheduler.engine._resize(4, 600)
    assert set(scheduler.abandon()) == set(lost)
    (events,) = run_all(scheduler, [request])
    assert [event.token for event in events] == tokens_alone(bundle, request)
