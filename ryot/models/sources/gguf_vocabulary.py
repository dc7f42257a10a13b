"""GGUF's vocabulary, from a checkpoint's tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise

from gguf import TokenType
from tokenizers import Tokenizer

from ryot.errors import CheckpointError, ExportError
from ryot.models.sources.checkpoint import Checkpoint, Json
from ryot.models.sources.gguf_file import Value
from ryot.models.sources.pretokenizers import pre_tokenizer_name

_PREFIX = "tokenizer.ggml"
_SPACE = "▁"


def vocabulary_metadata(checkpoint: Checkpoint, vocab_size: int) -> dict[str, Value]:
    """The tokenizer as GGUF's metadata, one entry for each of the table's `vocab_size` rows.

    Raises `ExportError` for a kind of tokenizer that llama.cpp would read otherwise than it is meant.
    """
    where = checkpoint.where
    if "tokenizer.json" not in checkpoint.files:
        raise CheckpointError(f"checkpoint {where}: tokenizer.json is missing")
    spec = json.loads(checkpoint.files["tokenizer.json"])
    model = spec["model"]
    if model.get("type") != "BPE":
        raise ExportError(f"checkpoint {where}: its tokenizer is {model.get('type')}, expected BPE for GGUF")
    added = {int(token["id"]): token for token in spec.get("added_tokens", ())}
    tokens, types = _tokens(model["vocab"], added, vocab_size, where)
    metadata: dict[str, Value] = {f"{_PREFIX}.tokens": tokens}
    if _has(spec.get("pre_tokenizer"), "ByteLevel"):
        metadata |= _byte_level(spec, where)
    elif model.get("byte_fallback"):
        metadata |= _sentencepiece_like(spec, tokens, types, where)
    else:
        raise ExportError(f"checkpoint {where}: its BPE has neither bytes nor byte fallback, expected one for GGUF")
    metadata[f"{_PREFIX}.token_type"] = types
    return metadata | _special(checkpoint, tokens)


def _tokens(
    vocab: Mapping[str, int], added: Mapping[int, dict[str, Json]], vocab_size: int, where: str
) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, index in [*vocab.items(), *((str(token["content"]), index) for index, token in added.items())]:
        if index >= vocab_size:
            raise CheckpointError(
                f"checkpoint {where}: token {token!r} has id {index}, and the embedding has {vocab_size} rows"
            )
        tokens[index] = token
        types[index] = int(TokenType.NORMAL)
    for index, entry in added.items():
        types[index] = int(TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED)
    return tokens, types


def _byte_level(spec: Mapping[str, Json], where: str) -> dict[str, Value]:
    model, normalizer = spec["model"], spec.get("normalizer")
    assert isinstance(model, dict)
    name = pre_tokenizer_name(spec.get("pre_tokenizer"), bool(model.get("ignore_merges")))
    if name is None:
        raise ExportError(
            f"checkpoint {where}: its pre-tokenizer has no name in GGUF ({json.dumps(spec.get('pre_tokenizer')):.200})"
        )
    # llama.cpp normalizes nothing; NFC changes only text that is not composed yet.
    if normalizer is not None and not (isinstance(normalizer, dict) and normalizer.get("type") == "NFC"):
        raise ExportError(f"checkpoint {where}: its normalizer has no place in GGUF ({json.dumps(normalizer):.200})")
    merges = [f"{left} {right}" for left, right in _merges(model)]
    return {f"{_PREFIX}.model": "gpt2", f"{_PREFIX}.pre": name, f"{_PREFIX}.merges": merges}


def _sentencepiece_like(spec: Mapping[str, Json], tokens: list[str], types: list[int], where: str) -> dict[str, Value]:
    """Scores in place of merges. llama.cpp joins any two tokens that make a third, best score first; that is what the
    merges say if they hold every such pair, and all pairs of a token in a row."""
    model = spec["model"]
    assert isinstance(model, dict)
    merges = _merges(model)
    normal = {token for token, kind in zip(tokens, types) if kind == TokenType.NORMAL and not _is_byte(token)}
    # Tokens that are added (Gemma's runs of white space) are found before anything is merged.
    order = [left + right for left, right in merges if left + right in normal]
    first = {token: rank for rank, token in reversed(list(enumerate(order)))}
    pairs = sum(t[:cut] in normal and t[cut:] in normal for t in normal for cut in range(1, len(t)))
    turns = sum(before != after for before, after in pairwise(order)) + bool(order)
    if len(order) < pairs or turns != len(first):
        raise ExportError(
            f"checkpoint {where}: its merges are not those of SentencePiece, which GGUF keeps as scores",
            hint="--to hf keeps them",
        )
    unknown = model.get("unk_token")
    for index, token in enumerate(tokens):
        if _is_byte(token) and types[index] != TokenType.UNUSED:
            types[index] = int(TokenType.BYTE)
        elif token == unknown:
            types[index] = int(TokenType.UNKNOWN)
        elif types[index] == TokenType.USER_DEFINED:
            tokens[index] = token.replace(_SPACE, " ")
    prefix = _has(spec.get("normalizer"), "Prepend") or _has(spec.get("pre_tokenizer"), "Metaspace")
    return {
        f"{_PREFIX}.model": "llama",
        f"{_PREFIX}.pre": "default",
        f"{_PREFIX}.scores": [-float(first[token]) if token in first else -float(len(order)) for token in tokens],
        f"{_PREFIX}.add_space_prefix": prefix,
    }


def _special(checkpoint: Checkpoint, tokens: list[str]) -> dict[str, Value]:
    settings = json.loads(checkpoint.files.get("tokenizer_config.json", b"{}"))

    def id_of(name: str) -> int | None:
        value = checkpoint.generation_config.get(f"{name}_token_id", checkpoint.config.get(f"{name}_token_id"))
        if isinstance(value, list):
            value = value[0] if value else None
        if value is None:
            token = settings.get(f"{name}_token")
            content = token.get("content") if isinstance(token, dict) else token
            value = tokens.index(content) if content in tokens else None
        return value if isinstance(value, int) else None

    metadata: dict[str, Value] = {}
    for name, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (index := id_of(name)) is not None and 0 <= index < len(tokens):
            metadata[f"{_PREFIX}.{stored}_token_id"] = index
    ends = checkpoint.generation_config.get("eos_token_id", checkpoint.config.get("eos_token_id"))
    if isinstance(ends, list):
        for end, stored in zip(ends[1:], ("eot", "eom")):
            if isinstance(end, int):
                metadata[f"{_PREFIX}.{stored}_token_id"] = end
    bos = metadata.get(f"{_PREFIX}.bos_token_id")
    ids = Tokenizer.from_str(checkpoint.files["tokenizer.json"].decode()).encode("a").ids
    metadata[f"{_PREFIX}.add_bos_token"] = bool(ids) and ids[0] == bos
    metadata[f"{_PREFIX}.add_eos_token"] = False
    template = checkpoint.files.get("chat_template.jinja", b"").decode() or settings.get("chat_template")
    if isinstance(template, str):
        metadata["tokenizer.chat_template"] = template
    return metadata


def _merges(model: Mapping[str, Json]) -> list[tuple[str, str]]:
    """A model's merges, which older files write as one string each."""
    merges = model.get("merges")
    assert isinstance(merges, list)
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    return [(str(pair[0]), str(pair[1])) for pair in pairs if isinstance(pair, list)]


def _has(value: Json, kind: str) -> bool:
    """Whether a step of this type is among the steps of a normalizer or pre-tokenizer."""
    if isinstance(value, dict):
        return value.get("type") == kind or any(_has(item, kind) for item in value.values())
    return isinstance(value, list) and any(_has(item, kind) for item in value)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
