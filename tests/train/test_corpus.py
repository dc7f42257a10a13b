from __future__ import annotations

import json
import resource
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ryot.config import digest
from ryot.errors import ConfigError, DataError
from ryot.train import text_store
from ryot.train.corpus import SPLITS, Corpus, Document, cut_document, load_corpus
from ryot.train.dataset import Dataset, HeldOutText, load_dataset, prepare_dataset
from ryot.train.records import Chat, Pair
from ryot.train.tokenizer import END_OF_TEXT_ID, TOKENIZER_RECIPE

ANSWER = {"role": "assistant", "content": "ja"}


def test_default_corpus_is_the_standard_library_split_92_4_4() -> None:
    corpus = load_corpus()
    sizes = {s: sum(len(t.encode()) for t in corpus.texts(s)) for s in SPLITS}
    total = sum(sizes.values())
    assert total > 8_000_000
    assert 0.88 < sizes["train"] / total < 0.96
    assert not any("site-packages" in d.name or "/test/" in f"/{d.name}" for d in corpus.documents)
    assert [d.name for d in corpus.documents] == sorted(d.name for d in corpus.documents)


def test_shards_hold_the_text_and_nothing_else(corpus: Corpus, dataset: Dataset) -> None:
    ids = dataset.tokens("val").astype(np.int64)
    assert (ids == END_OF_TEXT_ID).sum() == len(corpus.texts("val"))
    assert dataset.tokenizer.decode(ids.tolist()) == "".join(corpus.texts("val"))
    assert dataset.byte_lengths[ids].sum() == sum(len(t.encode()) for t in corpus.texts("val"))


def test_shards_are_found_again_by_content(corpus: Corpus, dataset: Dataset) -> None:
    again, cached = prepare_dataset(corpus, dataset.vocab_size, dataset.path.parent.parent)
    assert cached and again.path == dataset.path
    changed = Corpus(name=corpus.name, documents=corpus.documents[:-1])
    assert changed.sha256 != corpus.sha256


def test_files_folders_globs_and_json_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/one.txt").write_text("one\n" * 2000)
    (tmp_path / "a/.hidden").write_bytes(b"\0")
    (tmp_path / "two.jsonl").write_text('{"text": "zwei"}\n\n{"text": "drei"}\n')
    texts = [d.text for d in load_corpus([str(tmp_path / "a"), str(tmp_path / "*.jsonl")]).documents]
    assert "".join(texts) == "one\n" * 2000 + "zwei" + "drei"
    assert len(texts) > 3  # few documents are cut into blocks, so that each split gets some


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no files"),
        ({"x.txt": b""}, "holds no text"),
        ({"x.bin": b"\x7fELF\0\0"}, r"x\.bin is a binary file, expected UTF-8 text"),
        ({"x.txt": b"gr\xfc\xdfe"}, r"x.txt line 1 is not UTF-8 \(byte 0xfc at offset 2\)"),
        ({"x.jsonl": b'{"body": "x"}\n'}, "line 1 has no string field 'text'"),
        ({"x.jsonl": b"{\n"}, "line 1 is not JSON"),
    ],
)
def test_text_that_cannot_be_used_is_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_corpus([str(tmp_path)])


def test_a_copy_goes_where_the_first_one_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "\n".join(f"line {i} of a text that is there twice" for i in range(4000))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(text)
    corpus = load_corpus([str(tmp_path)])
    held = {split: set(corpus.texts(split)) for split in SPLITS}
    assert all(held.values())
    assert not held["train"] & held["test"] and not held["train"] & held["val"] and not held["val"] & held["test"]
    # By their names alone some would be in two splits.
    assert corpus.has_moved_copies
    half = len(corpus.documents) // 2
    assert corpus.num_copies == half
    assert [d.own_split for d in corpus.documents[:half]] == list(corpus.splits[:half]) == list(corpus.splits[half:])
    assert [r.getMessage() for r in caplog.records] == [
        f"data: {half} of {2 * half} documents are copies of others; each goes into the split of the first one"
    ]


def test_the_default_corpus_has_no_copy_in_two_splits() -> None:
    corpus = load_corpus()
    assert not corpus.has_moved_copies
    assert list(corpus.splits) == [d.own_split for d in corpus.documents]


def test_a_corpus_of_copies_is_too_small(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "the same"}\n' * 200)
    with pytest.raises(DataError, match=r"has 1600 characters, 199 of its 200 documents are copies, too few for a"):
        prepare_dataset(load_corpus([str(tmp_path)]), 300, tmp_path / "cache")


def test_shards_with_moved_copies_are_not_those_of_versions_that_moved_none(corpus: Corpus, tmp_path: Path) -> None:
    twice = Corpus("twice", (*corpus.documents, *(Document(f"z/{d.name}", d.text) for d in corpus.documents)))
    dataset, _ = prepare_dataset(twice, 300, tmp_path)
    of_before = digest(2, TOKENIZER_RECIPE, twice.name, twice.sha256, 300)[:16]
    assert dataset.path.name != of_before
    assert not set(twice.texts("train")) & set(twice.texts("test"))


