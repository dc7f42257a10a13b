"""Buffers that grow, prompts in pieces, rows that are extended and cut: each against what needs none of it."""

from __future__ import annotations

import itertools
import resource
from pathlib import Path

import numpy as np
import pytest

from ryot.edge.bundle import Bundle, load_bundle
from ryot.edge.engine import FIRST_CAPACITY, PIECE_TOKENS, Engine
from ryot.errors import BundleError, ContextError

from .reference import TOLERANCE, full_logits, prompt
from .tiny_bundle import write_bundle, write_manifest

CONTEXT = 8192
# An int8 cache rounds a float32 value that was computed in another order now and then to the code beside it. A code
# is 3 % of a typical key or value; over a thousand that a token attends to it is a thousandth of a logit of 2.
INT8_TOLERANCE = 5e-3
RAGGED = (3, 250, 40, 130)


@pytest.fixture(scope="session", params=["float32", "int8", "positions", "window"])
def long_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A long context: either cache, learned positions in two sessions, a sliding window."""
    options = {
        "float32": {},
        "int8": {"kv_dtype": "int8"},
        "positions": {"position_ids": True, "two_sessions": True},
        "window": {"window": 100},
    }[request.param]
    folder = tmp_path_factory.mktemp("long") / request.param
    return load_bundle(write_bundle(folder, context=CONTEXT, **options))


def tolerance(bundle: Bundle) -> float:
    return INT8_TOLERANCE if bundle.kv_dtype == "int8" else TOLERANCE


def assert_same_continuation(found: Engine, expected: Engine, atol: float, *, steps: int = 5) -> None:
    """Logits alike now and after each step; both are fed the expected one's tokens."""
    for step in range(steps):
        if step:
            found.next_token[:] = expected.next_token
            found.step()
            expected.step()
        np.testing.assert_allclose(found.logits, expected.logits, atol=atol, rtol=0)


