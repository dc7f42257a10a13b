"""How each byte-level BPE cuts text into words before it merges: what GGUF names, tokenizer.json spells out.

GGUF's `tokenizer.ggml.pre` is a name; the patterns are those of the models' own tokenizer.json files, where the name's
model has one, else of llama.cpp's table (read 2026-11-26).
"""

from __future__ import annotations

from dataclasses import dataclass

from ryot.models.sources.checkpoint import Json

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED_WORDS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS}|{_TAIL}"
_QWEN35 = rf"{_CONTRACTIONS}|{_MARKED_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SIGNS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SIGNS_SLASH}|{_TAIL}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SIGNS_SLASH}|{_TAIL}"
_CJK = "[一-龥ࠀ-一가-\ud7ff]+"

_NFC: Json = {"type": "NFC"}


def _split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _digits(individual: bool) -> Json:
    return {"type": "Digits", "individual_digits": individual}


def _bytes(use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


@dataclass(frozen=True, kw_only=True, slots=True)
class PreTokenizer:
    """`steps` are tokenizer.json's pre-tokenizers; with `ignore_merges` a whole word in the vocabulary is one token."""

    steps: tuple[Json, ...]
    normalizer: Json = None
    ignore_merges: bool = False
    add_bos: bool = False

    def json(self) -> Json:
        return self.steps[0] if len(self.steps) == 1 else {"type": "Sequence", "pretokenizers": list(self.steps)}


_GPT2 = PreTokenizer(steps=(_bytes(True),))
_GPT2_NFC = PreTokenizer(steps=(_bytes(True),), normalizer=_NFC)
_DIGITS = PreTokenizer(steps=(_digits(True), _bytes(True)))
_LLAMA_BPE = PreTokenizer(steps=(_split(_LLAMA3), _bytes(False)), ignore_merges=True, add_bos=True)
_QWEN = PreTokenizer(steps=(_split(_QWEN2), _bytes(False)), normalizer=_NFC)

#: By GGUF's name. Of names that mean the same the first is the one that is written.
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "jais": _GPT2,
    "mpt": _GPT2_NFC,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "command-r": PreTokenizer(steps=_DIGITS.steps, normalizer=_NFC),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "falcon3": _LLAMA_BPE,
    "lfm2": _LLAMA_BPE,
    "smaug-bpe": PreTokenizer(steps=_LLAMA_BPE.steps),
    "dbrx": PreTokenizer(steps=_LLAMA_BPE.steps),
    "qwen2": _QWEN,
    "deepseek-r1-qwen": _QWEN,
    "megrez": _QWEN,
    "stablelm2": _QWEN,
    "qwen35": PreTokenizer(steps=(_split(_QWEN35), _bytes(False))),
    "tekken": PreTokenizer(steps=(_split(_TEKKEN), _bytes(False)), ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizer(steps=(_split(_GPT4O), _bytes(False))),
    "llama4": PreTokenizer(steps=(_split(_GPT4O), _bytes(False))),
    "falcon": PreTokenizer(
        steps=(
            {"type": "Punctuation", "behavior": "Contiguous"},
            _bytes(True),
            _digits(False),
            _split("[0-9][0-9][0-9]"),
        )
    ),
    "deepseek-coder": PreTokenizer(
        steps=(
            _split(r"[\r\n]"),
            _split(r"\s?\p{L}+"),
            _split(r"\s?\p{P}+"),
            _split(_CJK),
            _digits(True),
            _bytes(False),
        )
    ),
    "deepseek-llm": PreTokenizer(
        steps=(
            _split(r"[\r\n]"),
            _split(r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"),
            _split("\\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            _split(r"\s+$"),
            _split(_CJK),
            _digits(True),
            _bytes(False),
        )
    ),
}


def pre_tokenizer_name(pre_tokenizer: Json, ignore_merges: bool) -> str | None:
    """GGUF's name for what a tokenizer.json does before its merges; None when it has none."""
    wanted = _comparable(pre_tokenizer)
    alike = [name for name, known in PRE_TOKENIZERS.items() if _comparable(known.json()) == wanted]
    exact = [name for name in alike if PRE_TOKENIZERS[name].ignore_merges == ignore_merges]
    return next(iter(exact or alike), None)


def _comparable(value: Json) -> list[Json]:
    """The steps without what changes no token: offsets, and a sequence of one."""
    if not isinstance(value, dict):
        return [value]
    inner = value.get("pretokenizers")
    if value.get("type") == "Sequence" and isinstance(inner, list):
        return [step for item in inner for step in _comparable(item)]
    step = {key: item for key, item in value.items() if key != "trim_offsets"}
    if (step.get("behavior"), step.get("invert")) == ("Removed", True):
        # Removing what no pattern matches and keeping the matches is the same, for patterns that match everything.
        step |= {"behavior": "Isolated", "invert": False}
    return [step]
