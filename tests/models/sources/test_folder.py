"""Hugging Face folders: what transformers saves is read exactly, and what is wrong with one is told in a line."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray

from ryot.errors import CheckpointError, ConfigError
from ryot.models.sources.checkpoint import Checkpoint
from ryot.models.sources.opening import open_checkpoint
from tests.models.sources.tiny import build_model


def assert_same_tensors(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.names()) == expected.keys()
    for name, tensor in expected.items():
        values = checkpoint.load(name)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert values.dtype == np.float32
        assert np.array_equal(values, tensor.float().numpy()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_precision_is_read_as_torch_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    build_model("llama").to(dtype).save_pretrained(tmp_path)
    expected = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert next(iter(expected.values())).dtype == dtype
    assert_same_tensors(open_checkpoint(str(tmp_path)), expected)


def test_shards_are_read_by_their_index(llama_folder: Path, tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    expected = safetensors.torch.load_file(llama_folder / "model.safetensors")
    assert_same_tensors(open_checkpoint(str(tmp_path / "sharded")), expected)


def test_a_cache_of_links_is_the_same_checkpoint_wherever_it_lies(llama_folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(llama_folder.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    linked, plain = open_checkpoint(str(snapshot)), open_checkpoint(str(llama_folder))
    assert_same_tensors(linked, safetensors.torch.load_file(llama_folder / "model.safetensors"))
    assert linked.sha256 == plain.sha256
    assert linked.files["tokenizer.json"] == (llama_folder / "tokenizer.json").read_bytes()
    assert linked.generation_config["eos_token_id"] == [318, 319]


def test_the_digest_changes_with_one_byte(llama_folder: Path) -> None:
    before = open_checkpoint(str(llama_folder)).sha256
    weights = llama_folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert open_checkpoint(str(llama_folder)).sha256 != before


def test_config_keys_pass_as_they_are(llama_folder: Path) -> None:
    edit(llama_folder, rope_parameters=None, rope_theta=100_000.0, torch_dtype="float32")
    config = open_checkpoint(str(llama_folder)).config
    assert config == json.loads((llama_folder / "config.json").read_text())


def edit(folder: Path, file: str = "config.json", **changes: object) -> None:
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({k: v for k, v in {**values, **changes}.items() if v is not None}))


def shard(folder: Path) -> dict[str, str]:
    """Split the weights over two files and an index; returns the index's map."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        safetensors.torch.save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def index_beside_whole(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "kept")
    shard(folder)
    (folder / "kept").rename(folder / "model.safetensors")