@pytest.mark.parametrize("lengths", [(5,), (3, 25, 4, 13)], ids=["one row", "ragged rows"])
def test_a_cache_that_grows_gives_what_one_large_allocation_gives(
    make_engine: type[Engine], long_bundle: Bundle, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ryot.edge.engine.FIRST_CAPACITY", 8)
    grown, whole = (make_engine(long_bundle, batch_size=len(lengths)) for _ in range(2))
    whole.reserve(CONTEXT)
    for engine in (grown, whole):
        engine.prefill([prompt(n, seed=n) for n in lengths])
    seen = {grown.capacity}
    for _ in range(260):
        grown.step()
        whole.step()
        seen.add(grown.capacity)
        assert grown.next_token.tolist() == whole.next_token.tolist()
        np.testing.assert_array_equal(grown.logits, whole.logits)
    assert {32, 64, 128, 256, 512} <= seen <= {8, 16, 32, 64, 128, 256, 512}
    assert whole.capacity == CONTEXT


def test_the_buffers_are_as_large_as_the_tokens_need_and_not_as_the_context(
    make_engine: type[Engine], long_bundle: Bundle
) -> None:
    def size(length: int) -> int:
        return long_bundle.model.kv_cache_bytes(length, 2, 1 if long_bundle.kv_dtype == "int8" else 4)

    engine = make_engine(long_bundle, batch_size=2)
    assert engine.cache_bytes == size(FIRST_CAPACITY) == size(CONTEXT) // 32
    engine.prefill([prompt(300), prompt(9)])
    assert engine.cache_bytes == size(512)
    engine.prefill([prompt(7), prompt(9)])
    assert engine.cache_bytes == size(512)
    engine.prefill([prompt(1100), prompt(9)])
    assert engine.cache_bytes == size(2048) == size(CONTEXT) // 4
    assert make_engine(long_bundle, max_len=20).capacity == 20


def test_a_prompt_in_pieces_equals_a_prompt_whole(
    make_engine: type[Engine], long_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(4 * PIECE_TOKENS + 76)
    pieces, whole = make_engine(long_bundle), make_engine(long_bundle)
    pieces.prefill([ids])
    assert sorted(num_tokens for _, _, num_tokens in pieces._calls) == [76, PIECE_TOKENS]  # type: ignore[attr-defined]
    monkeypatch.setattr("ryot.edge.engine.PIECE_TOKENS", CONTEXT)
    whole.prefill([ids])
    np.testing.assert_allclose(whole.logits[0], full_logits(long_bundle, ids)[-1], atol=tolerance(long_bundle))
    assert_same_continuation(pieces, whole, tolerance(long_bundle))


@pytest.mark.parametrize("shared", [False, True])
def test_long_prompts_of_a_batch_equal_each_alone(make_engine: type[Engine], long_bundle: Bundle, shared: bool) -> None:
    prompts = [prompt(500, seed=0 if shared else row) for row in range(4)]
    batch, alone = make_engine(long_bundle, batch_size=4), make_engine(long_bundle)
    if shared:
        batch.prefill_shared(prompts[0])
    else:
        batch.prefill(prompts)
    batch.step()
    for row, ids in enumerate(prompts):
        alone.prefill([ids])
        alone.step()
        np.testing.assert_allclose(batch.logits[row], alone.logits[0], atol=tolerance(long_bundle))


@pytest.mark.parametrize("edges", [(5, 12, 13, 300), (700, 1400), (1, 2)], ids=str)
def test_an_extended_row_equals_a_prompt_whole(
    make_engine: type[Engine], long_bundle: Bundle, edges: tuple[int, ...]
) -> None:
    ids = prompt(edges[-1])
    engine, whole = make_engine(long_bundle), make_engine(long_bundle)
    engine.prefill([ids[: edges[0]]])
    for start, end in itertools.pairwise(edges):
        engine.extend(ids[start:end])
        assert engine.lengths == [end]
    whole.prefill([ids])
    assert_same_continuation(engine, whole, tolerance(long_bundle))


def test_a_row_is_extended_and_cut_beside_others_that_stay(make_engine: type[Engine], long_bundle: Bundle) -> None:
    prompts = [prompt(n, seed=n) for n in RAGGED]
    batch = make_engine(long_bundle, batch_size=4)
    batch.prefill(prompts)
    batch.extend(prompt(300, seed=9), row=2)
    batch.truncate(100, row=1)
    batch.extend([7, 8], row=1)
    batch.truncate(0, row=3)
    batch.extend(prompt(4, seed=8), row=3)
    assert batch.lengths == [3, 102, 340, 4]
    assert batch.position == 340
    texts = [
        prompts[0],
        np.append(prompts[1][:100], [7, 8]),
        np.append(prompts[2], prompt(300, seed=9)),
        prompt(4, seed=8),
    ]
    expected = make_engine(long_bundle, batch_size=4)
    expected.prefill(texts)
    assert_same_continuation(batch, expected, tolerance(long_bundle))


def test_a_cut_row_goes_on_as_if_nothing_had_followed(make_engine: type[Engine], long_bundle: Bundle) -> None:
    ids, other = prompt(600), prompt(600, seed=1)
    engine, fresh = make_engine(long_bundle), make_engine(long_bundle)
    engine.prefill([np.append(ids[:400], other[400:])])
    for _ in range(5):
        engine.step()
    engine.truncate(400)
    engine.extend(ids[400:])
    fresh.prefill([ids])
    assert_same_continuation(engine, fresh, tolerance(long_bundle))
    # The token to go on with may be written instead.
    for again in (engine, fresh):
        again.truncate(599)
        again.next_token[0] = ids[599]
        again.step()
    np.testing.assert_allclose(engine.logits, fresh.logits, atol=tolerance(long_bundle))
    np.testing.assert_allclose(fresh.logits[0], full_logits(long_bundle, ids)[-1], atol=tolerance(long_bundle))


def test_tokens_that_do_not_fit_are_refused_and_the_row_is_as_it_was(
    make_engine: type[Engine], long_bundle: Bundle
) -> None:
    engine = make_engine(long_bundle, max_len=400)
    engine.prefill([prompt(300)])
    before = engine.logits.copy()
    with pytest.raises(ContextError, match="the prompt has 101 tokens behind 300, the context holds 400"):
        engine.extend(prompt(101))
    with pytest.raises(BundleError, match="outside the vocabulary"):
        engine.extend([384])
    assert engine.lengths == [300]
    np.testing.assert_array_equal(engine.logits, before)
    engine.extend(prompt(100))
    assert engine.capacity == 400
    with pytest.raises(ContextError, match="context of 400 tokens is full"):
        engine.step()


def test_buffers_for_which_there_is_no_memory_are_a_memory_error(
    make_engine: type[Engine], long_bundle: Bundle
) -> None:
    engine = make_engine(long_bundle, batch_size=128)  # 67 MB a buffer at least
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + 20_000_000, limits[1]))
    try:
        with pytest.raises(MemoryError):
            engine.reserve(CONTEXT)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_every_engine_gives_its_tokens_as_one_type(make_engine: type[Engine], llama_path: Path) -> None:
    engine = make_engine(load_bundle(llama_path), batch_size=3)
    engine.prefill([[5], [6, 7], [8]])
    tokens = engine.next_token
    assert isinstance(tokens, memoryview)
    assert (tokens.format, tokens.shape, tokens.readonly) == ("q", (3,), False)
    assert tokens.tolist() == engine.logits.argmax(-1).tolist()


def test_a_graph_that_rounds_behind_the_prompt_takes_it_in_pieces_where_the_bundle_says_so(
    make_engine: type[Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_bundle(tmp_path / "pair", context=512, kv_dtype="int8", two_sessions=True)
    rounds_first = make_engine(load_bundle(write_bundle(tmp_path / "one", context=512, kv_dtype="int8")))
    ids = prompt(400)
    whole = make_engine(load_bundle(path))  # of this kind and without the field: the prompt goes in one call
    whole.prefill([ids])
    write_manifest(path, prefill_takes_past=True)
    monkeypatch.setattr("ryot.edge.engine.PIECE_TOKENS", 64)
    pieces = make_engine(load_bundle(path))
    pieces.prefill([ids[:350]])
    pieces.extend(ids[350:])
    rounds_first.prefill([ids])
    # A whole prompt attends in float32. Pieces attend to rounded keys and values of the pieces before, which is no
    # worse than to attend to rounded ones alone.
    exact = full_logits(load_bundle(write_bundle(tmp_path / "float", context=512)), ids)[-1]
    np.testing.assert_allclose(whole.logits[0], exact, atol=TOLERANCE)
    off_pieces, off_rounded = (np.square(e.logits[0] - exact).mean() ** 0.5 for e in (pieces, rounds_first))
    assert 0 < off_pieces < 1.25 * off_rounded
