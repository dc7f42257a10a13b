"""What stands beside `tokenizer.json`: named special tokens and switches, applied as transformers applies them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as RustTokenizer

from ryot.errors import BundleError
from ryot.models.token_ids import token_text

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


def named_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """The text of each special token that has a name."""
    found = {name: token_text(config.get(name)) for name in NAMED_TOKENS}
    return {name: text for name, text in found.items() if text is not None}


def apply_tokenizer_config(tokenizer: RustTokenizer, config: Mapping[str, object]) -> None:
    """Make `tokenizer` what transformers makes of it for plain text: added tokens, bos and eos, no cutting or padding.

    `add_bos_token` or `add_eos_token`, where either is given, replaces the post-processor of `tokenizer.json`.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_tokens(tokenizer, config)
    if "add_bos_token" in config or "add_eos_token" in config or tokenizer.post_processor is None:
        _set_template(tokenizer, config)


def _add_tokens(tokenizer: RustTokenizer, config: Mapping[str, object]) -> None:
    """Add what the config lists and `tokenizer.json` does not have so; named tokens are special."""
    named = named_tokens(config)
    present = tokenizer.get_added_tokens_decoder().values()
    written = {repr(token) for token in present}
    listed = config.get("added_tokens_decoder")
    new = []
    if isinstance(listed, Mapping):
        for _, fields in sorted(listed.items(), key=lambda item: int(item[0])):
            token = AddedToken(**fields)
            if repr(token) not in written:
                token.special = token.special or token.content in named.values()
                new.append(token)
    contents = {token.content for token in present} | {token.content for token in new}
    for text in (*named.values(), *_extra_tokens(config)):
        if text not in contents:
            new.append(AddedToken(text, special=True))
            contents.add(text)
    if new:
        tokenizer.add_tokens(new)


def _extra_tokens(config: Mapping[str, object]) -> list[str]:
    """Special tokens without a name."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    if isinstance(extra, Mapping):
        extra = extra.values()
    assert isinstance(extra, (list, tuple)) or hasattr(extra, "__iter__")
    return [text for text in map(token_text, extra) if text is not None]


def _set_template(tokenizer: RustTokenizer, config: Mapping[str, object]) -> None:
    """Put bos before and eos behind every text, as far as the config asks for them and names them."""
    around = {}
    for kind in ("bos", "eos"):
        text = token_text(config.get(f"{kind}_token"))
        if config.get(f"add_{kind}_token") and text is not None:
            around[kind] = text
    pieces = [f"{around['bos']}:0"] if "bos" in around else []
    pieces.append("$A:0")
    pieces += [f"{around['eos']}:0"] if "eos" in around else []
    ids = [(text, tokenizer.token_to_id(text)) for text in dict.fromkeys(around.values())]
    tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=ids)


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