def index_names_tensor_nowhere(folder: Path) -> None:
    weight_map = shard(folder) | {"model.layers.9.mlp.up_proj.weight": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def tensor_in_two_shards(folder: Path) -> None:
    shard(folder)
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    both = safetensors.torch.load_file(second) | {
        "lm_head.weight": safetensors.torch.load_file(first)["lm_head.weight"]
    }
    safetensors.torch.save_file(both, second)


def index_leads_outside(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def other_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


def cut_in_data(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def cut_in_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def pointer_of_git_lfs(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def float8(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def bitsandbytes(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def config_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing_shard, "model-00002-of-00002.safetensors is missing"),
        (index_beside_whole, "both model.safetensors and model.safetensors.index.json"),
        (index_names_tensor_nowhere, "model.layers.9.mlp.up_proj.weight is not in model-00001-of-00002.safetensors"),
        (tensor_in_two_shards, "lm_head.weight stands in model-00001-of-00002.safetensors and model-00002"),
        (index_leads_outside, "names ../model.safetensors"),
        (pickle_only, "pytorch_model.bin is a pickle"),
        (adapter_only, "is an adapter"),
        (other_name, "has consolidated.safetensors, expected model.safetensors"),
        (cut_in_data, "cut short"),
        (cut_in_header, "cut short"),
        (empty_weights, "is no safetensors file"),
        (pointer_of_git_lfs, "is no safetensors file"),
        (float8, "lm_head.weight is F8_E4M3"),
        (bitsandbytes, "says bitsandbytes"),
        (no_config, "config.json is missing"),
        (config_no_json, "config.json cannot be read"),
        (config_a_list, "is not a JSON object"),
    ],
)
def test_a_spoilt_folder_is_refused_by_name(spoil: Callable[[Path], None], message: str, llama_folder: Path) -> None:
    spoil(llama_folder)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(llama_folder))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_lies_beside_the_index_is_left_out_and_said(llama_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = safetensors.torch.load_file(llama_folder / "model.safetensors")
    shard(llama_folder)
    safetensors.torch.save_file({"other": torch.zeros(1)}, llama_folder / "consolidated.safetensors")
    with caplog.at_level(logging.WARNING):
        assert_same_tensors(open_checkpoint(str(llama_folder)), expected)
    assert "consolidated.safetensors left out" in caplog.text


def test_a_buffer_is_listed_and_not_loaded_as_weights(llama_folder: Path) -> None:
    tensors = safetensors.torch.load_file(llama_folder / "model.safetensors")
    mask = {"h.0.attn.bias": torch.ones(4, 4, dtype=torch.bool)}
    safetensors.torch.save_file(tensors | mask, llama_folder / "model.safetensors")
    checkpoint = open_checkpoint(str(llama_folder))
    assert checkpoint.dtype("h.0.attn.bias") == "BOOL"
    with pytest.raises(CheckpointError, match=r"h\.0\.attn\.bias is BOOL"):
        checkpoint.load("h.0.attn.bias")


@pytest.mark.parametrize("source", ["/nowhere/at/all", "no such thing", "a/b/c", "../x/y"])
def test_a_source_that_is_nothing_is_wrong_usage(source: str) -> None:
    with pytest.raises(ConfigError, match="no such folder or file"):
        open_checkpoint(source)


@pytest.mark.parametrize("method", ["gptq", "gptq_v2", "gptq_act_order", "awq"])
def test_packed_codes_are_read_as_their_format_says(method: str, llama_folder: Path) -> None:
    """The packing is written out place by place here, as AutoGPTQ's and AutoAWQ's documents have it."""
    rng = np.random.default_rng(0)
    inputs, outputs, group = 64, 32, 16
    codes = rng.integers(0, 16, (inputs, outputs))
    zeros = rng.integers(1, 16, (inputs // group, outputs))
    scales = rng.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
    groups = np.arange(inputs) // group
    if method == "gptq_act_order":
        groups = rng.permutation(groups)
    expected = ((codes - zeros[groups]) * scales.astype(np.float32)[groups]).T
    awq = method == "awq"
    stored_zeros = zeros if method in ("awq", "gptq_v2") else zeros - 1
    base = "model.layers.0.self_attn.q_proj"
    tensors = safetensors.torch.load_file(llama_folder / "model.safetensors")
    del tensors[f"{base}.weight"]
    tensors |= {
        f"{base}.qweight": torch.from_numpy(pack(codes, axis=1, awq=True) if awq else pack(codes, axis=0)),
        f"{base}.qzeros": torch.from_numpy(pack(stored_zeros, axis=1, awq=awq)),
        f"{base}.scales": torch.from_numpy(scales),
    }
    if not awq:
        tensors[f"{base}.g_idx"] = torch.from_numpy(groups.astype(np.int32))
    safetensors.torch.save_file(tensors, llama_folder / "model.safetensors")
    settings = {"quant_method": "awq" if awq else "gptq", "bits": 4, "group_size": group, "zero_point": True}
    edit(llama_folder, quantization_config=settings | ({"checkpoint_format": method} if method == "gptq_v2" else {}))
    checkpoint = open_checkpoint(str(llama_folder))
    assert f"{base}.weight" in checkpoint.names()
    assert not [name for name in checkpoint.names() if "qweight" in name or "qzeros" in name or "g_idx" in name]
    assert checkpoint.shape(f"{base}.weight") == (outputs, inputs)
    assert "quantization_config" not in checkpoint.config
    assert np.array_equal(checkpoint.load(f"{base}.weight"), expected.astype(np.float32))
    blocks = checkpoint.blocks(f"{base}.weight")
    if method == "gptq_act_order":
        assert blocks is None
    else:
        assert blocks is not None and blocks.block_size == group
        assert np.array_equal(blocks.dequantize(), expected.astype(np.float32))


def pack(codes: NDArray[np.int64], *, axis: int, awq: bool = False) -> NDArray[np.int32]:
    order = (0, 2, 4, 6, 1, 3, 5, 7) if awq else range(8)
    moved = np.moveaxis(codes, axis, -1)
    words = np.zeros((*moved.shape[:-1], moved.shape[-1] // 8), np.int64)
    for place, column in enumerate(order):
        words |= moved[..., column::8] << (4 * place)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).astype(np.uint32).view(np.int32)
