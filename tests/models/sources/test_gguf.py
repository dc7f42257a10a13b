"""GGUF, written and read back: transformers and llama.cpp's converter judge; faults are told in a line."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from ryot.errors import CheckpointError, ExportError
from ryot.models.registry import read_spec
from ryot.models.sources.gguf_config import config_from_metadata, find_family
from ryot.models.sources.gguf_families import FAMILIES as GGUF_FAMILIES
from ryot.models.sources.gguf_file import KINDS, GgufFile
from ryot.models.sources.gguf_rope import llama3_factors, llama3_parameters
from ryot.models.sources.opening import open_checkpoint
from ryot.models.sources.write_gguf import write_gguf
from ryot.models.sources.write_hf import write_hf
from tests.models.sources.tiny import FAMILIES, logits_of

FolderOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def gguf_of(family_folder: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """A family's checkpoint as GGUF, F16, which holds its weights exactly."""
    made: dict[str, Path] = {}

    def file_of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("gguf") / "model.gguf"
            write_gguf(open_checkpoint(str(family_folder(name))), made[name], "F16")
        return made[name]

    return file_of


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_went_through_gguf_is_the_same_model(
    name: str, family_folder: FolderOf, gguf_of: FolderOf, tmp_path: Path
) -> None:
    source, back = open_checkpoint(str(family_folder(name))), open_checkpoint(str(gguf_of(name)))
    # A norm of Gemma's is stored as 1 + w, so of its w what float32 has no room for beside a 1 is lost.
    tolerance = 2.0**-23 if name == "gemma3" else 0.0
    assert set(back.names()) == set(source.names())
    for tensor in source.names():
        assert np.abs(back.load(tensor) - source.load(tensor)).max() <= tolerance, tensor
    assert back.generation_config["eos_token_id"] == [318, 319]
    write_hf(back, tmp_path / "back")
    difference = (logits_of(family_folder(name)) - logits_of(tmp_path / "back")).abs().max()
    assert difference <= (1e-5 if name == "gemma3" else 0.0)


