"""Text to ids in pieces: the same ids as of the whole, in bounded memory, with progress told."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ryot.train import encoding
from ryot.train.corpus import Corpus, Document
from ryot.train.dataset import Dataset, prepare_dataset
from ryot.train.encoding import cut_pieces, encode_stream, tell_progress
from ryot.train.tokenizer import END_OF_TEXT_ID, encode_texts, train_tokenizer

HARD = "  def f(x):\n\n\t return 'it''s'  +  \"größe  日本語 🙂\"  # don't\r\n...\n   \n 12 345,6 x=(1)\n"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are cut everywhere they can be, and encoded a few pieces at a time."""
    monkeypatch.setattr(encoding, "PIECE_CHARS", 1)
    monkeypatch.setattr(encoding, "_BATCH_CHARS", 20)
    monkeypatch.setattr(encoding, "_CONTEXT_CHARS", 8)


def sentence_piece_like() -> Tokenizer:
    """A tokenizer that marks the beginning of a text, so that no text may be cut."""
    vocab = {token: i for i, token in enumerate(["<unk>", *"▁abcdefgh", "▁a", "▁b", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b"), ("a", "b")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", ["ours", "llama 3", "sentencepiece"])
def test_a_text_in_pieces_has_the_ids_of_the_whole(dataset: Dataset, kind: str) -> None:
    tokenizer = Tokenizer.from_str(dataset.tokenizer.to_str())
    if kind == "llama 3":
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    elif kind == "sentencepiece":
        tokenizer = sentence_piece_like()
    texts = [HARD * 3, "", "ab a ba b", HARD[::-1], "a"]
    expected = [i for text in texts for i in (0, *tokenizer.encode(text, add_special_tokens=False).ids)]
    assert np.concatenate(list(encode_stream(tokenizer, texts, 0))).tolist() == expected
    pieces = list(cut_pieces(HARD * 3, lambda t: tokenizer.encode(t, add_special_tokens=False).ids))
    assert "".join(pieces) == HARD * 3
    assert len(pieces) == 1 if kind == "sentencepiece" else len(pieces) > 20


@pytest.mark.usefixtures("small_pieces")
def test_a_vocabulary_learned_from_pieces_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch, corpus: Corpus) -> None:
    texts = corpus.texts("test")
    in_pieces = train_tokenizer(texts, 400).to_str()
    monkeypatch.setattr(encoding, "PIECE_CHARS", 1 << 30)
    assert train_tokenizer(texts, 400).to_str() == in_pieces


def test_no_text_is_no_tokens(dataset: Dataset) -> None:
    assert encode_texts(dataset.tokenizer, []).tolist() == []
    assert encode_texts(dataset.tokenizer, [""]).tolist() == [END_OF_TEXT_ID]


def test_encoding_takes_at_most_eight_bytes_of_memory_per_byte_of_text(tmp_path: Path) -> None:
    # Two sizes, so that what does not grow with the text is left out. 41 bytes were needed.
    program = """
import resource, sys
from pathlib import Path
from ryot.train.corpus import load_corpus
from ryot.train.dataset import prepare_dataset
for file in sys.argv[2:]:
    prepare_dataset(load_corpus([file]), 300, Path(sys.argv[1]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    words = " ".join(f"{'abcdefghijklmnop'[i % 16]}{i * 7919 % 10_003}" for i in range(10_000)).ljust(70_001)
    sizes = (1_000_000, 5_000_000)
    for size in sizes:
        (tmp_path / f"{size}.txt").write_text((words * (size // len(words) + 1))[:size])
    files = [tmp_path / f"{size}.txt" for size in sizes]
    done = subprocess.run([sys.executable, "-c", program, tmp_path, *files], capture_output=True, text=True, check=True)
    small, large = map(int, done.stdout.split())
    assert (large - small) / (sizes[1] - sizes[0]) < 8


def test_progress_is_told_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(encoding.time, "monotonic", lambda: next(now))
    told: list[str] = []
    texts = ["x" * 1_000_000] * 12
    assert list(tell_progress(texts, len, "encoding", told.append)) == texts
    assert told == ["encoding, 5 of 12 M characters, 7 s left", "encoding, 10 of 12 M characters, 2 s left"]


def test_preparing_a_corpus_tells_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, corpus: Corpus, tmp_path: Path
) -> None:
    monkeypatch.setattr(encoding, "TELL_EVERY_S", 0.0)
    told: list[str] = []
    small = Corpus("small", tuple(Document(d.name, d.text[:2000]) for d in corpus.documents))
    prepare_dataset(small, 300, tmp_path, on_progress=told.append)
    begins = {line.partition(",")[0] for line in told}
    assert begins == {"learning a vocabulary", *(f"encoding the {s} split" for s in ("train", "val", "test"))}


def test_a_signal_ends_the_learning_of_a_vocabulary() -> None:
    program = """
import itertools
from ryot.train.tokenizer import train_tokenizer
def texts():
    for i in itertools.count():
        yield f"word {i}"
        if i == 1000:
            print("learning", flush=True)
train_tokenizer(texts(), 300)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True) as learning:
        assert learning.stdout is not None and learning.stdout.readline() == "learning\n"
        learning.send_signal(signal.SIGINT)
        try:
            _, said = learning.communicate(timeout=60)
        finally:
            learning.kill()
    assert said.strip().endswith("KeyboardInterrupt")
