"""Text that trips tools: separators and surrogates in JSON, marks, links, names and bytes that are not UTF-8."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard

from ryot.errors import ConfigError, DataError
from ryot.train import text_files
from ryot.train.corpus import load_corpus
from ryot.train.text_files import find_files, show_path

ROWS = [f"text {i} of a few words" for i in range(20)]
LINES = [json.dumps({"text": row}) for row in ROWS]


def texts(*paths: Path) -> list[str]:
    """The documents of a corpus, in the order of their names; its blocks are these small texts themselves."""
    return [d.text for d in load_corpus([str(p) for p in paths]).documents]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_json_lines_end_at_newlines_alone(tmp_path: Path, separator: str) -> None:
    # JSON allows the first three inside a string as they are, and the others escaped.
    line = json.dumps({"text": f"before{separator}after"}, ensure_ascii=False)
    if separator < "\x20":
        line = json.dumps({"text": f"before{separator}after"})
    (tmp_path / "a.jsonl").write_text("\n".join([*LINES[:7], line, *LINES[7:]]) + "\n", encoding="utf-8")
    assert texts(tmp_path) == [*ROWS[:7], f"before{separator}after", *ROWS[7:]]


def test_json_lines_may_end_with_carriage_returns_or_without_a_newline(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(LINES).encode())
    assert texts(tmp_path) == ROWS


@pytest.mark.parametrize(("name", "data"), [("a.jsonl", "\n".join(LINES)), ("a.txt", ROWS[0])])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, data: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data.encode())
    assert texts(tmp_path) == (ROWS if name == "a.jsonl" else ROWS[:1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "half an emoji \\ud83d here"}', r"has a lone surrogate \(\\ud83d at character 14 of 'text'\)"),
        (b'{"text": "gr\xfc\xdfe"}', r"is not UTF-8 \(byte 0xfc at offset 12\)"),
        (b'{"text": "a"} {', "is not JSON"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'["text"]', "has no string field 'text'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*(x.encode() for x in LINES[:7]), line]) + b"\n")
    with pytest.raises(DataError, match=rf"^data: .*/a\.jsonl line 8 {message}") as error:
        load_corpus([str(tmp_path)])
    assert "\n" not in str(error.value)


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "an emoji \\ud83d\\ude00 here"}\n')
    assert texts(tmp_path) == ["an emoji \U0001f600 here"]


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_a_text_read_in_parts_is_the_text_and_says_the_same_of_its_faults(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_CHUNK_BYTES", chunk)
    text = "one\nzwölf \U0001f600\n日本\n"
    (tmp_path / "a.txt").write_text(text)
    assert "".join(text_files.read_text(tmp_path / "a.txt")) == text
    for tail, offset in ((b"gr\xfc\xdfe\n", 25), (b"\xe6\x97", 23)):
        (tmp_path / "a.txt").write_bytes(text.encode() + tail)
        with pytest.raises(DataError, match=rf"line 4 is not UTF-8 \(byte 0x.. at offset {offset}\)"):
            list(text_files.read_text(tmp_path / "a.txt"))


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\ngr\xfc\xdfe\n")
    with pytest.raises(DataError, match=r"a\.txt line 3 is not UTF-8 \(byte 0xfc at offset 10\)"):
        load_corpus([str(tmp_path)])


def test_names_that_are_not_utf8_are_read_and_shown(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / os.fsdecode(b"na\xefve.txt")).write_text("text")
    corpus = load_corpus([str(folder)])
    assert corpus.name == r"caf\xe9"
    assert [d.name for d in corpus.documents] == [r"na\xefve.txt#000000000"]
    assert len(corpus.sha256) == 64
    with pytest.raises(ConfigError, match=r"data: .*/caf\\xe9/none does not exist"):
        load_corpus([str(folder / "none")])


def test_a_path_reads_the_same_in_every_locale() -> None:
    assert show_path(os.fsdecode("größe.txt".encode())) == "größe.txt"
    # What a path in UTF-8 looks like to Python in the C locale.
    assert show_path("größe.txt".encode().decode("ascii", errors="surrogateescape")) == "größe.txt"


def test_a_home_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="data: ~no-such-user/text: "):
        load_corpus(["~no-such-user/text"])


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder with a file of its own, two links to a folder elsewhere, one to itself, one upwards, one to nothing."""
    (tmp_path / "elsewhere/deeper").mkdir(parents=True)
    (tmp_path / "elsewhere/deeper/far.txt").write_text("far")
    folder = tmp_path / "folder"
    (folder / "own").mkdir(parents=True)
    (folder / "own/near.txt").write_text("near")
    for name, to in (
        ("a-link", tmp_path / "elsewhere"),
        ("b-link", tmp_path / "elsewhere"),
        ("c-loop", folder),
        ("d-own", folder / "own"),
        ("nothing.txt", tmp_path / "none"),
        (".hidden", tmp_path),
    ):
        (folder / name).symlink_to(to)
    (tmp_path / "elsewhere/deeper/up").symlink_to(folder)
    return folder


def test_linked_folders_are_entered_once_and_loops_are_not(linked: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert [name for name, _ in find_files(str(linked))] == ["own/near.txt", "a-link/deeper/far.txt"]
    assert [r.getMessage() for r in caplog.records] == [
        f"data: {linked}/nothing.txt is passed over, its link leads nowhere"
    ]


def test_a_glob_goes_round_no_loop(linked: Path) -> None:
    assert sorted(name for name, _ in find_files(f"{linked}/**/*.txt")) == ["far.txt", "near.txt"]


def pack(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data[:50]) + gzip.compress(data[50:])
    frames = zstandard.ZstdCompressor(write_checksum=True)
    return frames.compress(data[:50]) + frames.compress(data[50:])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_text_is_the_same_corpus(tmp_path: Path, suffix: str) -> None:
    for folder, end in (("plain", ""), ("packed", suffix)):
        for name, data in (("a.jsonl", "\n".join(LINES).encode()), ("b.txt", b"plain words, " * 100)):
            (tmp_path / folder / "text").mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / "text" / (name + end)).write_bytes(pack(data, suffix) if end else data)
    plain, packed = (load_corpus([str(tmp_path / folder / "text")]) for folder in ("plain", "packed"))
    assert packed.sha256 == plain.sha256
    assert len(plain.documents) == len(ROWS) + 1


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", [lambda d: d[:-9], lambda d: d[:30] + b"x" * 8 + d[38:], lambda d: b"text"])
def test_damaged_compressed_text_is_refused(tmp_path: Path, suffix: str, damage: object) -> None:
    assert callable(damage)
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(damage(pack(os.urandom(200).hex().encode(), suffix)))
    with pytest.raises(DataError, match=rf"a\.txt\{suffix} is damaged or cut short \(.+\)"):
        load_corpus([str(file)])