# transformers' own reader of GGUF knows no head size of Qwen 3's, and no shape of GPT-2's but its first.
@pytest.mark.parametrize("name", ["llama", "llama_rope_llama3", "qwen2", "gemma3"])
def test_transformers_reads_the_same_tensors_from_gguf(name: str, gguf_of: FolderOf) -> None:
    path = gguf_of(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    checkpoint = open_checkpoint(str(path))
    for tensor in checkpoint.names():
        assert np.allclose(checkpoint.load(tensor), theirs[tensor].numpy(), rtol=0, atol=2.0**-23), tensor


_CONVERT = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import convert_hf_to_gguf
from conversion import get_model_class
for source, target, architecture in json.loads(sys.argv[2]):
    get_model_class(architecture).set_vocab = lambda self: self._set_vocab_none()
    sys.argv = ["convert", source, "--outfile", target, "--outtype", "f32"]
    convert_hf_to_gguf.main()
"""


def test_llama_cpps_converter_writes_the_same_file(
    family_folder: FolderOf, gguf_of: FolderOf, llama_cpp_source: Path, tmp_path: Path
) -> None:
    # The converter knows GPT-NeoX only by the key that transformers 4 gave its rotary share.
    names = [name for name in FAMILIES if name != "gpt_neox"]
    jobs = []
    for name in names:
        folder = shutil.copytree(family_folder(name), tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        config |= {"n_ctx": 128} if name == "gpt2" else {}
        (folder / "config.json").write_text(json.dumps(config))
        jobs.append((str(folder), str(tmp_path / f"{name}.gguf"), config["architectures"][0]))
    program = [sys.executable, "-c", _CONVERT, str(llama_cpp_source), json.dumps(jobs)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (_, target, _) in zip(names, jobs):
        ours, theirs = GgufFile(gguf_of(name)), GgufFile(Path(target))
        ignored = ("general.", "tokenizer.")
        keys = [key for key in theirs.metadata if not key.startswith(ignored)]
        assert {key: ours.metadata.get(key) for key in keys} == {key: theirs.metadata[key] for key in keys}, name
        assert ours.tensors.keys() == theirs.tensors.keys(), name
        for tensor in theirs.tensors:
            mine, expected = (file.dequantize(tensor, file.rows(tensor)) for file in (ours, theirs))
            # Theirs is float32 and the weights are float16 numbers; 1 + w of a norm, and factors, are rounded once.
            assert np.allclose(mine, expected, rtol=1e-6, atol=0), (name, tensor)


def test_names_are_those_of_the_gguf_package() -> None:
    for family in GGUF_FAMILIES:
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf)
        table = gguf.get_tensor_name_map(arch, 2)
        for name, (stored, _) in family.names(2).items():
            assert table.get_name(name, try_suffixes=(".weight", ".bias")) == stored, (family.model_type, name)


def write_blocks(path: Path, kind: Kind, rows: int = 64, cols: int = 256) -> np.ndarray:
    """A Llama whose q projection holds random blocks of this kind; returns the raw bytes."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    if kind in (Kind.F32, Kind.F16, Kind.BF16):
        values = rng.normal(size=(rows, cols)).astype(np.float32)
        raw = gguf.quants.quantize(values, kind).view(np.uint8)
    else:
        raw = rng.integers(0, 256, (rows, cols // block_size * block_bytes), dtype=np.uint8)
        # Scales are float16 at places that differ by kind; an exponent of all ones would be no number.
        raw[:, 1::2] &= 0xBF
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_embedding_length(cols)
    writer.add_feed_forward_length(8)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_tensor("token_embd.weight", np.zeros((3, cols), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", raw, raw_shape=raw.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return raw


def unpermuted(values: np.ndarray, heads: int = 4) -> np.ndarray:
    """Rows as Hugging Face has them: first the halves of each head, not its pairs."""
    return values.reshape(heads, -1, 2, values.shape[-1]).transpose(0, 2, 1, 3).reshape(values.shape)


@pytest.mark.parametrize("kind", sorted(KINDS), ids=lambda kind: kind.name)
def test_every_kind_is_dequantized_as_the_gguf_package_does(kind: Kind, tmp_path: Path) -> None:
    raw = write_blocks(tmp_path / "one.gguf", kind)
    checkpoint = open_checkpoint(str(tmp_path / "one.gguf"))
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = unpermuted(gguf.quants.dequantize(raw, kind))
    values = checkpoint.load(name)
    assert checkpoint.dtype(name) == kind.name
    assert np.array_equal(values, expected, equal_nan=True)
    assert np.isfinite(values).mean() > 0.9
    blocks = checkpoint.blocks(name)
    if kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0):
        assert blocks is not None
        # One rounding apart: ggml's Q4_0 multiplies and this adds in the same order, so they are equal.
        assert np.array_equal(blocks.dequantize(), expected, equal_nan=True)
    else:
        assert blocks is None


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(
    ("factor", "high", "original", "head_dim"),
    [(8.0, 4.0, 8192, 128), (32.0, 4.0, 8192, 64), (16.0, 4.0, 8192, 128), (4.0, 2.0, 2048, 64)],
)
def test_llama3s_parameters_are_found_in_its_factors(
    theta: float, factor: float, high: float, original: int, head_dim: int
) -> None:
    parameters = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    found = llama3_parameters(llama3_factors(parameters, theta, head_dim), theta, "here")
    assert np.allclose(
        llama3_factors(found, theta, head_dim), llama3_factors(parameters, theta, head_dim), rtol=1e-4, atol=0
    )
    assert found["factor"] == factor


def test_q8_0_is_the_gguf_packages_own(family_folder: FolderOf, tmp_path: Path) -> None:
    source = open_checkpoint(str(family_folder("qwen3")))
    write_gguf(source, tmp_path / "q8.gguf", "Q8_0")
    back = open_checkpoint(str(tmp_path / "q8.gguf"))
    for name in source.names():
        values = source.load(name)
        matrix = values.ndim == 2
        assert back.dtype(name) == ("Q8_0" if matrix else "F32")
        rounded = gguf.quants.dequantize(gguf.quants.quantize(values, Kind.Q8_0), Kind.Q8_0) if matrix else values
        assert np.array_equal(back.load(name), rounded)


def test_a_file_cut_short_anywhere_is_refused(gguf_of: FolderOf, tmp_path: Path) -> None:
    data = gguf_of("llama").read_bytes()
    path = tmp_path / "short.gguf"
    for length in [0, 1, 4, 8, 23, 24, *np.linspace(25, len(data) - 33, 60, dtype=int)]:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut short|is no GGUF|cannot be read|malformed"):
            open_checkpoint(str(path))


def patched(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    assert len(old) == len(new)

    def patch(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    return patch


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (lambda data: b"GGML" + data[4:], "is no GGUF file"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "GGUF of version 1"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "expected 2 or 3 (little-endian)"),
        (patched(b"llama.block_count", b"llama.block_kount"), "llama.block_count is missing"),
        (patched(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"), "blk.1.ffn_xx.weight is not part of llama"),
        (patched(b"token_embd.weight", b"token_embx.weight"), "token_embd.weight is missing"),
        (patched(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"), "blk.0.ffn_up.weight stands twice"),
        (patched(b"tokenizer.ggml.pre", b"tokenizer.ggml.prx"), "tokenizer.ggml.pre is missing"),
        (patched(struct.pack("<Q", 5) + b"gpt-2", struct.pack("<Q", 5) + b"gpt-9"), "tokenizer.ggml.pre is gpt-9"),
        (patched(struct.pack("<Q", 4) + b"gpt2", struct.pack("<Q", 4) + b"bert"), "tokenizer.ggml.model is bert"),
        (
            patched(struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"lama9"),
            "architecture lama9, expected one of gemma3",
        ),
        # The kind follows a tensor's name and its two lengths.
        (lambda data: with_kind(data, 99), "blk.0.attn_q.weight is of unknown type 99"),
        (lambda data: with_kind(data, int(Kind.IQ2_XS)), "blk.0.attn_q.weight is IQ2_XS, expected one of BF16"),
    ],
)
def test_a_spoilt_file_is_refused_by_name(
    patch: Callable[[bytes], bytes], message: str, gguf_of: FolderOf, tmp_path: Path
) -> None:
    path = tmp_path / "spoilt.gguf"
    path.write_bytes(patch(gguf_of("llama").read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_a_soft_cap_in_gguf_is_refused_by_name(key: str, gguf_of: FolderOf) -> None:
    file = GgufFile(gguf_of("gemma3"))
    file.metadata[f"gemma3.{key}"] = 30.0
    with pytest.raises(CheckpointError, match=rf"{key} is 30\.0"):
        read_spec(config_from_metadata(file, find_family(file)), "capped.gguf")


def with_kind(data: bytes, kind: int) -> bytes:
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    return data[:at] + struct.pack("<I", kind) + data[at + 4 :]


def test_a_part_of_a_split_file_is_refused(gguf_of: FolderOf, tmp_path: Path) -> None:
    path = Path(shutil.copy(gguf_of("llama"), tmp_path / "model-00001-of-00002.gguf"))
    with pytest.raises(CheckpointError, match="one part of a split GGUF"):
        open_checkpoint(str(path))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"model_type": "opt"}, "model_type opt has no place in GGUF"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers"),
        ("gemma3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64"),
        ("llama", {"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ("llama", {"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is not part of llama"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(
    name: str, changes: dict[str, object], message: str, family_folder: FolderOf, tmp_path: Path
) -> None:
    folder = shutil.copytree(family_folder(name), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ExportError, CheckpointError)) as caught:
        write_gguf(open_checkpoint(str(folder)), tmp_path / "out.gguf", "F16")
    assert message in str(caught.value)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".out*"))


def test_weights_that_are_no_numbers_or_too_large_leave_no_file(llama_folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(llama_folder))
    weights = llama_folder / "model.safetensors"
    clean = weights.read_bytes()
    at = checkpoint.tensors._stored["model.norm.weight"].offset  # type: ignore[attr-defined]
    for value, name in ((float("nan"), "model.norm.weight"), (1e9, None)):
        weights.write_bytes(clean[:at] + struct.pack("<f", value) + clean[at + 4 :])
        if name is None:
            # A vector stays float32, which holds it.
            write_gguf(open_checkpoint(str(llama_folder)), tmp_path / "large.gguf", "F16")
            continue
        with pytest.raises(CheckpointError, match=f"{name} has values that are not finite"):
            write_gguf(open_checkpoint(str(llama_folder)), tmp_path / "out.gguf", "F16")
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["large.gguf"]
