"""Ids, text and streams of every kind of tokenizer, judged by transformers on the same folder."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TextIteratorStreamer

from ryot.deploy.text_check import HARD_STRINGS
from ryot.edge.text_stream import TextStream, TokenPieces
from ryot.edge.tokenizer import Tokenizer
from ryot.errors import BundleError, ConfigError

from .tokenizer_kinds import KINDS, byte_level, sentencepiece, write_tokenizer_folder


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"), KINDS[request.param]())


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module", params=[AutoTokenizer, PreTrainedTokenizerFast], ids=["auto", "fast"])
def reference(request: pytest.FixtureRequest, folder: Path) -> Any:
    return request.param.from_pretrained(folder)


def stream_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join(stream.push(i) for i in ids) + stream.finish()


def streamed_by_transformers(reference: Any, ids: list[int]) -> str:
    streamer = TextIteratorStreamer(reference, skip_special_tokens=True)
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return "".join(streamer)


@pytest.mark.parametrize("options", [{}, {"add_special_tokens": False}, {"split_special_tokens": True}], ids=str)
def test_ids_and_text_are_those_of_transformers(tokenizer: Tokenizer, reference: Any, options: dict[str, Any]) -> None:
    for text in HARD_STRINGS:
        ids = tokenizer.encode(text, **options)
        assert ids == reference(text, **options)["input_ids"], text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True), text


def test_a_stream_ends_with_the_text_that_transformers_streams(tokenizer: Tokenizer, reference: Any) -> None:
    for text in HARD_STRINGS:
        ids = tokenizer.encode(text)
        assert stream_text(tokenizer, ids) == tokenizer.decode(ids), text
        if not text.startswith((" ", "▁")):  # its streamer decodes parts of a text, which loses a space at their start
            assert stream_text(tokenizer, ids) == streamed_by_transformers(reference, ids), text


def test_no_piece_of_a_stream_holds_a_part_of_a_character(tokenizer: Tokenizer) -> None:
    for text in HARD_STRINGS:
        decoded, stream, so_far = tokenizer.decode(ids := tokenizer.encode(text)), tokenizer.stream(), ""
        for token in ids:
            so_far += stream.push(token)
            assert decoded.startswith(so_far), text


def test_any_ids_give_the_text_that_the_tokenizer_gives_for_all_of_them(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(300):
        # Few enough byte tokens that runs of them hold no whole character before a fault.
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(12)]
        if not _fault_behind_a_character(tokenizer, ids):
            assert stream_text(tokenizer, ids) == tokenizer.decode(ids), ids


def _fault_behind_a_character(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Whether a run of byte tokens is no UTF-8 but begins so."""
    if tokenizer.pieces.decoding.byte_level:
        return False
    runs, run = [], b""
    for token in [*ids, None]:
        piece = None if token is None else tokenizer.pieces.piece(token)
        if isinstance(piece, bytes):
            run += piece
        elif token is None or piece is not None:
            runs, run = [*runs, run], b""
    return any("\ufffd" in r.decode(errors="replace") and r.decode(errors="replace")[0] != "\ufffd" for r in runs if r)


@pytest.mark.parametrize(
    ("names", "streamed"),
    [
        (["<0xE6>", "<0x97>", "<0xA5>"], ["", "", "日"]),
        (["<0xE6>", "<0x97>", "a"], ["", "", "\ufffd\ufffda"]),
        (["<0xE6>", "<0x97>", "<0xE6>", "<0x97>", "<0xA5>"], ["", "", "\ufffd" * 3, "\ufffd", "\ufffd"]),
        (["<0xFF>", "<0x61>", "a", "<0x61>"], ["\ufffd", "\ufffd", "a", "a"]),
        (["<0xF0>", "<0x9F>", "</s>", "<0x99>", "<0x82>"], ["", "", "", "", "🙂"]),
        (["▁", "▁", "a"], ["", " ", "a"]),
        (["</s>", "▁", "a"], ["", "", "a"]),
    ],
)
def test_a_run_of_byte_tokens_is_a_text_or_a_replacement_for_each(names: list[str], streamed: list[str]) -> None:
    rust = sentencepiece("prepend")
    ids = [rust.token_to_id(name) for name in names]
    stream = TextStream(TokenPieces(rust))
    assert [stream.push(i) for i in ids] == streamed
    assert "".join(streamed) == rust.decode(ids)


def test_whole_characters_before_a_fault_stay(tmp_path: Path) -> None:
    """The one difference from decoding afterwards, which loses them: they have been shown."""
    rust = sentencepiece("prepend")
    tokenizer = Tokenizer(write_tokenizer_folder(tmp_path, rust) / "tokenizer.json")
    ids = [rust.token_to_id(name) for name in ("<0xC3>", "<0xBC>", "<0xFF>", "a")]
    assert stream_text(tokenizer, ids) == "ü\ufffda"
    assert tokenizer.decode(ids) == "\ufffd" * 3 + "a"


