"""The page's tokenizer beside Python's: equal ids and equal text, on strings that are hard to cut."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ryot.edge.text_stream import TextStream, TokenPieces
from ryot.edge.tokenizer_config import apply_tokenizer_config
from tests.edge.tiny_bundle import TEXT
from tests.models.sources.tiny import TEXTS

from .conftest import Run

HARD = [
    *("", " ", "  ", "\n", "\n\n\n", "\t\t  x", "\r", "\n \n", "a\n b", "end ", " lead", "A B  C   D    E", " " * 130),
    *(
        "I'm you're WE'LL they've can't 'S 'd",
        "don’t “quotes” — dash…",
        "ſtrange I'ſ ﬁ ligature Ⅻ ㎏",
        "ẞß ŉ ǰ İı ǅ Ǆ ǆ",
    ),
    *("3.14159 1234567890 ²³ ½ ٣٤٥ Ⅷ ０１２３", "mixed123abc456", "v1.2.3-rc4 HTTPServer2Go", "=====----____****"),
    *(
        "日本語のテキスト、漢字かな交じり",
        "مرحبا بالعالم שלום",
        "हिन्दी \u0915\u094d\u0937 ไทย",
        "Grüße naïve cafe\u0301 A\u030a \u1e9b\u0323",
    ),
    *("🙂🙃👨‍👩‍👧‍👦🏳️‍🌈 e\u200d", "𝔘𝔫𝔦 𓀀 \U0010ffff\uffff", "\u00a0n\u2003em\u3000i\u200bz\ufeffb\u0085n\u2028l\x1cf"),
    *(
        "a\u0000b\u0001\u007f\u0080",
        "▁under▁score _ ▁",
        "<0x41><0x0A>",
        "Ġhello Ċ",
        "def f(x):\n    return x  # c\n\n\n\tpass\r\n\r\nend",
    ),
    *(
        "<s>a</s>",
        "x <mask> y<mask>",
        "word<word>word <word> .",
        "A<N>B <n> ＜N＞",
        "<|a|><|ab|><|abc",
        "x" * 300,
        "ab" * 200,
    ),
]
_RANGES = (
    (0x20, 0x7E),
    (0xA0, 0x24F),
    (0x300, 0x36F),
    (0x600, 0x6FF),
    (0x2000, 0x206F),
    (0x4E00, 0x5200),
    (0x1F300, 0x1F6FF),
    (9, 13),
)
_random = random.Random(0)
HARD += [
    "".join(chr(_random.randint(*_random.choice(_RANGES))) for _ in range(_random.randint(1, 40))) for _ in range(150)
]

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: As cl100k has it, with possessive quantifiers; the class in it holds a bracket and a hyphen besides.
POSSESSIVE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"|[\[\]\-]+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s+"
)


def byte_level(*pre: pre_tokenizers.PreTokenizer, **options: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    stages = [*pre, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pre)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(stages)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<s>"],
    )
    tokenizer.train_from_iterator([TEXT, *TEXTS], trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def metaspace(scheme: str, split: bool) -> Tokenizer:
    tokenizer = sentencepiece_like()
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme=scheme), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def with_added_tokens() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True), AddedToken("</s>", rstrip=True)])
    tokenizer.add_tokens(
        [
            *(AddedToken(text, normalized=False) for text in ("<|a|>", "<|ab|>", "<|abc")),
            AddedToken("<word>", single_word=True),
            AddedToken("<N>", normalized=True),
        ]
    )
    return tokenizer


def unknown_is_kept() -> Tokenizer:
    """Characters instead of bytes, so that some are in no token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.Digits(individual_digits=False)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("_", " "), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


