"""The ids that begin, end and pad a text, wherever a checkpoint says them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ryot.errors import CheckpointError
from ryot.models.token_ids import TokenIds, read_token_ids


class Words(dict[str, int]):
    """A vocabulary."""

    def token_to_id(self, token: str) -> int | None:
        return self.get(token)


def read(
    config: Mapping[str, Any], generation: Mapping[str, Any] = {}, tokenizer_config: Mapping[str, Any] = {}
) -> TokenIds:
    words = Words({"<s>": 1, "</s>": 2})
    return read_token_ids(config, generation, tokenizer_config, words, vocab_size=1000, where="ck")


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer_config", "expected"),
    [
        ({}, {}, {}, TokenIds(None, (), None)),
        ({"bos_token_id": 997, "eos_token_id": 998}, {}, {}, TokenIds(997, (998,), None)),
        ({"eos_token_id": 998}, {"eos_token_id": [999, 998, 999]}, {}, TokenIds(None, (999, 998), None)),
        ({"eos_token_id": [998]}, {"eos_token_id": None}, {}, TokenIds(None, (998,), None)),
        ({"bos_token_id": 0, "pad_token_id": 0}, {}, {}, TokenIds(0, (), 0)),
        ({"pad_token_id": -1}, {}, {"pad_token": "</s>"}, TokenIds(None, (), None)),
        ({"bos_token_id": None}, {}, {"bos_token": "<s>", "eos_token": {"content": "</s>"}}, TokenIds(1, (2,), None)),
        ({"eos_token_id": 998}, {}, {"eos_token": "</s>"}, TokenIds(None, (998,), None)),
    ],
)
def test_the_first_file_that_says_an_id_counts(
    config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer_config: Mapping[str, Any], expected: TokenIds
) -> None:
    assert read(config, generation, tokenizer_config) == expected


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer_config", "message"),
    [
        ({"eos_token_id": 1000}, {}, {}, r"ck: config\.json: eos_token_id is 1000, expected an id below .* of 1000"),
        ({}, {"eos_token_id": [2, 1001]}, {}, r"ck: generation_config\.json: eos_token_id is 1001, expected"),
        ({"pad_token_id": 1000}, {}, {}, r"config\.json: pad_token_id is 1000, expected an id below"),
        ({"bos_token_id": "1"}, {}, {}, r"ck: config\.json: bos_token_id is '1', expected a token id"),
        ({"bos_token_id": True}, {}, {}, r"bos_token_id is True, expected a token id"),
        ({"eos_token_id": -2}, {}, {}, r"eos_token_id is -2, expected a token id"),
        (
            {},
            {},
            {"eos_token": "<end>"},
            r"tokenizer_config\.json: eos_token is '<end>', which the tokenizer has no id",
        ),
    ],
)
def test_an_id_that_the_model_does_not_have_is_refused_by_name(
    config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer_config: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(config, generation, tokenizer_config)


def test_texts_are_separated_by_what_begins_them_or_else_by_what_ends_them() -> None:
    ids = [TokenIds(0, (5,), None), TokenIds(None, (5, 6), 7), TokenIds(None, (), 7)]
    assert [i.separator for i in ids] == [0, 5, None]
