"""Messages whose text can't pass for the template's own tokens: `<|im_end|>` that a user writes stays plain text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ryot.errors import ConfigError

if TYPE_CHECKING:
    from ryot.edge.tokenizer import Tokenizer

#: Put around such a token in a message; private-use characters, which are taken out of messages first.
BEGIN, END = "\U000f0000", "\U000f0001"
#: Stands before text from the middle of a chat while that is encoded, so that no space is put in front of it.
_BEFORE = "\n"


class PlainTokens:
    """Marks a template's tokens in messages, and encodes a chat in which they are marked."""

    def __init__(self, tokenizer: Tokenizer, template: str):
        """A template's tokens are all special ones, and the other added ones that its source holds."""
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens()
        tokens = [text for text, special in added.items() if special or (text in template and not text.isspace())]
        # The longest first, so that a token goes before those that it begins with.
        self._tokens = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
        # A template may cut a message apart; a mark that is left alone then says nothing.
        self._marks = re.compile(f"{BEGIN}({self._tokens.pattern}){END}|[{BEGIN}{END}]")
        self._before = tokenizer.encode(_BEFORE, add_special_tokens=False)

    def mark(self, value: object) -> object:
        """A message, or a part of one, with every such token in its texts marked."""
        if isinstance(value, str):
            text = value.replace(BEGIN, "").replace(END, "")
            return self._tokens.sub(lambda found: BEGIN + found[0] + END, text)
        if isinstance(value, Mapping):
            return {key: self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, (list, tuple)) else value

    def encode(self, chat: str) -> list[int]:
        """The ids of a chat: marked tokens as plain text, all else as usual.

        Raises `ConfigError` for a token that the tokenizer makes out of plain text too.
        """
        first, *rest = self._marks.split(chat)
        ids = self._tokenizer.encode(first, add_special_tokens=False)
        # `split` gives text and marked token in turn, None for a mark that stood alone.
        for i, piece in enumerate(rest):
            if piece:
                ids += self._encode_inside(piece, plain=i % 2 == 0)
        return ids

    def _encode_inside(self, text: str, *, plain: bool) -> list[int]:
        def encode(text: str) -> list[int]:
            if plain:
                return self._tokenizer.encode_plain(text)
            return self._tokenizer.encode(text, add_special_tokens=False)

        ids, length = encode(_BEFORE + text), len(self._before)
        ids = ids[length:] if ids[:length] == self._before else encode(text)
        if plain and self._tokenizer.token_to_id(text) in ids:
            raise ConfigError(f"message: holds {text!r}, which this model's tokenizer cannot write as plain text")
        return ids
