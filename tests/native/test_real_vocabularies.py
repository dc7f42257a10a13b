"""Vocabularies of known models: the ids that llama.cpp expects, and those of `tokenizers`, from the C program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from ryot.edge.tokenizer import Tokenizer as PythonTokenizer
from ryot.models.sources.gguf_file import GgufFile
from ryot.models.sources.gguf_tokenizer import tokenizer_from_metadata
from tests.edge.tiny_bundle import write_manifest
from tests.realmodel import realmodel_folder

from .native import Native
from .test_tokens import HARD_TEXTS, assert_same, random_texts, write_tokenizer_bundle

pytestmark = pytest.mark.slow
#: Each of another kind; the others that tests/models/sources reads pass too.
VOCABULARIES = ("deepseek-coder", "falcon", "gpt-2", "llama-bpe", "llama-spm", "qwen2")


def files_of(name: str) -> Path:
    path = realmodel_folder() / name
    if not path.exists():
        pytest.skip(f"{path} is not there; fetch it with: python tests/realmodel.py")
    return path


@pytest.mark.parametrize("name", [*VOCABULARIES, "smollm2"])
def test_ids_of_known_vocabularies(name: str, native: Native, make_bundle: Callable[..., Path], tmp_path: Path):
    path = files_of("smollm2.gguf" if name == "smollm2" else f"llama.cpp/models/ggml-vocab-{name}.gguf")
    files = tokenizer_from_metadata(GgufFile(path)).files
    folder = write_tokenizer_bundle(
        make_bundle(), tmp_path / "bundle", Tokenizer.from_str(files["tokenizer.json"].decode())
    )
    (folder / "tokenizer_config.json").write_bytes(files["tokenizer_config.json"])
    write_manifest(folder)
    encoder = native.open(folder)
    assert_same(encoder, PythonTokenizer(folder / "tokenizer.json"), HARD_TEXTS + random_texts(2, 200))
    expected = path.with_suffix(".gguf.out")
    if expected.exists():
        texts = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
        around = len(encoder.encode("x")) - 1  # bos
        for text, line in zip(texts, expected.read_text().split("\n")):
            assert encoder.encode(text)[around:] == [int(token) for token in line.split()], text
    encoder.close()
