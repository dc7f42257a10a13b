"""Folders that are written: transformers loads them, halves stay halves, and the disk is looked at first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch

from ryot.errors import CheckpointError
from ryot.models.sources.opening import open_checkpoint
from ryot.models.sources.write_gguf import write_gguf
from ryot.models.sources.write_hf import write_hf
from tests.models.sources.tiny import build_model, byte_level, logits_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_their_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    build_model("llama").to(dtype).save_pretrained(tmp_path / "source")
    write_hf(open_checkpoint(str(tmp_path / "source")), tmp_path / "copy")
    source, copy = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("source", "copy"))
    assert source.keys() == copy.keys()
    assert all(copy[name].dtype == dtype and torch.equal(copy[name], source[name]) for name in source)
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_large_weights_are_sharded_as_transformers_reads_them(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_checkpoint(str(family_folder("llama")))
    write_hf(source, tmp_path / "copy", shard_bytes=150_000)
    shards = sorted((tmp_path / "copy").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 152_000 for path in shards)
    index = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == source.float_bytes()
    assert torch.equal(logits_of(family_folder("llama")), logits_of(tmp_path / "copy"))
    again = open_checkpoint(str(tmp_path / "copy"))
    assert again.files == source.files
    assert again.generation_config == source.generation_config


def test_a_folder_that_is_there_is_left_alone(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        write_hf(open_checkpoint(str(family_folder("llama"))), tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_small_a_disk_is_told_before_the_work(
    family_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is the one thing that is not real here."""
    checkpoint = open_checkpoint(str(family_folder("llama")))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(10**9, 10**9, 1000))
    with pytest.raises(CheckpointError, match=r"needs 0\.5 MB, .* has 0\.0 MB free"):
        write_hf(checkpoint, tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"needs 0\.3 MB"):
        write_gguf(checkpoint, tmp_path / "copy.gguf", "F16")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_goes_with_its_model(tmp_path: Path) -> None:
    build_model("qwen3").save_pretrained(tmp_path / "source")
    byte_level().save_pretrained(tmp_path / "source")
    write_gguf(open_checkpoint(str(tmp_path / "source")), tmp_path / "model.gguf", "Q8_0")
    write_hf(open_checkpoint(str(tmp_path / "model.gguf")), tmp_path / "copy")
    from transformers import PreTrainedTokenizerFast

    ours, theirs = (PreTrainedTokenizerFast.from_pretrained(tmp_path / name) for name in ("copy", "source"))
    messages = [{"role": "user", "content": "x = 12"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    assert ours("def f(x)").input_ids == theirs("def f(x)").input_ids
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