def test_a_continued_text_keeps_its_first_space(tokenizer: Tokenizer) -> None:
    text = "The quick brown"
    ids = tokenizer.encode(text)
    for cut in range(len(ids)):
        stream = tokenizer.stream(after=ids[:cut])
        assert tokenizer.decode(ids[:cut]) + "".join(stream.push(i) for i in ids[cut:]) == text


def with_decoder(decoder: decoders.Decoder | None) -> RustTokenizer:
    values = json.loads(byte_level().to_str())
    values["decoder"] = None if decoder is None else json.loads(decoder.__getstate__())
    return RustTokenizer.from_str(json.dumps(values))


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (None, "it has no decoder"),
        (decoders.WordPiece(), "its decoder WordPiece cannot"),
        (decoders.BPEDecoder(), "its decoder BPEDecoder cannot"),
        (decoders.CTC(), "its decoder CTC cannot"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]), r"its decoder Fuse \+ Replace cannot"),
        (
            decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
            r"its decoder ByteFallback \+ Fuse \+ Strip cannot",
        ),
        (decoders.Sequence([decoders.Replace("a", "b")]), "its decoder Replace cannot"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_decoder_that_does_not_read_each_token_by_itself_is_refused(
    tmp_path: Path, decoder: decoders.Decoder | None, named: str
) -> None:
    path = write_tokenizer_folder(tmp_path, with_decoder(decoder)) / "tokenizer.json"
    with pytest.raises(BundleError, match=f"{path}: the tokenizer cannot be used: {named}"):
        Tokenizer(path)


def test_text_that_utf8_cannot_hold_is_refused_in_one_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"text: character 3 is U\+D800, half of a pair"):
        tokenizer.encode("ab\ud800")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pad_token": "[PAD]"},
        {"image_token": "<think>"},
        {"extra_special_tokens": {"image_token": "<think>"}},
        {"eos_token": {"content": "<think>", "__type": "AddedToken"}},
        {"additional_special_tokens": ["<think>", "<new>"]},
        {"added_tokens_decoder": {"405": {"content": "<think>", "special": True}}},
        {"split_special_tokens": True},
        {"add_bos_token": True, "add_eos_token": True},
    ],
    ids=str,
)
def test_tokens_of_the_config_are_read_as_transformers_reads_them(tmp_path: Path, config: dict[str, Any]) -> None:
    rust = byte_level()
    rust.enable_truncation(4)
    rust.enable_padding(pad_token="</s>")
    folder = write_tokenizer_folder(tmp_path, rust, **config)
    tokenizer, reference = Tokenizer(folder / "tokenizer.json"), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("a <think> b</think> and <new> [PAD] and <s> much more", "<think>"):
        ids = tokenizer.encode(text)
        assert ids == reference(text)["input_ids"]
        assert stream_text(tokenizer, ids) == reference.decode(ids, skip_special_tokens=True)


def test_special_tokens_of_old_checkpoints_have_a_file_of_their_own(tmp_path: Path) -> None:
    folder = write_tokenizer_folder(tmp_path, byte_level())
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<new>"}}))
    tokenizer, reference = Tokenizer(folder / "tokenizer.json"), PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer.encode("<new>a<s>")
    assert ids == reference("<new>a<s>")["input_ids"]
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True) == "a"


def test_a_config_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = write_tokenizer_folder(tmp_path, byte_level(), added_tokens_decoder=[1])
    with pytest.raises(BundleError, match="added_tokens_decoder: expected a table of tokens by their ids"):
        Tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(BundleError, match=r"tokenizer_config\.json: cannot be read"):
        Tokenizer(folder / "tokenizer.json")


def test_tokens_beyond_the_models_table_may_be_added_ones_only(tmp_path: Path) -> None:
    rust = byte_level()
    rust.add_tokens([AddedToken("<image>", special=True)])
    tokenizer = Tokenizer(write_tokenizer_folder(tmp_path, rust) / "tokenizer.json")
    ordinary = rust.token_to_id("<s>")
    for rows in (ordinary, tokenizer.vocab_size - 1, tokenizer.vocab_size, 2 * tokenizer.vocab_size):
        tokenizer.check_vocabulary(rows, "t")
    assert tokenizer.num_beyond(tokenizer.vocab_size - 1) == 1
    with pytest.raises(
        BundleError, match=rf"t: has {tokenizer.vocab_size} tokens, the model has 300; {ordinary - 300} of"
    ):
        tokenizer.check_vocabulary(300, "t")


def test_other_threads_go_on_while_a_long_text_is_encoded(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer_folder(tmp_path, byte_level()) / "tokenizer.json")
    text, spans, ticks = "def add(a, b): return a + b\n" * 4000, [], []

    def encode() -> None:
        began = time.perf_counter()
        tokenizer.encode(text)
        spans.append((began, time.perf_counter()))

    thread = threading.Thread(target=encode)
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
    ((began, ended),) = spans
    # Had it held Python's lock, nothing would have run in the middle of it.
    middle = (ended - began) / 4
    assert any(began + middle < tick < ended - middle for tick in ticks)
