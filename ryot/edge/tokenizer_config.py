"""What stands beside `tokenizer.json`: named special tokens and switches, applied as transformers applies them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from ryot.errors import BundleError
from ryot.models.token_ids import TokenIds, Vocabulary, read_token_ids, token_text

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
#: Where checkpoints of before 2024 name their special tokens.
SPECIAL_TOKENS_NAME = "special_tokens_map.json"
#: The special tokens that have a name, which is also what chat templates call them.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_tokenizer_config(folder: Path) -> dict[str, object]:
    """The values of a folder's `tokenizer_config.json`; empty without one. Raises `BundleError` for invalid JSON."""
    config = read_json(folder / TOKENIZER_CONFIG_NAME)
    if "added_tokens_decoder" not in config:
        config |= read_json(folder / SPECIAL_TOKENS_NAME)
    return config


def load_token_ids(folder: Path, tokenizer: Vocabulary, *, vocab_size: int) -> TokenIds:
    """The bos, eos and pad ids that the files of a checkpoint folder say; raises as `read_token_ids` does."""
    return read_token_ids(
        read_json(folder / "config.json"),
        read_json(folder / "generation_config.json"),
        read_tokenizer_config(folder),
        tokenizer,
        vocab_size=vocab_size,
        where=str(folder),
    )


def named_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """The text of each special token that has a name."""
    found = {name: token_text(config.get(name)) for name in NAMED_TOKENS}
    return {name: text for name, text in found.items() if text is not None}


def apply_tokenizer_config(tokenizer: RustTokenizer, config: Mapping[str, object]) -> None:
    """Make `tokenizer` what transformers makes of it for plain text: nothing cut or padded, all added tokens there.

    Tokens are added that the config lists and `tokenizer.json` does not have so; named ones are special. What stands
    around a text is left to `tokenizer.json`: beside it `add_bos_token` counts for nothing, in transformers 5 too.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special, extra = _special_texts(config)
    present = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    written = {repr(token) for token in present.values()}
    wanted = present | {token.content: token for token in _listed_tokens(config)}
    for text in (*special, *extra):
        wanted.setdefault(text, AddedToken(text, special=True))
    for text in special:
        wanted[text].special = True
    if new := [token for token in wanted.values() if repr(token) not in written]:
        tokenizer.add_tokens(new)


def _listed_tokens(config: Mapping[str, object]) -> list[AddedToken]:
    """The tokens of `added_tokens_decoder` in the order of their ids."""
    listed = config.get("added_tokens_decoder", {})
    try:
        if not isinstance(listed, Mapping):
            raise TypeError(f"got {type(listed).__name__}")
        return [AddedToken(**fields) for _, fields in sorted(listed.items(), key=lambda item: int(item[0]))]
    except (TypeError, ValueError) as error:
        raise BundleError(
            f"{TOKENIZER_CONFIG_NAME}: added_tokens_decoder: expected a table of tokens by their ids ({error})"
        ) from error


def _special_texts(config: Mapping[str, object]) -> tuple[list[str], list[str]]:
    """The tokens that are special whatever `tokenizer.json` says, and those that are if it does not have them.

    The former have a name, a key that ends in `_token`, or one in a table of further ones; the latter stand in a list.
    """
    named = [token_text(value) for key, value in config.items() if key.endswith("_token")]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    if isinstance(extra, Mapping):
        named += [token_text(value) for value in extra.values()]
    listed = [token_text(value) for value in extra] if isinstance(extra, list) else []
    return [text for text in named if text is not None], [text for text in listed if text is not None]


def read_json(path: Path) -> dict[str, object]:
    """The table in a JSON file; empty where there is no file. Raises `BundleError` for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise BundleError(f"{path}: expected a JSON table, got {type(values).__name__}")
    return values
