"""Bytes that tokens stand for, for every kind of tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers

from ryot.deploy.text_check import HARD_STRINGS
from ryot.errors import ConfigError
from ryot.train.tokenizer import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    byte_lengths,
    count_bytes,
    encode_texts,
    leading_space_bytes,
    train_tokenizer,
)
from tests.edge.tokenizer_kinds import KINDS, byte_level, sentencepiece, unigram


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_texts_tokens_are_those_of_the_text(kind: str) -> None:
    tokenizer: Tokenizer = KINDS[kind]()
    lengths = byte_lengths(tokenizer)
    compared = 0
    for text in HARD_STRINGS:
        ids = tokenizer.encode(text).ids
        if text and tokenizer.decode(ids) == text:
            assert count_bytes(tokenizer, ids) == len(text.encode()), text
            assert lengths[ids].sum() - leading_space_bytes(tokenizer) == len(text.encode()), text
            compared += 1
    # Unigram without bytes knows few characters; Metaspace takes a text's own first space for its own.
    assert compared >= {"unigram": 2, "metaspace": 25}.get(kind, 27)


@pytest.mark.parametrize("kind", ["byte level, bos", "prepend", "gemma", "unigram, bytes"])
def test_a_stream_of_texts_adds_up_to_its_bytes(kind: str) -> None:
    tokenizer: Tokenizer = KINDS[kind]()
    texts = [text for text in HARD_STRINGS if text and tokenizer.decode(tokenizer.encode(text).ids) == text]
    separator = tokenizer.token_to_id("<|turn|>")
    ids = encode_texts(tokenizer, texts, separator)
    assert (ids == separator).sum() == len(texts)
    assert tokenizer.token_to_id("<s>") not in ids
    assert byte_lengths(tokenizer, separator)[ids].sum() == sum(len(text.encode()) for text in texts)
    assert len(encode_texts(tokenizer, texts, None)) == len(ids) - len(texts)


def test_special_tokens_have_no_bytes_and_added_ones_those_of_their_text() -> None:
    tokenizer = byte_level()
    lengths = byte_lengths(tokenizer)
    of = {text: lengths[tokenizer.token_to_id(text)] for text in ("<s>", "日本語タグ", "    ", "<think>")}
    assert of == {"<s>": 0, "日本語タグ": 15, "    ": 4, "<think>": 7}
    assert count_bytes(tokenizer, tokenizer.encode("<s>").ids) == 0


def test_an_added_word_that_looks_like_bytes_is_counted_as_text() -> None:
    """`é` is also the way in which a byte-level vocabulary writes the byte 0xE9."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("é")])
    assert count_bytes(tokenizer, tokenizer.encode("café").ids) == 5


def test_only_tokenizers_that_begin_a_text_with_a_space_have_one_too_many() -> None:
    found = {kind: leading_space_bytes(make()) for kind, make in KINDS.items()}
    assert {kind for kind, count in found.items() if count} == {"prepend", "metaspace", "unigram", "unigram, bytes"}
    assert set(found.values()) == {0, 1}


def test_where_text_is_changed_first_the_bytes_are_those_of_the_changed_text() -> None:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    assert count_bytes(tokenizer, tokenizer.encode("e\u0301").ids) == len("é".encode()) == 2


def test_our_own_tokenizer_has_a_byte_for_each_character_of_a_name() -> None:
    tokenizer = train_tokenizer(["def f():\n    return 'ü'\n"] * 20, 270)
    lengths = byte_lengths(tokenizer)
    expected = [0 if i == END_OF_TEXT_ID else len(tokenizer.id_to_token(i)) for i in range(270)]
    assert np.array_equal(lengths, expected)
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID


def test_a_tokenizer_that_loses_its_text_is_refused() -> None:
    tokenizer = sentencepiece("plain")
    tokenizer.decoder = None
    with pytest.raises(ConfigError, match="tokenizer: it has no decoder"):
        byte_lengths(tokenizer)


def test_ids_may_have_gaps() -> None:
    tokenizer = unigram()
    assert len(byte_lengths(tokenizer)) == max(tokenizer.get_vocab().values()) + 1
