"""What a device will do with a checkpoint's text, tried out before its weights are touched."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ryot.deploy.bundle import write_checkpoint_files
from ryot.deploy.quality import WINDOW_TOKENS
from ryot.edge.bundle import TOKENIZER_NAME
from ryot.edge.chat import has_chat_template, load_chat_template
from ryot.edge.tokenizer import Tokenizer
from ryot.edge.tokenizer_config import load_token_ids
from ryot.errors import BundleError, ConfigError, ExportError
from ryot.models.sources.checkpoint import Checkpoint
from ryot.models.spec import DecoderSpec
from ryot.models.token_ids import TokenIds
from ryot.scratch import scratch_folder
from ryot.train.checkpoint import load_tokenizer
from ryot.train.corpus import Corpus
from ryot.train.dataset import HeldOutText
from ryot.train.records import RecordEncoder
from ryot.train.source_text import read_source_text

log = logging.getLogger(__name__)

#: Texts with which tokenizers and streams have gone wrong: scripts, sequences, marks, controls, newlines, spaces, code.
HARD_STRINGS = (
    "",
    "Hello, world!",
    " one space before",
    "  two before, two after  ",
    "\n",
    " \t \n  \r\n ",
    "a\nb\r\nc\rd\n\n\ne",
    "line\u2028paragraph\u2029next\u0085line\u000bvertical\u000cfeed",
    "don't I'll we've it's O'Neill 'quoted' \"double\"",
    "1234567890 3.14159e-10 0x7f 1,000,000 ½ ² ٣",
    "Grüße, naïve café, Žluťoučký kůň, İstanbul ıspanak",
    "Ελληνικά Русский Українська Հայերեն ქართული",
    "日本語のテキスト、漢字とカタカナ。简体中文 繁體中文",
    "한국어 텍스트 조합 \u1112\u1161\u11ab",
    "नमस्ते दुनिया বাংলা தமிழ் తెలుగు සිංහල",
    "สวัสดีชาวโลก ພາສາລາວ ភាសាខ្មែរ မြန်မာ བོད་ཡིག",
    "مرحبا بالعالم שלום עולם ܫܠܡܐ ދިވެހި",
    "ሰላም ልዑል ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ ⵜⴰⵎⴰⵣⵉⵖⵜ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𒀀𒁀 𓀀𓁐 𐍈 𠮷",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 1️⃣ 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f 🙂🙃",
    "e\u0301 n\u0303 a\u0328\u0301 Z\u0337\u0322\u0321\u035da\u0337\u0301lgo",
    "\u200bzero\u200cwidth\u200djoin\u2060\u00adsoft\ufeffbom \u202eright to left\u202c",
    "\x00\x01\x08\x1b[31mred\x1b[0m\x7f",
    "\ufffd \ufffe \uffff \U0010ffff \ue000",
    "def f(x: int) -> dict:\n    return {'a': [x, *range(3)]}  # ok?\n\n\nclass A:\n\tpass\n",
    "if (a&&b||!c) { return `${x}`; } // <b>&amp;</b>\n",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\dir\\file.txt",
    "a" * 100 + " " * 40 + "=" * 80,
    "word " * 30,
    "▁literal▁underline▁",
    "Ġbyte level Ċ names ä <0x0A> <0xE4>",
    "<s> </s> <unk> <pad> <bos> <eos> <|endoftext|> <|im_start|>user\nhi<|im_end|>",
    "<|begin_of_text|> <|eot_id|> <start_of_turn>model\nhi<end_of_turn>",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextCheck:
    """What was found out; goes into the manifest's provenance."""

    token_ids: TokenIds
    num_tokens: int
    """Of the tokenizer, added ones included."""
    num_unreachable: int
    """Added tokens that the model's table has no row for; a text that holds one is refused on the device."""
    num_strings: int
    num_lossless: int
    """Of these strings, how many come back from their ids unchanged."""
    chat_template: bool


def check_text(checkpoint: Path, *, vocab_size: int) -> TextCheck:
    """Try a checkpoint folder's tokenizer, token ids and chat template as the device will use them.

    `vocab_size` is the number of rows of the model's table. Raises `ExportError` for a tokenizer that cannot be read
    or streamed, that gives ids beyond the table for ordinary text, or with a template that jinja2 cannot read;
    `CheckpointError` for a bos, eos or pad id beyond the table.
    """
    try:
        tokenizer = Tokenizer(checkpoint / TOKENIZER_NAME)
        num_unreachable = _check_table(tokenizer, checkpoint / TOKENIZER_NAME, vocab_size)
        chat_template = _check_template(checkpoint, tokenizer.config)
        token_ids = load_token_ids(checkpoint, tokenizer, vocab_size=vocab_size)
    except BundleError as error:
        raise ExportError(str(error), hint=error.hint) from error
    if not token_ids.eos:
        log.warning("%s: no token ends a text; generation stops at the length asked for", checkpoint)
    num_lossless = _check_stream(tokenizer, checkpoint)
    return TextCheck(
        token_ids=token_ids,
        num_tokens=tokenizer.vocab_size,
        num_unreachable=num_unreachable,
        num_strings=len(HARD_STRINGS),
        num_lossless=num_lossless,
        chat_template=chat_template,
    )


