"""What is found out about a checkpoint's text before its weights are exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ryot.deploy.text_check import HARD_STRINGS, check_text, compare_text
from ryot.errors import CheckpointError, ExportError
from tests.edge.tokenizer_kinds import byte_level, sentencepiece, write_tokenizer_folder


def write_config(folder: Path, **values: object) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **values}))


def test_a_good_checkpoint_is_compared_with_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rust = byte_level(bos=True)
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|turn|>{% endfor %}"
    folder = write_tokenizer_folder(tmp_path, rust, chat_template=template)
    write_config(folder, eos_token_id=5)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    found = check_text(folder, vocab_size=rust.get_vocab_size() + 24)
    assert found.token_ids == (rust.token_to_id("<s>"), (7, 8), None)
    assert (found.num_tokens, found.num_unreachable, found.chat_template) == (rust.get_vocab_size(), 0, True)
    assert compare_text(folder) == []
    # One of the strings holds special tokens of this vocabulary.
    assert found.num_lossless == found.num_strings - 1 == len(HARD_STRINGS) - 1
    assert not caplog.records


def test_ordinary_tokens_beyond_the_models_table_are_refused_with_both_sizes(tmp_path: Path) -> None:
    folder = write_tokenizer_folder(tmp_path, byte_level())
    with pytest.raises(ExportError, match=r"tokenizer\.json: has 370 tokens, the model has 350; 14 of those beyond"):
        check_text(folder, vocab_size=350)


def test_unused_added_tokens_beyond_the_models_table_are_let_be(tmp_path: Path) -> None:
    folder = write_tokenizer_folder(tmp_path, byte_level())
    write_config(folder, eos_token_id=5, bos_token_id=5)
    assert check_text(folder, vocab_size=367).num_unreachable == 3


def test_an_end_of_text_beyond_the_models_table_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_tokenizer_folder(tmp_path, byte_level())
    write_config(folder, eos_token_id=500)
    with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id is 500, expected an id below .* of 450"):
        check_text(folder, vocab_size=450)


def test_a_checkpoint_that_names_no_end_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_tokenizer_folder(tmp_path, byte_level(), eos_token=None)
    assert check_text(folder, vocab_size=450).token_ids.eos == ()
    assert "no token ends a text" in caplog.text


def test_a_template_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer_folder(tmp_path, byte_level(), chat_template="{% if %}")
    with pytest.raises(ExportError, match="the chat template cannot be read"):
        check_text(folder, vocab_size=450)


def test_a_tokenizer_without_a_decoder_is_refused(tmp_path: Path) -> None:
    rust = byte_level()
    rust.decoder = None
    folder = write_tokenizer_folder(tmp_path, rust)
    with pytest.raises(ExportError, match="the tokenizer cannot be used: it has no decoder"):
        check_text(folder, vocab_size=450)


def test_what_transformers_does_otherwise_is_found(tmp_path: Path) -> None:
    """Its class for Llama 2 builds a tokenizer of its own from the vocabulary, which loses a text's first space."""
    folder = write_tokenizer_folder(tmp_path, sentencepiece("prepend"), tokenizer_class="LlamaTokenizer", legacy=False)
    write_config(folder)
    differences = compare_text(folder)
    assert differences[0].startswith("ids of ' one space before' are ")
    assert "LlamaTokenizer has" in differences[0]
    assert 0 < len(differences) < len(HARD_STRINGS) / 3
