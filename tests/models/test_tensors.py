"""Tensors of a checkpoint: other names, and faults that are refused with both sides said."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ryot.errors import CheckpointError, ConfigError
from ryot.train.checkpoint import load_model
from tests.models.doubles import difference


def rewrite(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    shutil.copytree(source, folder)
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    safetensors.torch.save_file(dict(change(tensors)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


#: What the bare model's `save_pretrained` leaves out, by family.
PREFIXES = {
    "gemma3_text": "model.",
    "gpt2": "transformer.",
    "gpt_neox_sequential": "gpt_neox.",
    "llama_head_dim": "model.",
    "opt": "model.",
}


@pytest.mark.parametrize("name", PREFIXES)
def test_a_bare_model_is_read(name: str, hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix(PREFIXES[name]): value for key, value in tensors.items()}

    bare = load_model(rewrite(hf_checkpoint(name), tmp_path / "bare", rename))
    whole = load_model(hf_checkpoint(name))
    ids = torch.arange(20)[None]
    assert torch.equal(bare(ids), whole(ids))


def test_a_head_by_its_new_name_is_read(hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert "embed_out.weight" in tensors
        return {key.replace("embed_out", "lm_head"): value for key, value in tensors.items()}

    renamed = load_model(rewrite(hf_checkpoint("gpt_neox"), tmp_path / "renamed", rename))
    ids = torch.arange(20)[None]
    assert torch.equal(renamed(ids), load_model(hf_checkpoint("gpt_neox"))(ids))


def test_masks_and_frequencies_of_old_files_are_not_read(hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    extras = {
        "gpt2": ["transformer.h.1.attn.bias", "transformer.h.2.attn.masked_bias"],
        "gpt_neox": ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"],
        "llama": ["model.layers.2.self_attn.rotary_emb.inv_freq"],
    }
    for name, names in extras.items():
        unused = {key: torch.full((4,), -torch.inf) for key in names}
        folder = rewrite(hf_checkpoint(name), tmp_path / name, lambda tensors, unused=unused: {**tensors, **unused})  # type: ignore[misc]
        assert load_model(folder).spec == load_model(hf_checkpoint(name)).spec


def test_a_tied_head_may_be_stored_and_must_be_the_embedding(
    hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = hf_checkpoint("qwen2")

    def stored(factor: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        return lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * factor}

    ids = torch.arange(20)[None]
    same = load_model(rewrite(source, tmp_path / "same", stored(1.0)))
    assert difference(same(ids), load_model(source)(ids)) == 0
    # transformers would then not tie them.
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight") as error:
        load_model(rewrite(source, tmp_path / "other", stored(0.5)))
    assert "tie_word_embeddings to false" in (error.value.hint or "")


FAULTS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Mapping[str, Tensor]], str]] = {
    "missing": (
        "llama",
        lambda t: {key: value for key, value in t.items() if key != "model.layers.1.mlp.up_proj.weight"},
        r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing",
    ),
    "missing_head": (
        "llama",
        lambda t: {key: value for key, value in t.items() if key != "lm_head.weight"},
        r"tensor lm_head\.weight is missing",
    ),
    "extra": (
        "llama",
        lambda t: {**t, "model.layers.0.self_attn.q_proj.lora_A": torch.zeros(2)},
        r"tensor model\.layers\.0\.self_attn\.q_proj\.lora_A is not part of a llama model",
    ),
    "head_bias": (
        "qwen2",
        lambda t: {**t, "lm_head.bias": torch.zeros(272)},
        r"tensor lm_head\.bias is not part of a qwen2 model",
    ),
    "classifier": ("qwen2", lambda t: {**t, "score.weight": torch.zeros(2, 64)}, r"score\.weight is not part"),
    "vocabulary": (
        "llama",
        lambda t: {**t, "model.embed_tokens.weight": t["model.embed_tokens.weight"][:-1].clone()},
        r"embed_tokens\.weight is \[271, 64\], expected \[272, 64\] by config\.json",
    ),
    "kv_heads": (
        "llama",
        lambda t: {**t, "model.layers.0.self_attn.k_proj.weight": torch.zeros(64, 64)},
        r"layers\.0\.self_attn\.k_proj\.weight is \[64, 64\], expected \[32, 64\] by config\.json",
    ),
    "conv1d": (
        "gpt2_inner",
        lambda t: {**t, "transformer.h.0.mlp.c_fc.weight": t["transformer.h.0.mlp.c_fc.weight"].T.contiguous()},
        r"c_fc\.weight is \[96, 64\], expected \[64, 96\] by config\.json",
    ),
    "packed": (
        "gpt_neox",
        lambda t: {**t, "gpt_neox.layers.0.attention.query_key_value.weight": torch.zeros(380, 128)},
        r"query_key_value\.weight is \[380, 128\], expected \[384, 128\] by config\.json",
    ),
    "packed_gate": (
        "phi3",
        lambda t: {**t, "model.layers.2.mlp.gate_up_proj.weight": torch.zeros(96, 64)},
        r"gate_up_proj\.weight is \[96, 64\], expected \[192, 64\] by config\.json",
    ),
    "not_a_matrix": (
        "opt",
        lambda t: {**t, "model.decoder.layers.0.fc1.weight": torch.zeros(96)},
        r"fc1\.weight is \[96\], expected \[96, 64\] by config\.json",
    ),
    "nan": (
        "gemma3_text",
        lambda t: {**t, "model.norm.weight": torch.full((64,), torch.nan)},
        r"model\.norm\.weight has 64 values that are not finite",
    ),
    "infinite_bias": (
        "qwen2",
        lambda t: {**t, "model.layers.0.self_attn.k_proj.bias": torch.full((32,), torch.inf)},
        r"k_proj\.bias has 32 values that are not finite",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(fault: str, hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    name, change, message = FAULTS[fault]
    folder = rewrite(hf_checkpoint(name), tmp_path / fault, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(folder)
    assert str(error.value).startswith(str(folder))


def test_a_tied_head_has_no_bias(hf_checkpoint: Callable[[str], Path]) -> None:
    tied = load_model(hf_checkpoint("qwen2")).spec
    # torch's decoder would leave it out without a word.
    with pytest.raises(ConfigError, match="head_bias: got True, expected false with tie_embeddings"):
        dataclasses.replace(tied, head_bias=True)


def test_a_config_that_contradicts_the_tensors_is_refused(hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(hf_checkpoint("qwen3"), folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"head_dim": 16}))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is \[128, 64\], expected \[64, 64\] by config\.json"):
        load_model(folder)
