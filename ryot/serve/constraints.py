"""Answers of a given form: JSON, a JSON schema, a regular expression or a grammar, through llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ryot.edge.bundle import Bundle
from ryot.edge.tokenizer import Tokenizer
from ryot.errors import ConfigError

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from llguidance._lib import JsonCompileOptions

#: JSON as Python's `json.dumps` writes it: where any space may stand, a small model can go on with spaces for ever.
JSON_LAYOUT: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Builds constraints for one model's tokens."""

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer):
        """Raises `ConfigError` where llguidance is missing, or the model has no token that ends a text."""
        try:
            from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise ConfigError("response_format needs llguidance", hint="pip install 'ryot[serve]'") from error
        if not bundle.eos_token_ids:
            raise ConfigError("response_format: this model has no token that ends a text")
        self._matcher = LLMatcher
        self._vocab_size = bundle.model.vocab_size
        vocabulary = _Vocabulary(bundle, tokenizer)
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(vocabulary), n_vocab=self._vocab_size, eos_token=list(bundle.eos_token_ids)
        )

    def build_json(self, schema: Mapping[str, object]) -> str:
        """The grammar of a JSON schema; raises `ConfigError` for one that llguidance does not take."""
        try:
            return self._checked(self._matcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_LAYOUT))
        except ValueError as error:
            raise ConfigError(f"the schema cannot be used ({_line(error)})") from error

    def build_regex(self, pattern: str) -> str:
        """The grammar of a regular expression, in the syntax of Rust's regex crate; raises like `build_json`."""
        try:
            return self._checked(self._matcher.grammar_from_regex(pattern))
        except ValueError as error:  # half of a pair, which UTF-8 cannot hold
            raise ConfigError(f"the regular expression cannot be used ({_line(error)})") from error

    def build_grammar(self, text: str) -> str:
        """The grammar of a text in llguidance's dialect of Lark, or in llama.cpp's GBNF; raises like `build_json`."""
        from llguidance import grammar_from

        is_gbnf = "::=" in text and not text.startswith("start:")
        try:
            return self._checked(str(grammar_from("gbnf" if is_gbnf else "lark", text)))
        except ValueError as error:
            raise ConfigError(f"the grammar cannot be used ({_line(error)})") from error

    def build_choice(self, choices: Sequence[str]) -> str:
        """The grammar of one of several texts; raises like `build_json`."""
        return self.build_grammar("start: " + " | ".join(json.dumps(choice) for choice in choices))

    def constrain(self, grammar: str) -> TokenMask:
        """A constraint of one sequence."""
        return TokenMask(self._matcher(self._tokenizer, grammar, log_level=0), self._vocab_size)

    def _checked(self, grammar: str) -> str:
        if message := self._matcher.validate_grammar(grammar, self._tokenizer):
            raise ConfigError(f"the form of the answer cannot be used ({_line(message)})")
        return grammar


class TokenMask:
    """A `Constraint` by a grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> np.ndarray:
        """[V] bool. Raises `ConfigError` where the grammar is too complex to go on with."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ConfigError(f"response_format: {_line(self._matcher.get_error())}")
        return np.unpackbits(mask, bitorder="little", count=self._vocab_size).view(bool)

    def push(self, token: int) -> bool:
        """Take a token; whether nothing may follow."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())


class _Vocabulary:
    """What llguidance asks about a tokenizer."""

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id = bundle.eos_token_ids[0]
        self.bos_token_id = bundle.bos_token_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(bundle.model.vocab_size)]
        # Tokens without text, those that end a text among them, have names that no text can hold.
        silent = [i for i, text in enumerate(self.tokens) if not text]
        for token in silent:
            self.tokens[token] = b"\xff<[%d]>" % token
        self.special_token_ids = silent

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode_plain(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no reason given"
