"""The ids that begin, end and pad a text: the checkpoint's own, read from its files. Nothing assumes id 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from ryot.errors import CheckpointError


class TokenIds(NamedTuple):
    """What a checkpoint says; `None` or an empty tuple where it says nothing."""

    bos: int | None
    """Begins a text."""
    eos: tuple[int, ...]
    """Each of these ends a text."""
    pad: int | None

    @property
    def separator(self) -> int | None:
        """What stands in front of each text where texts follow each other, as in training and scoring."""
        return self.eos[0] if self.bos is None and self.eos else self.bos


class Vocabulary(Protocol):
    """What is asked of a tokenizer; `tokenizers.Tokenizer` has it."""

    def token_to_id(self, token: str) -> int | None: ...


def read_token_ids(
    config: Mapping[str, object],
    generation_config: Mapping[str, object],
    tokenizer_config: Mapping[str, object],
    tokenizer: Vocabulary,
    *,
    vocab_size: int,
    where: str,
) -> TokenIds:
    """The ids of a checkpoint from the values of its files; an absent file is an empty mapping.

    For each of bos, eos and pad the first that says something counts: `generation_config.json`, `config.json`, then
    the token that `tokenizer_config.json` names. eos may be a list. A negative pad id, as some old checkpoints have
    it, means none. Raises `CheckpointError`, naming key and file, for an id that is no whole number or that the
    model's table of `vocab_size` rows does not have, and for a named token without an id.
    """
    sources = (("generation_config.json", generation_config), ("config.json", config))

    def ids(kind: str) -> tuple[int, ...]:
        key = f"{kind}_token_id"
        for file, values in sources:
            if (value := values.get(key)) is not None:
                found = _checked_ids(value, f"{where}: {file}: {key}", allow_negative=kind == "pad")
                break
        else:
            file, key = "tokenizer_config.json", f"{kind}_token"
            if (text := token_text(tokenizer_config.get(key))) is None:
                return ()
            if (token := tokenizer.token_to_id(text)) is None:
                raise CheckpointError(f"{where}: {file}: {key} is {text!r}, which the tokenizer has no id for")
            found = (token,)
        for token in found:
            if token >= vocab_size:
                raise CheckpointError(
                    f"{where}: {file}: {key} is {token}, expected an id below the model's vocabulary of {vocab_size}"
                )
        return found

    return TokenIds(bos=_first(ids("bos")), eos=ids("eos"), pad=_first(ids("pad")))


def token_text(value: object) -> str | None:
    """The text of a special token as `tokenizer_config.json` writes it: a string, or a table with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _checked_ids(value: object, where: str, *, allow_negative: bool) -> tuple[int, ...]:
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    found = []
    for item in values:
        if type(item) is not int or (item < 0 and not allow_negative):
            raise CheckpointError(f"{where} is {item!r}, expected a token id")
        if item >= 0:
            found.append(item)
    return tuple(dict.fromkeys(found))


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None
