"""Small tokenizers of every kind that is supported, as folders that transformers reads too."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TRAINING_TEXT = (
    "def add(a, b):\n    return a + b\n\n\nclass Naïve:\n\t'''Grüße, 日本語, Привет'''\n",
    "The quick brown fox jumps over the lazy dog. It's 3.14, isn't it?\r\n",
    "one two  three   four    five\n",
) * 3
SPECIALS = ("<s>", "</s>", "<|turn|>")


def byte_level(*, bos: bool = False) -> Tokenizer:
    """As in GPT-2 and Qwen, with `bos` as in Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("日本語タグ", "    ", "<think>")])
    return _with_bos(tokenizer) if bos else tokenizer


def sentencepiece(style: str) -> Tokenizer:
    """BPE with byte fallback: `prepend` as in Llama 2, `metaspace` as transformers 5 writes it, `plain` as in Gemma."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style == "plain":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif style == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        to_text.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        to_text.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(to_text)
    names = ["<unk>", *SPECIALS, *BYTE_NAMES]
    trainer = trainers.BpeTrainer(vocab_size=500, max_token_length=12, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return _with_bos(_bytes_not_special(tokenizer))


def unigram() -> Tokenizer:
    """Unigram with Metaspace on both sides, as in XGLM; unknown characters are lost."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", *SPECIALS], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def unigram_bytes() -> Tokenizer:
    """Unigram with byte fallback, as SentencePiece's own default with that switch."""
    pieces = [("<unk>", 0.0), *((text, 0.0) for text in SPECIALS), *((name, -20.0) for name in BYTE_NAMES)]
    learned = json.loads(unigram().to_str())["model"]["vocab"]
    pieces += [(text, score) for text, score in learned if text not in ("<unk>", *SPECIALS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", *SPECIALS)])
    return tokenizer


BYTE_NAMES = [f"<0x{byte:02X}>" for byte in range(256)]
KINDS = {
    "byte level": byte_level,
    "byte level, bos": lambda: byte_level(bos=True),
    "prepend": lambda: sentencepiece("prepend"),
    "metaspace": lambda: sentencepiece("metaspace"),
    "gemma": lambda: sentencepiece("plain"),
    "unigram": unigram,
    "unigram, bytes": unigram_bytes,
}


def write_tokenizer_folder(folder: Path, tokenizer: Tokenizer, **config: object) -> Path:
    """`tokenizer.json` and what transformers needs beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def _bytes_not_special(tokenizer: Tokenizer) -> Tokenizer:
    # The trainer knows no other way to put them into the vocabulary.
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] not in BYTE_NAMES]
    return Tokenizer.from_str(json.dumps(values))


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    bos = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s>:0 $A:0", special_tokens=bos)
    return tokenizer
