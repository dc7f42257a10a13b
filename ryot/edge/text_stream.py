"""What each token adds to a text, read from the tokenizer's decoder, and text that arrives a token at a time.

`tokenizers` decodes a list of tokens as a whole. Its decoders that matter for text models act on each token by itself,
but for characters cut in two, and for the first token, so that a stream costs the same for every token. Decoders that
look further are refused.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from tokenizers import Regex, decoders
from tokenizers import Tokenizer as RustTokenizer

if TYPE_CHECKING:
    from ryot.mapping import Unchecked

UNKNOWN = "\ufffd"
#: One part of a decoder, as `tokenizer.json` writes it.
Stage: TypeAlias = "Unchecked"


class Decoding(NamedTuple):
    """A decoder, taken apart."""

    byte_level: bool
    """A token's name is its bytes, each written as one character."""
    byte_fallback: bool
    """Tokens `<0x00>` to `<0xFF>` stand for one byte."""
    per_token: decoders.Decoder | None
    """What is done to each token's name by itself; it may treat the first one differently."""
    strip: str
    """Character that is removed from the beginning of a text..."""
    strip_count: int
    """... up to this often."""


class TokenPieces:
    """The text, or the bytes, that each token of a tokenizer adds. Special tokens add nothing."""

    def __init__(self, tokenizer: RustTokenizer):
        """Raises `ValueError`, naming the decoder, where tokens cannot be read one at a time."""
        self.decoding = read_decoding(tokenizer)
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in self._added.items() if token.special}
        self._alphabet = byte_alphabet()
        self._known: dict[int, str | bytes | None] = {}

    def piece(self, token_id: int, *, first: bool = False) -> str | bytes | None:
        """What a token adds, bytes where they may be a part of a character; None for one that is not decoded at all.

        `first` says that no other token has been decoded before.
        """
        if first and not self.decoding.byte_level:
            return self._read(token_id, first=True)
        if token_id not in self._known:
            self._known[token_id] = self._read(token_id, first=False)
        return self._known[token_id]

    def num_bytes(self, token_id: int) -> int:
        """Bytes of text that a token stands for in the middle of a text."""
        if self.decoding.byte_level and token_id in self._added:
            # An added token is matched in the text as it is, however the decoder then reads its name.
            return 0 if token_id in self._special else len(self._added[token_id].content.encode())
        piece = self.piece(token_id)
        return len(piece.encode() if isinstance(piece, str) else piece or b"")

    def _read(self, token_id: int, *, first: bool) -> str | bytes | None:
        name = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        if name is None:
            return None
        if self.decoding.byte_level:
            try:
                return bytes([self._alphabet[character] for character in name])
            except KeyError:  # a name that is not written in the alphabet stands for itself
                return name.encode()
        if (decoder := self.decoding.per_token) is not None:
            name = decoder.decode([name]) if first else decoder.decode([_ANCHOR, name])[len(_ANCHOR) :]
        if self.decoding.byte_fallback and (byte := _fallback_byte(name)) is not None:
            return byte
        return str(name)