def test_a_text_is_cut_by_copying_it_once() -> None:
    class Counted(str):
        copied = 0

        def __getitem__(self, key: object) -> Counted:
            piece = Counted(str.__getitem__(self, key))  # type: ignore[index]
            Counted.copied += len(piece)
            return piece

    text = Counted("a line of some words that is not short\n" * 10_000 + "y" * 10_000)
    blocks = [b.text for b in cut_document(Document("x", text))]
    assert "".join(blocks) == text
    assert max(map(len, blocks)) <= 4096
    assert all(b.endswith("\n") for b in blocks[:-3])
    # What was left was copied at every block: 25 MB took 16 s.
    assert Counted.copied == len(text)


def test_a_corpus_takes_memory_for_its_documents_and_not_for_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_store, "MEMORY_BYTES", 100_000)
    words = " ".join(f"größe{i * 7919 % 10_003}" for i in range(10_000)).replace("7 ", "7\n")
    text = "".join(f"{i} {words}\n" for i in range(120))
    (tmp_path / "x.txt").write_text(text)
    tracemalloc.start()
    corpus = load_corpus([str(tmp_path / "x.txt")])
    assert corpus.num_copies and corpus.splits
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Parts of 1 MiB in bytes and as text, and for each block of 4,096 characters its name, place and hash.
    assert peak < 8 * (1 << 20) < len(text.encode())
    whole = Corpus(corpus.name, tuple(cut_document(Document("x.txt", text))))
    assert corpus.sha256 == whole.sha256 and corpus.splits == whole.splits
    assert [d.key for d in corpus.documents] == [d.key for d in whole.documents]
    assert corpus.texts("test") == whole.texts("test")


def test_records_are_read_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_store, "MEMORY_BYTES", 1)
    rows = [{"prompt": "wie groß?", "completion": "1\n"}, {"messages": [{"role": "user", "content": "ü"}, ANSWER]}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_corpus([str(tmp_path / "x.jsonl")])
    found = [d.content for d in corpus.documents]
    assert found == [Pair("wie groß?", "1\n"), Chat((("user", "ü"), ("assistant", "ja")))]
    whole = Corpus(corpus.name, tuple(Document(d.name, d.content) for d in corpus.documents))
    assert corpus.sha256 == whole.sha256 and corpus.splits == whole.splits and corpus.has_records


def test_a_disk_without_room_for_the_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_store, "MEMORY_BYTES", 1)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "x.txt").write_text("some text\n" * 100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(DataError, match=rf"^data: {tmp_path} cannot hold a copy of the text \(File too large\)"):
            load_corpus([str(tmp_path / "x.txt")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_cache_that_cannot_be_written_is_named(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=rf"shards cannot be written to the cache {tmp_path}/cache/datasets") as error:
        prepare_dataset(corpus, 300, tmp_path / "cache")
    assert "RYOT_CACHE_DIR" in str(error.value.hint)


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_text_too_short_for_a_context_is_refused(dataset: Dataset, split: str) -> None:
    long = {s: "many words and more " * (20_000 if s != split else 1) for s in SPLITS}
    names = {s: next(n for n in map(str, range(1000)) if Document(n, "x").own_split == s) for s in SPLITS}
    text = Corpus("made", tuple(Document(names[s], f"{s} {long[s]}") for s in SPLITS))
    HeldOutText(text, dataset.tokenizer).check_sequences(4)
    with pytest.raises(DataError, match=rf"the {split} split has \d+ tokens, expected more than one sequence"):
        HeldOutText(text, dataset.tokenizer).check_sequences(1000)


def test_a_path_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="data: /no/such does not exist"):
        load_corpus(["/no/such"])


def test_a_corpus_too_small_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("tiny")
    with pytest.raises(DataError, match=r"has 4 characters, too few for a (train|val|test) split"):
        prepare_dataset(load_corpus([str(tmp_path / "x.txt")]), 300, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_a_vocabulary_larger_than_the_corpus_carries_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    small = Corpus(name="small", documents=corpus.documents[:6])
    if not all(small.texts(s) for s in SPLITS):
        small = Corpus(name="small", documents=corpus.documents)
    with pytest.raises(ConfigError, match=r"vocab_size: got 900000, but this corpus carries only \d+ tokens"):
        prepare_dataset(small, 900_000, tmp_path)


def test_a_shard_cut_short_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    import shutil

    path = Path(shutil.copytree(dataset.path, tmp_path / "d"))
    (path / "val.bin").write_bytes((path / "val.bin").read_bytes()[:-2])
    with pytest.raises(DataError, match=r"val\.bin has \d+ bytes, expected \d+"):
        load_dataset(path)


def test_a_sequence_longer_than_the_shards_is_refused(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"the val split has \d+ tokens, expected more than one sequence of 10000000"):
        dataset.check_sequences(10_000_000, 1)
