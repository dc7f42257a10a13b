"""Answers of a given form: JSON, a JSON schema, a regular expression or a grammar, through llguidance.

A mask is made between two steps, not beside one: at 49,152 tokens it takes 11 to 15 us (median; 50 at most of a JSON
schema's), the way to another thread and back 26 us, a step of that model several ms.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from ryot.edge.bundle import Bundle
from ryot.edge.tokenizer import Tokenizer
from ryot.errors import ConfigError

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from llguidance._lib import JsonCompileOptions

#: JSON as Python's `json.dumps` writes it: where any space may stand, a small model can go on with spaces for ever.
JSON_LAYOUT: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
#: Characters of a form: at these lengths compiling one took at most 0.1 s, of GBNF too, which llguidance translates in
#: Python in time that grows with the square of its length.
MAX_SCHEMA_LENGTH, MAX_PATTERN_LENGTH, MAX_GBNF_LENGTH = 65_536, 16_384, 4_096
#: What llguidance may do to compile a form, a tenth of what it allows itself: three nested repeats of 99 took 3.7 s.
LEXER_FUEL, GRAMMAR_SIZE, LEXER_STATES = 100_000, 50_000, 25_000
#: What a parser may look at to make a mask, for which all streams wait: by its own 50,000 a grammar that reads a text
#: in many ways (`s: s s | "a"`) took up to 91 ms a token, by these 7. A schema of 900 optional properties needs more.
STEP_ITEMS = 2_000
#: Forms that are kept compiled.
KEPT_FORMS = 32


class Grammars:
    """Builds constraints for one model's tokens. Any thread may ask; llguidance compiles without Python's lock."""

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer):
        """Raises `ConfigError` where llguidance is missing, or the model has no token that ends a text."""
        try:
            from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise ConfigError("response_format needs llguidance", hint="pip install 'ryot[serve]'") from error
        if not bundle.eos_token_ids:
            raise ConfigError("response_format: this model has no token that ends a text")
        self._matcher = LLMatcher
        self._limits = LLParserLimits(
            initial_lexer_fuel=LEXER_FUEL,
            max_grammar_size=GRAMMAR_SIZE,
            max_lexer_states=LEXER_STATES,
            step_max_items=STEP_ITEMS,
        )
        self._forms: OrderedDict[str, Form] = OrderedDict()
        self._lock = threading.Lock()
        self._vocab_size = bundle.model.vocab_size
        vocabulary = _Vocabulary(bundle, tokenizer)
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(vocabulary), n_vocab=self._vocab_size, eos_token=list(bundle.eos_token_ids)
        )

    def build_json(self, schema: Mapping[str, object]) -> Form:
        """The form of a JSON schema; raises `ConfigError` for one that llguidance does not take, or a costly one."""
        text = json.dumps(schema)
        _check_length("the schema", text, MAX_SCHEMA_LENGTH)
        try:
            return self._compile(self._matcher.grammar_from_json_schema(text, overrides=JSON_LAYOUT))
        except ValueError as error:
            raise ConfigError(f"the schema cannot be used ({_line(error)})") from error

    def build_regex(self, pattern: str) -> Form:
        """The form of a regular expression, in the syntax of Rust's regex crate; raises like `build_json`."""
        _check_length("the regular expression", pattern, MAX_PATTERN_LENGTH)
        try:
            return self._compile(self._matcher.grammar_from_regex(pattern))
        except ValueError as error:  # half of a pair, which UTF-8 cannot hold
            raise ConfigError(f"the regular expression cannot be used ({_line(error)})") from error

    def build_grammar(self, text: str) -> Form:
        """The form of a text in llguidance's dialect of Lark, or in llama.cpp's GBNF; raises like `build_json`."""
        is_gbnf = "::=" in text and not text.startswith("start:")
        _check_length("the grammar", text, MAX_GBNF_LENGTH if is_gbnf else MAX_PATTERN_LENGTH)
        return self._build_grammar("gbnf" if is_gbnf else "lark", text)

    def build_choice(self, choices: Sequence[str]) -> Form:
        """The form of one of several texts; raises like `build_json`."""
        text = "start: " + " | ".join(json.dumps(choice) for choice in choices)
        _check_length("the list of choices", text, MAX_SCHEMA_LENGTH)
        return self._build_grammar("lark", text)

    def _build_grammar(self, kind: Literal["gbnf", "lark"], text: str) -> Form:
        from llguidance import grammar_from

        try:
            return self._compile(str(grammar_from(kind, text)))
        except ValueError as error:
            raise ConfigError(f"the grammar cannot be used ({_line(error)})") from error

    def _compile(self, grammar: str) -> Form:
        with self._lock:
            if (form := self._forms.get(grammar)) is not None:
                self._forms.move_to_end(grammar)
                return form
        matcher = self._matcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise ConfigError(f"the form of the answer cannot be used ({_line(matcher.get_error())})")
        form = Form(matcher, self._vocab_size)
        with self._lock:
            self._forms[grammar] = form
            if len(self._forms) > KEPT_FORMS:
                self._forms.popitem(last=False)
        return form


class Form:
    """A compiled form; every sequence that is to have it takes a constraint of its own."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher = matcher
        self._vocab_size = vocab_size

    def constrain(self) -> TokenMask:
        """A constraint of one sequence."""
        return TokenMask(self._matcher.deep_copy(), self._vocab_size)


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
        """Take a token; whether nothing may follow. Raises like `allowed`, where that is no end."""
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise ConfigError(f"response_format: {_line(self._matcher.get_error())}")
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


def _check_length(what: str, text: str, limit: int) -> None:
    if len(text) > limit:
        raise ConfigError(f"{what} has {len(text)} characters, expected at most {limit}")


def _line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no reason given"
