"""The tree of beginnings against a plain list of everything that was put in."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ryot.edge.prefix_cache import BLOCK_TOKENS, PrefixCache

#: Of one token in these tests: [2, 1, 1, 1] float32.
TOKEN_BYTES = 8


def values_of(ids: list[int]) -> np.ndarray:
    """Keys and values as no model makes them: each depends on all tokens so far."""
    sums = np.cumsum([7 * i + 1 for i in ids]).astype(np.float32)
    return np.stack([sums, -sums])[:, None, :, None]


def insert(cache: PrefixCache, ids: list[int], owner: str = "") -> None:
    cache.insert(owner, ids, lambda start, stop: values_of(ids)[:, :, start:stop].copy())


def matched(cache: PrefixCache, ids: list[int], owner: str = "") -> int:
    """Tokens of `ids` that are known; their values are checked."""
    pieces = cache.match(owner, ids)
    count = sum(piece.shape[2] for piece in pieces)
    if count:
        np.testing.assert_array_equal(np.concatenate(pieces, axis=2), values_of(ids)[:, :, :count])
    return count


@pytest.mark.parametrize("shared", [0, 1, 63, 64, 65, 128, 200])
def test_the_longest_known_beginning_is_found_to_the_token(shared: int) -> None:
    cache = PrefixCache(10**6)
    ids = list(range(1, 201))
    insert(cache, ids)
    assert matched(cache, [*ids[:shared], 777, 778]) == shared


def test_a_random_history_matches_as_a_search_through_all_of_it_does() -> None:
    rng = random.Random(0)
    cache = PrefixCache(10**9)
    history: dict[str, list[list[int]]] = {"a": [], "b": []}
    for _ in range(300):
        owner = rng.choice("ab")
        known = history[owner]
        base = rng.choice(known) if known and rng.random() < 0.7 else []
        ids = [*base[: rng.randrange(len(base) + 1)], *(rng.randrange(3) for _ in range(rng.randrange(1, 150)))]
        expected = max((common(ids, other) for other in known), default=0)
        assert matched(cache, ids, owner) >= min(expected, expected // BLOCK_TOKENS * BLOCK_TOKENS)
        assert matched(cache, ids, owner) == expected
        insert(cache, ids, owner)
        known.append(ids)
        assert matched(cache, ids, owner) == len(ids)


def common(one: list[int], other: list[int]) -> int:
    return next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


def test_nothing_is_shared_between_owners() -> None:
    cache = PrefixCache(10**6)
    insert(cache, [1, 2, 3], "one")
    assert matched(cache, [1, 2, 3], "other") == 0
    assert matched(cache, [1, 2, 3], "one") == 3


def test_the_budget_holds_and_the_least_recently_used_goes_first() -> None:
    size = 100
    cache = PrefixCache(2 * size * TOKEN_BYTES)
    first, second, third = ([n] * size for n in (1, 2, 3))
    insert(cache, first)
    insert(cache, second)
    assert matched(cache, first) == size
    insert(cache, third)
    assert cache.used_bytes <= cache.max_bytes
    assert matched(cache, first) == matched(cache, third) == size
    # Its second block went; the first one had to go as well for the 100 tokens of the third.
    assert matched(cache, second) < size


def test_what_is_taken_out_and_put_back_is_known_and_goes_in_the_same_order() -> None:
    rng = random.Random(4)
    texts = [[rng.randrange(3) for _ in range(rng.randrange(1, 150))] for _ in range(40)]
    cache, copy = PrefixCache(10**6), PrefixCache(10**6)
    for number, ids in enumerate(texts):
        insert(cache, ids, "ab"[number % 2])
    matched(cache, texts[0], "a")
    copy.restore(cache.blocks())
    assert copy.used_bytes == cache.used_bytes
    # Both are made to forget alike.
    copy.max_bytes = cache.max_bytes = cache.used_bytes // 2
    for either in (cache, copy):
        insert(either, [9] * 70)
        assert either.used_bytes <= either.max_bytes
    for number, ids in enumerate(texts):
        owner = "ab"[number % 2]
        assert matched(copy, ids, owner) == matched(cache, ids, owner)
    small = PrefixCache(100 * TOKEN_BYTES)
    small.restore(cache.blocks())
    assert 0 < small.used_bytes <= small.max_bytes


def test_a_text_larger_than_the_budget_leaves_its_beginning() -> None:
    cache = PrefixCache(150 * TOKEN_BYTES)
    insert(cache, [5] * 10)
    insert(cache, list(range(1, 1000)))
    assert cache.used_bytes <= cache.max_bytes
    assert matched(cache, list(range(1, 1000))) == 128


def test_a_beginning_that_grows_is_held_once() -> None:
    cache = PrefixCache(10**6)
    ids = list(range(1, 301))
    for length in range(1, 301):
        insert(cache, ids[:length])
    assert cache.used_bytes == 300 * TOKEN_BYTES
