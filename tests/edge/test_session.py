"""The engines against the standard graph of the same bundle, computed in one piece by a plain `session.run`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ryot.edge.bundle import Bundle
from ryot.edge.engine import Engine
from ryot.errors import BundleError, ConfigError, ContextError

from .reference import TOLERANCE, full_logits, prompt


@pytest.mark.parametrize("length", [1, 2, 17, 63])
def test_prefill_and_steps_give_the_logits_of_a_full_recomputation(
    make_engine: type[Engine], bundle: Bundle, length: int
) -> None:
    ids = prompt(64)
    expected = full_logits(bundle, ids)
    decoder = make_engine(bundle)
    decoder.prefill([ids[:length]])
    for position in range(length, 64):
        assert decoder.position == position
        np.testing.assert_allclose(decoder.logits[0], expected[position - 1], atol=TOLERANCE)
        assert decoder.next_token[0] == decoder.logits[0].argmax()
        decoder.next_token[0] = ids[position]
        decoder.step()
    np.testing.assert_allclose(decoder.logits[0], expected[-1], atol=TOLERANCE)


def test_greedy_tokens_are_fed_back_by_the_runtime(make_engine: type[Engine], bundle: Bundle) -> None:
    decoder = make_engine(bundle)
    ids = list(prompt(10))
    decoder.prefill([ids])
    for _ in range(20):
        ids.append(int(decoder.next_token[0]))
        decoder.step()
    expected = full_logits(bundle, np.array(ids)).argmax(-1)
    assert ids[10:] == expected[9:29].tolist()


@pytest.mark.parametrize("engine", ["capi", "python"])
def test_a_forked_process_has_keys_and_values_of_its_own(llama_path: Path, engine: str) -> None:
    program = """
import os, sys
from ryot.edge.bundle import load_bundle
from ryot.edge.engines import open_engine
decoder = open_engine(load_bundle(sys.argv[1]), engine=sys.argv[2])
def tokens(count):
    for _ in range(count):
        decoder.step()
        yield int(decoder.next_token[0])
decoder.prefill([[5, 6, 7, 8]])
expected = list(tokens(6))
decoder.prefill([[5, 6, 7, 8]])
found = list(tokens(3))
if not os.fork():
    decoder.prefill([[9, 3, 9, 3, 9, 3, 9, 3, 9]])
    os._exit(0)
assert os.wait()[1] == 0
print(found + list(tokens(3)) == expected)
"""
    command = [sys.executable, "-c", program, str(llama_path), engine]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "True\n"


def test_a_new_prompt_forgets_the_old_one(make_engine: type[Engine], bundle: Bundle) -> None:
    decoder, fresh = make_engine(bundle), make_engine(bundle)
    decoder.prefill([prompt(60, seed=1)])
    decoder.step()
    for d in (decoder, fresh):
        d.prefill([prompt(9, seed=2)])
        d.step()
    np.testing.assert_array_equal(decoder.logits, fresh.logits)


@pytest.mark.parametrize("lengths", [(7, 7, 7), (3, 40, 11)], ids=["same length", "ragged"])
def test_rows_of_a_batch_equal_rows_alone(make_engine: type[Engine], bundle: Bundle, lengths: tuple[int, ...]) -> None:
    prompts = [prompt(n, seed=i) for i, n in enumerate(lengths)]
    batch = make_engine(bundle, batch_size=3)
    batch.prefill(prompts)
    alone = [make_engine(bundle) for _ in prompts]
    for decoder, ids in zip(alone, prompts, strict=True):
        decoder.prefill([ids])
    for _ in range(15):
        for row, decoder in enumerate(alone):
            np.testing.assert_allclose(batch.logits[row], decoder.logits[0], atol=TOLERANCE)
            assert batch.next_token[row] == decoder.next_token[0]
            decoder.step()
        batch.step()


def test_one_prompt_can_be_shared_by_all_rows(make_engine: type[Engine], bundle: Bundle) -> None:
    shared, alone = make_engine(bundle, batch_size=4), make_engine(bundle)
    shared.prefill_shared(prompt(12))
    alone.prefill([prompt(12)])
    for _ in range(5):
        for row in range(4):
            np.testing.assert_allclose(shared.logits[row], alone.logits[0], atol=TOLERANCE)
        shared.step()
        alone.step()


def test_rows_can_be_replaced_by_copies_of_others(make_engine: type[Engine], bundle: Bundle) -> None:
    decoder, alone = make_engine(bundle, batch_size=3), make_engine(bundle)
    decoder.prefill([prompt(12), prompt(20, seed=1), prompt(5, seed=2)])
    alone.prefill([prompt(5, seed=2)])
    decoder.step()
    alone.step()
    decoder.reorder_cache([2, 2, 0])
    assert decoder.position == 13
    decoder.step()
    alone.step()
    for row in (0, 1):
        np.testing.assert_allclose(decoder.logits[row], alone.logits[0], atol=TOLERANCE)


def test_the_end_of_the_context_is_an_error_and_not_a_wrong_token(make_engine: type[Engine], bundle: Bundle) -> None:
    decoder = make_engine(bundle)
    decoder.prefill([prompt(64)])
    with pytest.raises(ContextError, match="context of 64 tokens is full"):
        decoder.step()
    with pytest.raises(ContextError, match="prompt has 65 tokens, the context holds 64"):
        decoder.prefill([prompt(65)])


def test_a_shorter_buffer_gives_the_same_tokens_and_its_own_limit(make_engine: type[Engine], bundle: Bundle) -> None:
    short, full = make_engine(bundle, max_len=20), make_engine(bundle)
    for decoder in (short, full):
        decoder.prefill([prompt(15)])
    for _ in range(5):
        short.step()
        full.step()
        np.testing.assert_allclose(short.logits, full.logits, atol=TOLERANCE)
    with pytest.raises(ContextError) as caught:
        short.step()
    assert caught.value.hint is not None and "64" in caught.value.hint


def test_an_id_outside_the_vocabulary_is_refused(make_engine: type[Engine], bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="outside the vocabulary, 0 to 383"):
        make_engine(bundle).prefill([[1, 384]])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"threads": 0}, "threads: got 0"),
        ({"batch_size": -1}, "batch_size: got -1"),
        ({"max_len": 65}, "max_len: got 65"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(
    make_engine: type[Engine], bundle: Bundle, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_engine(bundle, **sizes)
