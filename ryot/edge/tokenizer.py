"""Text to token ids and back, as the checkpoint's tokenizer does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer

from ryot.edge.bundle import TOKENIZER_NAME, Bundle
from ryot.edge.text_stream import TextStream, TokenPieces
from ryot.edge.tokenizer_config import apply_tokenizer_config, read_tokenizer_config
from ryot.errors import BundleError, ConfigError


class Tokenizer:
    """A checkpoint's tokenizer: any that `tokenizers` reads and whose tokens can be decoded one at a time."""

    def __init__(self, path: Path, config: Mapping[str, object] | None = None):
        """Read `tokenizer.json`. `config` has the values of `tokenizer_config.json`, by default of the one beside it.

        Raises `BundleError` when it cannot be read, or cannot be decoded one token at a time.
        """
        try:
            self._rust = RustTokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers package raises nothing more precise
            raise BundleError(f"{path}: the tokenizer cannot be read ({error})") from error
        self.config = read_tokenizer_config(path.parent) if config is None else config
        apply_tokenizer_config(self._rust, self.config)
        try:
            self.pieces = TokenPieces(self._rust)
        except ValueError as error:
            raise BundleError(f"{path}: the tokenizer cannot be used: {error}") from error
        #: Whether special tokens written in a text are plain text, unless `encode` is told.
        self.split_special_tokens = bool(self.config.get("split_special_tokens"))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._rust.get_vocab_size()

    def encode(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool | None = None
    ) -> list[int]:
        """The ids of `text`, with bos or whatever else the checkpoint puts around a text unless told not to.

        Special tokens written in the text are taken as such; with `split_special_tokens` they are plain text. Raises
        `ConfigError` for a text that UTF-8 cannot hold.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"text: character {error.start + 1} is U+{ord(text[error.start]):04X}, half of a pair, which UTF-8 "
                "cannot hold; expected text in UTF-8"
            ) from error
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        if self._rust.encode_special_tokens != split:
            # Setting it fails while another thread encodes.
            self._rust.encode_special_tokens = split
        # As a batch of one: `encode` holds Python's lock, and so every other thread, until it is done.
        (encoding,) = self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """The ids of `text` as if there were no added tokens, special or not."""
        normalizer, pre_tokenizer = self._rust.normalizer, self._rust.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        words = [text] if pre_tokenizer is None else [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in self._rust.model.tokenize(word)]

    def added_tokens(self) -> dict[str, bool]:
        """The text of each added token, and whether it is special."""
        return {token.content: token.special for token in self._rust.get_added_tokens_decoder().values()}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens give nothing, bytes that are no UTF-8 give U+FFFD."""
        return str(self._rust.decode([int(i) for i in ids], skip_special_tokens=True))

    def stream(self, *, after: Sequence[int] = ()) -> TextStream:
        """Reads tokens as they come. Those `after` a text that has begun continue it, others begin one."""
        return TextStream(self.pieces, continues=any(self.pieces.piece(i) is not None for i in after))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds in the middle of a text; none for a special token or an id without a token."""
        piece = self.pieces.piece(int(token_id))
        return piece.encode() if isinstance(piece, str) else piece or b""

    def token_to_id(self, text: str) -> int | None:
        """The id of the token that is written so; None if there is none."""
        token: int | None = self._rust.token_to_id(text)
        return token

    def token_name(self, token_id: int) -> str | None:
        """How the tokenizer's file writes a token; None for an id without a token."""
        name: str | None = self._rust.id_to_token(token_id)
        return name

    def check_vocabulary(self, model_tokens: int, where: str) -> None:
        """Raise `BundleError` when a text can lead to ids that a model's table of `model_tokens` rows does not have.

        Added tokens beyond the table are left alone: a model that was never trained with them has no row for them,
        and a text that holds one is refused when it comes.
        """
        added = self._rust.get_added_tokens_decoder()
        ordinary = [i for i in range(model_tokens, self._last_id() + 1) if i not in added and self._rust.id_to_token(i)]
        if ordinary:
            raise BundleError(
                f"{where}: has {self.vocab_size} tokens, the model has {model_tokens}; {len(ordinary)} of those beyond "
                f"are ordinary text, such as {self._rust.id_to_token(ordinary[0])!r}",
                hint="the tokenizer is another model's, or the model's table was cut",
            )
        if beyond := [i for i in self.encode("") if i >= model_tokens]:
            raise BundleError(f"{where}: begins every text with token {beyond[0]}, the model has {model_tokens}")

    def num_beyond(self, model_tokens: int) -> int:
        """Number of tokens that a table of `model_tokens` rows does not have."""
        return sum(self._rust.id_to_token(i) is not None for i in range(model_tokens, self._last_id() + 1))

    def _last_id(self) -> int:
        """The largest id, where the ordinary tokens have the first ones without a gap, as models do."""
        return max([self._rust.get_vocab_size() - 1, *self._rust.get_added_tokens_decoder()])


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a bundle. Raises `BundleError` when it cannot be read or knows more tokens than the model."""
    path = bundle.path / TOKENIZER_NAME
    tokenizer = Tokenizer(path)
    tokenizer.check_vocabulary(bundle.model.vocab_size, str(path))
    return tokenizer