def _check_table(tokenizer: Tokenizer, path: Path, vocab_size: int) -> int:
    """Number of added tokens beyond the table. Raises `BundleError` when there are others."""
    tokenizer.check_vocabulary(vocab_size, str(path))
    return tokenizer.num_beyond(vocab_size)


def _check_template(checkpoint: Path, config: Mapping[str, object]) -> bool:
    """Whether there is a chat template; one that refuses a plain question, or cannot be tried, is warned of."""
    if not has_chat_template(checkpoint, config):
        return False
    try:
        load_chat_template(checkpoint, config).render([{"role": "user", "content": "Hello"}])
    except ConfigError as error:
        log.warning("%s: the chat template was not tried out: %s", checkpoint, error)
    return True


def _check_stream(tokenizer: Tokenizer, checkpoint: Path) -> int:
    """How many of the strings come back unchanged. Raises `ExportError` if a stream gives other text than decoding."""
    num_lossless = 0
    for text in HARD_STRINGS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        stream = tokenizer.stream()
        streamed = "".join(stream.push(i) for i in ids) + stream.finish()
        if streamed != (decoded := tokenizer.decode(ids)):
            raise ExportError(
                f"checkpoint {checkpoint}: the tokenizer cannot be streamed: the tokens of {text[:30]!r} give "
                f"{streamed[:30]!r} one at a time, {decoded[:30]!r} together"
            )
        num_lossless += streamed == text
    return num_lossless


def open_text(checkpoint: Checkpoint, corpus: Corpus, spec: DecoderSpec) -> HeldOutText:
    """A corpus under the tokenizer of a checkpoint, for scoring; each of its texts begins as the checkpoint's do.

    Raises `ExportError` for a tokenizer that cannot be used, `CheckpointError` for token ids beyond the table, and
    `DataError` for a corpus that is too short to score on.
    """
    with scratch_folder("tokenizer") as folder:
        write_checkpoint_files(checkpoint, folder)
        token_ids = check_text(folder, vocab_size=spec.vocab_size).token_ids
        tokenizer = load_tokenizer(folder)
    records = RecordEncoder(read_source_text(checkpoint, spec.vocab_size)) if corpus.has_records else None
    text = HeldOutText(corpus, tokenizer, token_ids.separator, records)
    text.check_sequences(min(spec.max_seq_len, WINDOW_TOKENS))
    return text


def compare_text(checkpoint: Path) -> list[str]:
    """What ids, texts and chats of a checkpoint folder are other than in transformers, in words.

    transformers must be installed. Raises what it raises when it cannot read the tokenizer.
    """
    from transformers import AutoTokenizer

    tokenizer = Tokenizer(checkpoint / TOKENIZER_NAME)
    other = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    differences = []
    for text in HARD_STRINGS:
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special)
            theirs = other(text, add_special_tokens=special)["input_ids"]
            if ids != theirs:
                differences.append(f"ids of {text[:30]!r} are {ids[:8]}, {type(other).__name__} has {theirs[:8]}")
                break
        else:
            if tokenizer.decode(ids) != other.decode(ids, skip_special_tokens=True):
                differences.append(f"text of the ids of {text[:30]!r}")
    if has_chat_template(checkpoint, tokenizer.config):
        differences += _compare_chat(tokenizer, checkpoint, other)
    return differences


def _compare_chat(tokenizer: Tokenizer, checkpoint: Path, other: object) -> list[str]:
    """What differs in a chat of three messages, and of one."""
    said = [{"role": "user", "content": " a\n<b> "}, {"role": "assistant", "content": "c"}]
    found = []
    for messages in ([*said, {"role": "user", "content": "d"}], said[:1]):
        try:
            ours = load_chat_template(checkpoint, tokenizer.config).render(messages)
        except ConfigError:
            continue  # was warned of
        theirs = other.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # type: ignore[attr-defined]
        if ours != theirs:
            found.append(f"chat of {len(messages)} messages is {ours[:40]!r}…, expected {theirs[:40]!r}…")
    return found
