"""The C program's token ids are those of `tokenizers`, on texts that tokenizers trip over."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ryot.edge.tokenizer import Tokenizer as PythonTokenizer
from tests.edge.tiny_bundle import write_manifest
from tests.edge.tokenizer_kinds import KINDS, SPECIALS, TRAINING_TEXT, write_tokenizer_folder

from .native import Library, Native

# Llama 3's, Qwen 2's and GPT-4o's expressions, GPT-4's kind with possessive parts, and what else can be written.
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENDINGS}?"
PATTERNS = {
    "llama 3": rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}",
    "qwen 2": rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}",
    "gpt-4o": rf"{CASED}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "possessive": r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "odd ones": r"\w+?(?=\W)|(?<=\d)[a-f]|[^\S\r\n]{2,4}|\d{2}?x|\d{2,3}?|(?:ab ?){2,}+c|(?:a|ab)+?(?!b)|\D",
}


def split_by(pattern: str, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return _trained(tokenizer)


def smollm() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return _trained(tokenizer)


def prefix_space() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=True)])
    return _trained(tokenizer)


def metaspace_split() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIALS], show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def _trained(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer.add_tokens(
        [
            AddedToken("<|left|>", lstrip=True, normalized=False),
            AddedToken("<|right|>", rstrip=True, normalized=False),
            AddedToken("Gr\u00fc\u00df", normalized=True),
            AddedToken("    ", normalized=False),
        ]
    )
    return tokenizer


MORE_KINDS: dict[str, Callable[[], Tokenizer]] = {
    **{name: lambda pattern=pattern: split_by(pattern) for name, pattern in PATTERNS.items()},
    "qwen 2, NFC": lambda: split_by(PATTERNS["qwen 2"], normalizers.NFC()),
    "smollm": smollm,
    "prefix space": prefix_space,
    "metaspace, split": metaspace_split,
}
BPE_KINDS = {name: make for name, make in KINDS.items() if "unigram" not in name} | MORE_KINDS

HARD_TEXTS = [
    "",
    " ",
    "\n",
    "\0",
    "a\0b",
    "  leading and trailing  ",
    "tabs\t\tand\r\nlines\r\r\n\n\n  \n x",
    "can't CAN'T we'Ll he'D 'S '\u017f it's3.14isn't",
    "123456789 1 12 123 1234 \u0663\u0664 \u2167 \u00bd x\u00b2",
    "def f(x):\n    return x  # caf\u00e9\n\n\n\nclass A:\n\tpass\n",
    "Grüße Gru\u0308ße ṩ s\u0323\u0307 s\u0307\u0323 가 각 क़ Ω Å",
    "日本語のテスト。\u3000全角 ไทย हिन\u094dदी \u05e2\u05d1\u05e8\u05d9\u05ea",
    "🙂🙃 👨\u200d👩\u200d👧 \U0001f1e9\U0001f1ea \u200b\u00a0\u2003\u2028\u2029\x85\x1c\x1f",
    "<s>Hi</s> <|turn|>\n<s><s>  <|turn|>x<think> y    z <|left|> a  <|left|><|right|>  b<|right|> 日本語タグ",
    "<unk><0x41><0xff> \u2581 \u2581\u2581a \u2581",
    "\ufeffBOM \ufffd \U0010ffff \ue000 \u0378 \U00031350 \U000105c9",
    "a" * 3000,
    " " * 1000,
    "ab " * 500,
    "one two  three   four    five" * 3,
]


def random_texts(seed: int, count: int) -> list[str]:
    """Pieces of the texts above, and characters from everywhere, in a row."""
    rng = random.Random(seed)
    everywhere = [*range(0x20, 0x250), *range(0x300, 0x370), 0x9, 0xA, 0xD, 0x2581, 0x3000, *range(0x4E00, 0x4E20)]
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 12)):
            if rng.random() < 0.5:
                text = rng.choice(HARD_TEXTS[3:])
                start = rng.randrange(len(text))
                parts.append(text[start : start + rng.randrange(1, 12)])
            else:
                code = rng.choice(everywhere) if rng.random() < 0.8 else rng.randrange(0x110000)
                parts.append("?" if 0xD800 <= code < 0xE000 else chr(code))
        texts.append("".join(parts))
    return texts


def write_tokenizer_bundle(bundle: Path, folder: Path, tokenizer: Tokenizer, **config: object) -> Path:
    """A copy of a bundle, less its tables, with this tokenizer; it is for encoding alone."""
    folder.mkdir()
    for path in bundle.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    write_tokenizer_folder(folder, tokenizer, **config)
    model = json.loads((folder / "ryot_manifest.json").read_text())["model"] | {"vocab_size": 1 << 20}
    write_manifest(folder, model=model, golden=[])
    return folder


def assert_same(native: Library, python: PythonTokenizer, texts: list[str]) -> None:
    for text in texts:
        for split in (False, True):
            got = native.encode(text, split_special_tokens=split)
            assert got == python.encode(text, split_special_tokens=split), (text, split)


@pytest.fixture(scope="module")
def tiny(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle()


@pytest.mark.parametrize("kind", BPE_KINDS)
def test_ids_are_those_of_python(kind: str, native: Native, tiny: Path, tmp_path: Path):
    folder = write_tokenizer_bundle(tiny, tmp_path / "bundle", BPE_KINDS[kind]())
    encoder = native.open(folder)
    assert_same(encoder, PythonTokenizer(folder / "tokenizer.json"), HARD_TEXTS + random_texts(1, 400))
    encoder.close()


def test_every_character_is_split_as_in_python(native: Native, tiny: Path, tmp_path: Path):
    """Each with what may join it, so that categories, spaces and normal forms of all are compared."""
    folder = write_tokenizer_bundle(tiny, tmp_path / "bundle", split_by(PATTERNS["gpt-4o"], normalizers.NFC()))
    encoder, python = native.open(folder), PythonTokenizer(folder / "tokenizer.json")
    codes = [code for code in range(0x32400) if not 0xD800 <= code < 0xE000 and unicodedata.category(chr(code)) != "Co"]
    for first in range(0, len(codes), 500):
        text = "".join(f"a{chr(code)}B1{chr(code)}\u0323" for code in codes[first : first + 500])
        assert encoder.encode(text) == python.encode(text), hex(codes[first])
    encoder.close()


def test_what_stands_beside_the_tokenizer_counts(native: Native, tiny: Path, tmp_path: Path):
    folder = write_tokenizer_bundle(
        tiny,
        tmp_path / "bundle",
        BPE_KINDS["byte level"](),
        eos_token={"content": "<|end|>"},
        extra_special_tokens=["<think>", "<|new|>"],
        added_tokens_decoder={"900": {"content": "<|listed|>", "rstrip": True}, "20": {"content": "<|first|>"}},
        split_special_tokens=True,
    )
    encoder, python = native.open(folder), PythonTokenizer(folder / "tokenizer.json")
    for text in ("<s> a<|end|>  b<think><|new|><|listed|>  c<|first|></s>", "<|first|>", "<|end|>"):
        assert encoder.encode(text) == python.encode(text)
    assert python.token_to_id("<|first|>") in encoder.encode("x<|first|>")
    encoder.close()


@pytest.mark.parametrize("kind", ["unigram", "unigram, bytes"])
def test_a_kind_that_is_not_known_is_refused_by_name(kind: str, native: Native, tiny: Path, tmp_path: Path):
    folder = write_tokenizer_bundle(tiny, tmp_path / "bundle", KINDS[kind]())
    done = native.run(folder, "--ids", stdin=b"x")
    assert done.returncode == 1
    error = (
        f"Error: {folder}/tokenizer.json: the model is Unigram, this program knows BPE\nhint: use the bundle's run.py\n"
    )
    assert done.stderr.decode() == error