KINDS = {
    "gpt2": lambda: byte_level(),
    "llama3": lambda: byte_level(split(LLAMA3), ignore_merges=True),
    "possessive": lambda: byte_level(split(POSSESSIVE, "removed", True)),
    "digits": lambda: byte_level(
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Punctuation("isolated"),
        split(r"\p{Han}+|\s\d|\S\w", "merged_with_next"),
    ),
    "previous": lambda: byte_level(split(" ", "merged_with_previous"), split(r"[aeiou]{2,}?x?", "contiguous")),
    "sentencepiece": sentencepiece_like,
    "metaspace": lambda: metaspace("first", True),
    "metaspace-always": lambda: metaspace("always", False),
    "added": with_added_tokens,
    "unknown": unknown_is_kept,
}

ENCODE_AND_DECODE = """
    const { Tokenizer } = modules;
    const tokenizer = new Tokenizer(await (await fetch(spec)).json(), config);
    return texts.map(text => {
      const ids = tokenizer.encode(text);
      return [ids, tokenizer.decode(ids), tokenizer.encode(text, {addSpecialTokens: false})];
    });
"""


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_pythons(kind: str, run_module: Run, site: Path) -> None:
    tokenizer = KINDS[kind]()
    (site / f"{kind}.json").write_text(tokenizer.to_str())
    found = run_module(ENCODE_AND_DECODE, spec=f"{kind}.json", texts=HARD, config={})
    pieces = TokenPieces(tokenizer)
    for text, (ids, decoded, plain) in zip(HARD, found, strict=True):
        assert ids == tokenizer.encode(text).ids, text
        assert plain == tokenizer.encode(text, add_special_tokens=False).ids, text
        stream = TextStream(pieces)
        assert decoded == "".join(stream.push(i) for i in ids) + stream.finish(), text


def test_tokens_that_only_the_config_names_are_added(run_module: Run, site: Path) -> None:
    tokenizer = byte_level()
    (site / "plain.json").write_text(tokenizer.to_str())
    tool = {"content": "<tool>", "special": False, "normalized": False}
    config = {"eos_token": {"content": "<|end|>"}, "added_tokens_decoder": {"364": tool}, "pad_token": "<s>"}
    ((ids, decoded, _),) = run_module(ENCODE_AND_DECODE, spec="plain.json", texts=["a<|end|><tool>b<s>"], config=config)
    apply_tokenizer_config(tokenizer, config)
    assert ids == tokenizer.encode("a<|end|><tool>b<s>").ids
    assert decoded == "a<tool>b"


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece"),
        ({"normalizer": {"type": "StripAccents"}}, "StripAccents"),
        ({"pre_tokenizer": {"type": "UnicodeScripts"}}, "UnicodeScripts"),
        ({"decoder": {"type": "WordPiece"}}, "WordPiece"),
        ({"post_processor": {"type": "BertProcessing"}}, "BertProcessing"),
    ],
)
def test_what_would_give_other_ids_is_refused(part: dict[str, object], name: str, run_module: Run) -> None:
    spec = json.loads(byte_level().to_str()) | part
    code = "const { Tokenizer } = modules; try { new Tokenizer(spec); } catch (e) { return e.message; }"
    message = run_module(code, spec=spec)
    assert name in message and "tokenizer.json" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3", "qwen2", "qwen35", "starcoder"],
)
def test_real_vocabularies_give_pythons_ids(name: str, llama_cpp_source: Path, run_module: Run, site: Path) -> None:
    from ryot.models.sources.gguf_file import GgufFile
    from ryot.models.sources.gguf_tokenizer import tokenizer_from_metadata

    files = tokenizer_from_metadata(GgufFile(llama_cpp_source / "models" / f"ggml-vocab-{name}.gguf")).files
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    (site / f"{name}.json").write_bytes(files["tokenizer.json"])
    found = run_module(ENCODE_AND_DECODE, spec=f"{name}.json", texts=HARD, config={})
    for text, (ids, decoded, _) in zip(HARD, found, strict=True):
        expected = tokenizer.encode(text).ids
        assert ids == expected, text
        assert decoded == tokenizer.decode(expected), text
