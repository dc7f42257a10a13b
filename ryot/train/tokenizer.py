"""Byte-level BPE: trained on the training split, stored as `tokenizer.json`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ryot.errors import ConfigError
from ryot.train.encoding import cut_pieces, encode_stream
from ryot.train.hf import END_OF_TEXT, END_OF_TEXT_ID

#: Every byte has a token of its own, and the end of a text has one.
MIN_VOCAB_SIZE = 257

#: Part of the cache key: a change of the recipe below must not find the old result.
TOKENIZER_RECIPE = "byte-level-bpe-1"

_GPT_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "pad_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens, `<|endoftext|>` first.

    Raises `ConfigError` when the text has too few distinct pieces for so many tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"vocab_size: got {vocab_size}, expected at least {MIN_VOCAB_SIZE} (256 bytes, end of text)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Whole texts are held by the trainer at some 40 bytes per byte.
    words = tokenizer.pre_tokenizer.pre_tokenize_str
    pieces = (piece for text in texts for piece in cut_pieces(text, lambda t: [word for word, _ in words(t)]))
    _learn(tokenizer, pieces, trainer)
    if (got := tokenizer.get_vocab_size()) < vocab_size:
        raise ConfigError(
            f"vocab_size: got {vocab_size}, but this corpus carries only {got} tokens",
            hint="give more text with --data, or a preset with a smaller vocabulary",
        )
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    return tokenizer


class _Stopped(Exception):
    """A signal has come while a vocabulary was being learned."""


def _learn(tokenizer: Tokenizer, pieces: Iterable[str], trainer: trainers.BpeTrainer) -> None:
    """Learn a vocabulary in a thread; in the main one no signal would be minded until all of a text is read."""
    stopped = threading.Event()

    def until_stopped() -> Iterator[str]:
        for piece in pieces:
            if stopped.is_set():
                raise _Stopped
            yield piece

    with ThreadPoolExecutor(max_workers=1) as pool:
        learning = pool.submit(tokenizer.train_from_iterator, until_stopped(), trainer)
        try:
            learning.result()
        finally:
            stopped.set()


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """All texts as one row of token ids, int64, the end-of-text token in front of each."""
    return np.concatenate([np.empty(0, np.int64), *encode_stream(tokenizer, texts, END_OF_TEXT_ID)])


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each token stands for, int64 [V]; 0 for the end of a text.

    In a byte-level vocabulary each character of a token's name is one byte.
    """
    vocab = tokenizer.get_vocab()
    lengths = np.zeros(len(vocab), np.int64)
    for name, token in vocab.items():
        lengths[token] = 0 if token == END_OF_TEXT_ID else len(name)
    return lengths


def tokenizer_config(max_seq_len: int) -> dict[str, Any]:
    """`tokenizer_config.json` for transformers."""
    return {**_GPT_CONFIG, "model_max_length": max_seq_len}
