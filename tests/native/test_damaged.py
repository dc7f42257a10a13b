"""Damaged files give one line and an exit code, and touch no memory but their own.

The program here is built with the compiler's checks (AddressSanitizer, UndefinedBehaviorSanitizer), which end it with
a report at the first fault.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ryot.edge.tokenizer import Tokenizer as PythonTokenizer
from tests.edge.tiny_bundle import write_manifest

from .native import Native
from .test_program import python_text
from .test_tokens import BPE_KINDS, HARD_TEXTS, random_texts, write_tokenizer_bundle

#: onnxruntime's own leaks at its end are none of ours.
NO_LEAKS = {"ASAN_OPTIONS": "detect_leaks=0"}


@pytest.fixture(scope="module")
def tiny(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle()


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def assert_one_line(checked: Native, *arguments: object) -> None:
    done = checked.run(*arguments, stdin=b"def add(a, b):", ASAN_OPTIONS="allocator_may_return_null=1")
    if done.returncode == 0:  # what was changed does not matter to a text
        return
    lines = done.stderr.decode().splitlines()
    assert done.returncode in (1, 2), done.stderr.decode()
    assert len(lines) <= 2
    assert lines[0].startswith("Error: ")
    assert all(line.startswith("hint: ") for line in lines[1:])
    assert done.stdout == b""


def damaged(data: bytes, seed: int, count: int) -> list[bytes]:
    """Versions of a file: cut off, with changed bytes, with a part that comes twice or not at all."""
    rng = random.Random(seed)
    versions = []
    for _ in range(count):
        start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        end = min(end, start + 200)
        kind = rng.randrange(4)
        changed = bytearray(data)
        if kind == 0:
            changed = changed[:start]
        elif kind == 1:
            for _ in range(rng.randrange(1, 4)):
                changed[rng.randrange(len(data))] = rng.choice(b'\0"\\{}[]:,-9eu\xff\x80 ')
        elif kind == 2:
            del changed[start:end]
        else:
            changed[start:start] = data[start:end]
        versions.append(bytes(changed))
    return versions


def test_a_damaged_manifest_is_one_line(checked: Native, copy: Path):
    path = copy / "ryot_manifest.json"
    for data in damaged(path.read_bytes(), 1, 60):
        path.write_bytes(data)
        assert_one_line(checked, copy, "--ids")


@pytest.mark.parametrize("kind", ["llama 3", "prepend", "qwen 2, NFC"])
def test_a_damaged_tokenizer_is_one_line(kind: str, checked: Native, tiny: Path, tmp_path: Path):
    """The manifest fits the damaged file, so that what reads it is met by it."""
    folder = write_tokenizer_bundle(tiny, tmp_path / "bundle", BPE_KINDS[kind]())
    path = folder / "tokenizer.json"
    # Most of the file is vocabulary: without it damage finds the rest, too.
    values = json.loads(path.read_text())
    short = values | {"model": values["model"] | {"vocab": {"a": 0, "b": 1, "ab": 2, "<unk>": 3}, "merges": ["a b"]}}
    for data in damaged(path.read_bytes(), 2, 20) + damaged(json.dumps(short, ensure_ascii=False).encode(), 3, 40):
        path.write_bytes(data)
        write_manifest(folder)
        assert_one_line(checked, folder, "--ids")


def test_values_that_make_no_sense_are_one_line(checked: Native, copy: Path):
    path = copy / "ryot_manifest.json"
    good = json.loads(path.read_text())
    for key in good["model"]:
        for value in (-1, 0, 1 << 40, 1e300, "x", None, [], {}):
            path.write_text(json.dumps(good | {"model": good["model"] | {key: value}}))
            assert_one_line(checked, copy, "--ids")
    for name in ("/etc/passwd", "../x", "a/../../x", "", "..", "a\0b"):
        path.write_text(json.dumps(good | {"files": good["files"] | {name: {"sha256": "0" * 64, "bytes": 1}}}))
        done = checked.run(copy, "--ids")
        assert done.returncode == 1
        assert done.stderr.startswith(b"Error: bundle manifest ")
        assert b"is not a path inside the bundle" in done.stderr
    path.write_text("[" * 100_000)
    assert b"too many brackets in each other" in checked.run(copy, "--ids").stderr


def test_a_graph_that_is_none_is_one_line(checked: Native, copy: Path):
    (copy / "fast.onnx").write_bytes(b"not a graph")
    write_manifest(copy)
    done = checked.run(copy, "a", **NO_LEAKS)
    assert (done.returncode, done.stdout) == (1, b"")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"Error: {copy}/fast.onnx: onnxruntime ".encode())


def test_a_manifest_of_another_shape_than_the_graph_is_one_line(checked: Native, copy: Path):
    good = json.loads((copy / "ryot_manifest.json").read_text())["model"]
    for change in ({"num_layers": 3}, {"num_kv_heads": 4}, {"head_dim": 16}, {"vocab_size": 385}):
        write_manifest(copy, model=good | change)
        done = checked.run(copy, "a", **NO_LEAKS)
        assert (done.returncode, done.stdout) == (1, b""), change
        assert done.stderr.startswith(b"Error: "), change


def test_hard_texts_touch_no_memory_but_their_own(checked: Native, tiny: Path, tmp_path: Path):
    for number, kind in enumerate(BPE_KINDS):
        folder = write_tokenizer_bundle(tiny, tmp_path / str(number), BPE_KINDS[kind]())
        text = "".join(HARD_TEXTS + random_texts(number, 100))
        got = checked.text(folder, "--ids", stdin=text.encode())
        assert got.split() == [str(i) for i in PythonTokenizer(folder / "tokenizer.json").encode(text)]


def test_generating_touches_no_memory_but_its_own(checked: Native, make_bundle: Callable[..., Path]):
    bundle = make_bundle(context=600, seed=6)
    assert checked.run(bundle, "--verify", **NO_LEAKS).stderr == b""
    options = ("--temperature", 2, "--top-p", 0.95, "--stop", "never", "--max-new-tokens", 300, "--ignore-eos")
    done = checked.run(bundle, "def add(", *options, **NO_LEAKS)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == python_text(bundle, "def add(", 300, temperature=2.0, top_p=0.95, ignore_eos=True)
