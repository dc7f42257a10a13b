"""Tokenizers of GGUF: the ids that llama.cpp expects of known vocabularies, and ours back again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

from ryot.errors import CheckpointError, ExportError
from ryot.models.sources.checkpoint import Checkpoint
from ryot.models.sources.gguf_file import GgufFile
from ryot.models.sources.gguf_tokenizer import tokenizer_from_metadata
from ryot.models.sources.gguf_vocabulary import vocabulary_metadata
from ryot.models.sources.opening import open_checkpoint
from ryot.models.sources.write_gguf import write_gguf
from tests.models.sources.tiny import TEXTS

HARD = (
    "",
    " ",
    "  two  spaces ",
    "tab\tnew\nline\r\n\r\n\n",
    "it's I'LL you'Re",
    "3.14159 1234567",
    "def f(x):\n    return x ** 2\n",
    "naïve café \u0065\u0301",
    "日本語 中文 한국어 العربية עברית हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪",
    "\x00\x01\x7f\u200b\ufeff",
    "<|im_end|> <|end_of_text|>",
)

#: The vocabularies of decoders that are read in a few seconds; command-r and gemma-4 take ten each and pass too.
VOCABULARIES = (
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "phi-3",
    "qwen2",
    "qwen35",
    "refact",
    "starcoder",
)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_known_vocabularies_give_the_ids_that_llama_cpp_expects(name: str, llama_cpp_source: Path) -> None:
    path = llama_cpp_source / "models" / f"ggml-vocab-{name}.gguf"
    tokenizer = Tokenizer.from_str(tokenizer_from_metadata(GgufFile(path)).files["tokenizer.json"].decode())
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = path.with_suffix(".gguf.out").read_text().split("\n")
    assert len(texts) >= 46
    for text, line in zip(texts, lines):
        assert tokenizer.encode(text, add_special_tokens=False).ids == [int(token) for token in line.split()], text


def test_smollm2_speaks_its_own_chat(smollm2_gguf: Path) -> None:
    """Ids by transformers' tests of SmolLM2: the template's markers are single tokens and digits stand alone."""
    checkpoint = open_checkpoint(str(smollm2_gguf))
    tokenizer = Tokenizer.from_str(checkpoint.files["tokenizer.json"].decode())
    ids = tokenizer.encode("<|im_start|>user\n42<|im_end|>").ids
    assert ids[0] == 1 and ids[-1] == 2
    assert tokenizer.decode(ids[1:-1]) == "user\n42"
    assert len(ids[1:-1]) == 4
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert b"<|im_start|>" in checkpoint.files["chat_template.jinja"]


def test_a_byte_level_tokenizer_comes_back_the_same(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_checkpoint(str(family_folder("llama")))
    write_gguf(source, tmp_path / "model.gguf", "F16")
    back = open_checkpoint(str(tmp_path / "model.gguf"))
    ours, theirs = (Tokenizer.from_str(c.files["tokenizer.json"].decode()) for c in (back, source))
    for text in HARD:
        ids = theirs.encode(text).ids
        assert ours.encode(text).ids == ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)
    assert back.files["chat_template.jinja"] == source.files["chat_template.jinja"]
    config = json.loads(back.files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<|begin_of_text|>", "<|end_of_text|>")


def sentencepiece_like() -> Tokenizer:
    """BPE with byte fallback whose every pair of tokens that makes a third is a merge, best first."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def complete(spec: dict) -> dict:  # type: ignore[type-arg]
    """The same vocabulary with SentencePiece's merges."""
    vocab = spec["model"]["vocab"]
    words = [token for token in sorted(vocab, key=vocab.get) if vocab[token] >= 259]
    known = set(words)
    spec["model"]["merges"] = [
        [word[:cut], word[cut:]] for word in words for cut in range(1, len(word)) if {word[:cut], word[cut:]} <= known
    ]
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < 3]
    return spec


