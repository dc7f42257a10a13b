from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ryot.errors import CheckpointError
from ryot.train.checkpoint import checkpoint_digest, load_model, load_training_state, load_weights, read_checkpoint_spec
from ryot.train.dataset import Dataset

#: transformers computes the same sums in another order: a few ulp of logits of order 10.
TOLERANCE = 1e-4


@torch.no_grad()
def test_transformers_loads_the_checkpoint_and_gives_the_same_logits(trained: Path, dataset: Dataset) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(trained).eval()
    ids = torch.from_numpy(dataset.windows("val", 4, 31))
    torch.testing.assert_close(theirs(ids).logits, load_model(trained)(ids), atol=TOLERANCE, rtol=0)


def test_transformers_loads_the_tokenizer(trained: Path, dataset: Dataset) -> None:
    from transformers import AutoTokenizer

    text = "def f(x):\n    return x  # émile\n"
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert tokenizer(text)["input_ids"] == dataset.tokenizer.encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_weights_cut_short_are_refused(trained: Path, tmp_path: Path) -> None:
    path = copy(trained, tmp_path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_weights(path)


def test_a_newer_schema_is_refused(trained: Path, tmp_path: Path) -> None:
    path = copy(trained, tmp_path)
    state = json.loads((path / "training/state.json").read_text())
    (path / "training/state.json").write_text(json.dumps(state | {"schema": 99}))
    with pytest.raises(CheckpointError, match="schema 99, expected at most 1"):
        load_training_state(path)


def test_an_unknown_architecture_is_refused(trained: Path, tmp_path: Path) -> None:
    path = copy(trained, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(CheckpointError, match=r"model_type is 'mamba', expected one of .*llama.* opt"):
        read_checkpoint_spec(path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_checkpoint_spec(tmp_path)


def test_the_digest_sees_every_byte(trained: Path, tmp_path: Path) -> None:
    path = copy(trained, tmp_path)
    assert checkpoint_digest(path) == checkpoint_digest(trained)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    assert checkpoint_digest(path) != checkpoint_digest(trained)
