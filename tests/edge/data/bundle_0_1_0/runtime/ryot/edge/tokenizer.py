"""Text to token ids and back, and text that arrives a token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer

from ryot.edge.bundle import TOKENIZER_NAME, Bundle
from ryot.errors import BundleError


class Tokenizer:
    """A bundle's byte-level BPE."""

    def __init__(self, path: Path):
        """Read `tokenizer.json`. Raises `BundleError` when it is no byte-level tokenizer."""
        try:
            self._rust = RustTokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers package raises nothing more precise
            raise BundleError(f"{path}: the tokenizer cannot be read ({error})") from error
        if type(self._rust.decoder).__name__ != "ByteLevel":
            raise BundleError(f"{path}: expected a byte-level tokenizer, got the decoder {self._rust.decoder!r}")
        self._bytes = _token_bytes(self._rust)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._rust.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; nothing is added before or behind. Special tokens in the text are taken as such."""
        return self._rust.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens give nothing, bytes that are no UTF-8 give U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; none for a special token and for an id without a token."""
        return self._bytes.get(int(token_id), b"")


class TextStream:
    """Turns tokens into text as they come, and never into a part of a character.

    The bytes of a character whose end has not come are held back; bytes that cannot begin or continue a character
    become U+FFFD at once. All pieces together are `Tokenizer.decode` of all ids, less an unfinished last character.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that is complete with this token, perhaps none."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a bundle. Raises `BundleError` when it cannot be read or knows more tokens than the model."""
    tokenizer = Tokenizer(bundle.path / TOKENIZER_NAME)
    tokens, model_tokens = tokenizer.vocab_size, bundle.model.vocab_size
    if tokens > model_tokens:
        raise BundleError(f"{bundle.path / TOKENIZER_NAME}: has {tokens} tokens, the model has {model_tokens}")
    return tokenizer


def _token_bytes(tokenizer: RustTokenizer) -> dict[int, bytes]:
    """The bytes of every ordinary token of a byte-level tokenizer."""
    alphabet = byte_alphabet()
    added = tokenizer.get_added_tokens_decoder()
    table = {}
    for text, token_id in tokenizer.get_vocab(with_added_tokens=False).items():
        if token_id not in added:
            table[token_id] = bytes(alphabet[character] for character in text)
    for token_id, token in added.items():
        if not token.special:
            table[token_id] = token.content.encode()
    return table


def byte_alphabet() -> dict[str, int]:
    """The byte of each character in which a byte-level BPE writes its tokens.

    GPT-2's table: a printable Latin-1 character stands for its own byte, the other 68 bytes are written, in order,
    as the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}