def with_tokenizer(checkpoint: Checkpoint, text: str) -> Checkpoint:
    return Checkpoint(
        where=checkpoint.where,
        kind=checkpoint.kind,
        config={**checkpoint.config, "bos_token_id": 1, "eos_token_id": 2},
        generation_config={},
        files={"tokenizer.json": text.encode()},
        tensors=checkpoint.tensors,
        digest=checkpoint.digest,
    )


def cut_to(spec: dict, size: int) -> dict:  # type: ignore[type-arg]
    """The first `size` tokens, and the merges among them."""
    model = spec["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < size}
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= model["vocab"].keys()]
    return spec


def with_runs_of_spaces(spec: dict) -> dict:  # type: ignore[type-arg]
    """Gemma's way: runs are added tokens, and are merged before all else, the longest first."""
    runs = ["▁" * length for length in (4, 3, 2)]
    for index, run in enumerate(runs, 317):
        spec["model"]["vocab"][run] = index
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        spec["added_tokens"].append({"id": index, "content": run, **flags})
    merges = [[run[:cut], run[cut:]] for run in runs for cut in range(1, len(run))]
    spec["model"]["merges"] = merges + spec["model"]["merges"]
    return spec


@pytest.mark.parametrize("runs", [False, True])
def test_a_sentencepiece_like_tokenizer_comes_back_the_same(
    runs: bool, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    spec = complete(json.loads(sentencepiece_like().to_str()))
    spec = with_runs_of_spaces(cut_to(spec, 317)) if runs else cut_to(spec, 320)
    source = with_tokenizer(open_checkpoint(str(family_folder("llama"))), json.dumps(spec))
    write_gguf(source, tmp_path / "model.gguf", "F16")
    tokens = GgufFile(tmp_path / "model.gguf").metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list) and (tokens[319] == "  ") == runs
    back = open_checkpoint(str(tmp_path / "model.gguf"))
    ours, theirs = (Tokenizer.from_str(c.files["tokenizer.json"].decode()) for c in (back, source))
    for text in (*HARD, *("\n".join("a" + " " * n + "the" for n in range(12)).split("\n")), " " * 9):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids, text
        assert ours.decode(ids) == theirs.decode(ids)


def test_merges_that_scores_cannot_say_are_refused(family_folder: Callable[[str], Path]) -> None:
    spec = complete(json.loads(sentencepiece_like().to_str()))
    spec["model"]["merges"] = spec["model"]["merges"][:-1] + spec["model"]["merges"][:1]
    checkpoint = with_tokenizer(open_checkpoint(str(family_folder("llama"))), json.dumps(spec))
    with pytest.raises(ExportError, match="not those of SentencePiece"):
        vocabulary_metadata(checkpoint, 400)


def test_a_vocabulary_larger_than_the_table_is_refused(family_folder: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(str(family_folder("llama")))
    with pytest.raises(CheckpointError, match=r"has id 31\d, and the embedding has 310 rows"):
        vocabulary_metadata(checkpoint, 310)


def test_a_table_larger_than_the_vocabulary_is_padded(family_folder: Callable[[str], Path]) -> None:
    metadata = vocabulary_metadata(open_checkpoint(str(family_folder("llama"))), 325)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(types, list)
    assert tokens[-1] == "[PAD324]" and types[-5:] == [5] * 5 and types[319] == 3


def test_a_pre_tokenizer_without_a_name_is_refused(family_folder: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(str(family_folder("llama")))
    spec = json.loads(checkpoint.files["tokenizer.json"])
    spec["pre_tokenizer"]["add_prefix_space"] = True
    with pytest.raises(ExportError, match="its pre-tokenizer has no name in GGUF"):
        vocabulary_metadata(with_tokenizer(checkpoint, json.dumps(spec)), 320)


def test_added_text_tokens_keep_their_kind(family_folder: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(str(family_folder("llama")))
    tokenizer = Tokenizer.from_str(checkpoint.files["tokenizer.json"].decode())
    tokenizer.add_tokens([AddedToken("日本語タグ", special=False, normalized=False)])
    metadata = vocabulary_metadata(with_tokenizer(checkpoint, tokenizer.to_str()), 321)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(types, list)
    assert tokens[320] == "日本語タグ" and types[320] == 4