class TextStream:
    """Turns tokens into text as they come, and never into a part of a character.

    The bytes of a character whose end has not come are held back; bytes that cannot begin or continue a character
    become U+FFFD as `tokenizers` has it: each byte of the whole run with byte fallback, else what Unicode recommends.
    All pieces together are what the tokenizer decodes from all ids. The exception is byte fallback with a fault behind
    whole characters of the same run: they have been given out, where decoding afterwards loses them too.
    """

    def __init__(self, pieces: TokenPieces, *, continues: bool = False):
        """`continues` says that the tokens go on with a text, so that the first one is none that begins it."""
        self._pieces = pieces
        self._first = not continues
        decoding = pieces.decoding
        self._strip_left = 0 if continues else decoding.strip_count
        self._bytes: _ByteRun | _ByteText = _ByteText() if decoding.byte_level else _ByteRun()

    def push(self, token_id: int) -> str:
        """The text that is complete with this token, perhaps none."""
        piece = self._pieces.piece(token_id, first=self._first)
        if piece is None:
            return ""
        self._first = False
        return self._strip(self._bytes.push(piece) if isinstance(piece, bytes) else self._bytes.end() + piece)

    def finish(self) -> str:
        """What stands for an unfinished last character, since no more tokens come; empty if there is none."""
        return self._strip(self._bytes.end())

    def _strip(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._pieces.decoding.strip:
                self._strip_left = 0
            else:
                text = text[1:]
                self._strip_left -= 1
        return text


class _ByteText:
    """A text that is bytes throughout."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes) -> str:
        return self._decoder.decode(data)

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class _ByteRun:
    """Single bytes in a text of characters: a run of them is UTF-8, or it is U+FFFD for each."""

    def __init__(self) -> None:
        self._held = b""
        self._broken = False

    def push(self, byte: bytes) -> str:
        if self._broken:
            return UNKNOWN
        self._held += byte
        try:
            text = codecs.utf_8_decode(self._held, "strict", False)[0]
        except UnicodeDecodeError:
            self._broken = True
            return self._take_unknown()
        if text:
            self._held = b""
        return text

    def end(self) -> str:
        self._broken = False
        return self._take_unknown()

    def _take_unknown(self) -> str:
        count, self._held = len(self._held), b""
        return UNKNOWN * count


#: A token that decoders leave alone, put before the one in question.
_ANCHOR = "a"


def read_decoding(tokenizer: RustTokenizer) -> Decoding:
    """How the tokenizer's decoder treats tokens. Raises `ValueError`, naming it, unless each can be read by itself."""
    if tokenizer.decoder is None:
        raise ValueError("it has no decoder, so its tokens cannot be turned into text")
    stages = _stages(json.loads(tokenizer.decoder.__getstate__()))
    kinds = [stage["type"] for stage in stages]
    refusal = ValueError(f"its decoder {' + '.join(kinds)} cannot turn tokens into text one at a time")
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return Decoding(byte_level=True, byte_fallback=False, per_token=None, strip="", strip_count=0)
    per_token, rest = [], list(stages)
    while rest and rest[0]["type"] in _PER_TOKEN:
        per_token.append(_PER_TOKEN[rest[0]["type"]](rest.pop(0)))
    byte_fallback = bool(rest) and rest[0]["type"] == "ByteFallback"
    rest = rest[byte_fallback:]
    strip, strip_count = "", 0
    match [stage["type"] for stage in rest]:
        case [] | ["Fuse"]:
            pass
        case ["Fuse", "Strip"] if rest[1]["stop"] == 0:
            strip, strip_count = rest[1]["content"], rest[1]["start"]
        case _:
            raise refusal
    decoder = decoders.Sequence(per_token) if per_token else None
    if (decoder is None and not byte_fallback) or (decoder and decoder.decode([_ANCHOR]) != _ANCHOR):
        raise refusal
    return Decoding(
        byte_level=False,
        byte_fallback=byte_fallback,
        per_token=decoder,
        strip=strip,
        strip_count=strip_count,
    )


def _stages(decoder: Stage) -> list[Stage]:
    """The parts of a decoder in their order."""
    if decoder["type"] == "Sequence":
        return [stage for part in decoder["decoders"] for stage in _stages(part)]
    return [decoder]


def _replace(stage: Stage) -> decoders.Decoder:
    ((kind, pattern),) = stage["pattern"].items()
    return decoders.Replace(pattern if kind == "String" else Regex(pattern), stage["content"])


def _metaspace(stage: Stage) -> decoders.Decoder:
    return decoders.Metaspace(stage["replacement"], stage["prepend_scheme"])


#: Decoders that act on each token by itself, and how each is built from its JSON.
_PER_TOKEN: Mapping[str, Callable[[Stage], decoders.Decoder]] = {"Replace": _replace, "Metaspace": _metaspace}


def _fallback_byte(name: str) -> bytes | None:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        try:
            return bytes.fromhex(name[3:5])
        except ValueError:
            return None
    return None


def byte_alphabet() -> dict[str, int]:
    """The byte of each character in which a byte-level BPE writes its tokens.

    GPT-2's table: a printable Latin-1 character stands for its own byte, the other 68 bytes are written, in order,
    as the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}
