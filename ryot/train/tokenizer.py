"""Byte-level BPE: trained on the training split, stored as `tokenizer.json`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ryot.edge.text_stream import TokenPieces
from ryot.errors import ConfigError
from ryot.train.encoding import cut_pieces, encode_stream

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0

#: Every byte has a token of its own, and the end of a text has one.
MIN_VOCAB_SIZE = 257

#: Seconds after which a signal is minded at the latest while a vocabulary is learned.
SIGNALS_EVERY_S = 0.2

#: Part of the cache key: a change of the recipe below must not find the old result.
TOKENIZER_RECIPE = "byte-level-bpe-1"

_GPT_CONFIG: dict[str, object] = {
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
            # A signal that comes just before a wait without an end would be seen after it.
            while wait([learning], timeout=SIGNALS_EVERY_S).not_done:
                pass
            learning.result()
        finally:
            stopped.set()


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str], separator_id: int | None = END_OF_TEXT_ID) -> np.ndarray:
    """All texts as one row of token ids, int64, `separator_id` in front of each: our own end of text by default.

    Of a checkpoint from elsewhere it is `TokenIds.separator`; None puts nothing there.
    """
    return np.concatenate([np.empty(0, np.int64), *encode_stream(tokenizer, texts, separator_id)])


def byte_lengths(tokenizer: Tokenizer, separator_id: int | None = None) -> np.ndarray:
    """Bytes of text that each token stands for in the middle of a text, int64 [V]; 0 for special tokens.

    Where the tokenizer begins each text with a space that the text does not have, the separator in front of it takes
    that back with -1, so that a stream of texts adds up to its bytes. Where the tokenizer changes text before it reads
    it (NFC, lower case) or has a token for what it does not know, the bytes are those of the text that it makes of it.
    Raises `ConfigError` for a tokenizer that `ryot.edge` refuses.
    """
    pieces = _pieces(tokenizer)
    ids = tokenizer.get_vocab().values()
    lengths = np.zeros(max(ids) + 1, np.int64)
    for token in ids:
        lengths[token] = pieces.num_bytes(token)
    if separator_id is not None:
        lengths[separator_id] -= leading_space_bytes(tokenizer)
    return lengths


def count_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """Bytes of one text from its ids, special tokens around it included.

    Less than the sum of their `byte_lengths` where the tokenizer puts a space before a text that is not part of it.
    """
    pieces = _pieces(tokenizer)
    total = sum(pieces.num_bytes(token) for token in ids)
    return total - leading_space_bytes(tokenizer) if total else 0


def leading_space_bytes(tokenizer: Tokenizer) -> int:
    """Bytes that a text's tokens have more than the text: 1 where the tokenizer begins each text with a space."""
    pieces = _pieces(tokenizer)
    return sum(pieces.num_bytes(token) for token in tokenizer.encode("a", add_special_tokens=False).ids) - 1


def _pieces(tokenizer: Tokenizer) -> TokenPieces:
    try:
        return TokenPieces(tokenizer)
    except ValueError as error:
        raise ConfigError(f"tokenizer: {error}") from error


def tokenizer_config(max_seq_len: int) -> dict[str, object]:
    """`tokenizer_config.json` for transformers."""
    return {**_GPT_CONFIG, "model_max_length": max_seq_len}
