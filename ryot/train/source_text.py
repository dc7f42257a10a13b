"""The text side of a model that a training takes over: tokenizer, token ids, chat template, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from ryot.config import digest
from ryot.edge.chat import ChatTemplate, has_chat_template, load_chat_template
from ryot.edge.tokenizer_config import apply_tokenizer_config, load_token_ids, read_tokenizer_config
from ryot.errors import CheckpointError
from ryot.models.sources.checkpoint import Checkpoint
from ryot.models.token_ids import TokenIds
from ryot.scratch import scratch_folder
from ryot.train.tokenizer import END_OF_TEXT_ID

_TOKENIZER = "tokenizer.json"

#: The ids of a tokenizer that was learned here.
OWN_IDS = TokenIds(bos=END_OF_TEXT_ID, eos=(END_OF_TEXT_ID,), pad=END_OF_TEXT_ID)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceText:
    """How texts become ids and what is written around them."""

    tokenizer: Tokenizer
    token_ids: TokenIds
    template: ChatTemplate | None
    files: Mapping[str, bytes]
    """What a checkpoint holds of it, by name; empty for a tokenizer that was learned here."""
    where: str
    """What messages call it."""

    @property
    def sha256(self) -> str:
        """Of everything that decides which ids a text becomes."""
        return digest({name: data.hex() for name, data in self.files.items()}, list(self.token_ids))


def read_source_text(checkpoint: Checkpoint, vocab_size: int) -> SourceText:
    """The text side of a checkpoint whose table has `vocab_size` rows.

    Raises `CheckpointError` when it has no tokenizer or one with more tokens than the table has rows.
    """
    if _TOKENIZER not in checkpoint.files:
        raise CheckpointError(f"checkpoint {checkpoint.where}: {_TOKENIZER} is missing")
    files = dict(checkpoint.files)
    if checkpoint.generation_config:
        files["generation_config.json"] = _json(checkpoint.generation_config)
    with scratch_folder("text") as folder:
        for name, data in {**files, "config.json": _json(checkpoint.config)}.items():
            (folder / name).write_bytes(data)
        config = read_tokenizer_config(folder)
        tokenizer = load_foreign_tokenizer(folder)
        if tokenizer.get_vocab_size(with_added_tokens=False) > vocab_size:
            raise CheckpointError(
                f"checkpoint {checkpoint.where}: the tokenizer has {tokenizer.get_vocab_size()} tokens, "
                f"expected at most the table's {vocab_size}"
            )
        return SourceText(
            tokenizer=tokenizer,
            token_ids=load_token_ids(folder, tokenizer, vocab_size=vocab_size),
            template=load_chat_template(folder, config) if has_chat_template(folder, config) else None,
            files=files,
            where=checkpoint.where,
        )


def load_foreign_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, with the tokens that `tokenizer_config.json` adds."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
    except Exception as error:  # tokenizers raises nothing more precise
        raise CheckpointError(f"checkpoint {folder}: {_TOKENIZER} cannot be read ({error})") from error
    apply_tokenizer_config(tokenizer, read_tokenizer_config(folder))
    return tokenizer


def _json(values: Mapping[str, object]) -> bytes:
    return (json.dumps(dict(values), indent=2, sort_keys=True) + "\n").encode()
