"""A checkpoint of any source, written as a GGUF file that llama.cpp loads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from ryot.atomic import fsync
from ryot.errors import CheckpointError, ExportError
from ryot.models.sources.checkpoint import Checkpoint, FloatArray
from ryot.models.sources.gguf_config import metadata_from_config
from ryot.models.sources.gguf_families import FAMILIES, Family, Storing, row_order
from ryot.models.sources.gguf_file import Value
from ryot.models.sources.gguf_rope import llama3_factors, rope_of
from ryot.models.sources.gguf_vocabulary import vocabulary_metadata
from ryot.models.sources.write_hf import check_space

GgufKind: TypeAlias = Literal["F16", "Q8_0"]
#: Buffers of old checkpoints, which no model reads.
_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
#: llama.cpp adds these in float32.
_ALWAYS_F32 = frozenset({"position_embd.weight"})
_NUMPY = {Kind.F32: "f4", Kind.F16: "f2"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """One tensor of the file: where it comes from, and how it is to lie there."""

    name: str
    source: str
    storing: Storing
    shape: tuple[int, ...]
    kind: Kind


def write_gguf(checkpoint: Checkpoint, path: Path, kind: GgufKind) -> None:
    """Write a checkpoint as GGUF, matrices in `kind` and vectors in float32; the file appears whole or not at all.

    One tensor is in memory at a time. Raises `ExportError` for a family, positions or a tokenizer that GGUF cannot
    hold, and `CheckpointError` when the disk is too small or a tensor is missing.
    """
    family = _family_of(checkpoint)
    metadata = metadata_from_config(checkpoint.config, family, checkpoint.where)
    entries = list(_entries(checkpoint, family, metadata, Kind[kind]))
    vocab_size = next(entry.shape[0] for entry in entries if entry.name == "token_embd.weight")
    metadata |= vocabulary_metadata(checkpoint, vocab_size)
    check_space(path, sum(_num_bytes(entry) for entry in entries))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        _write(Path(partial), checkpoint, family, metadata, entries, kind)
        fsync(Path(partial))
        Path(partial).chmod(0o644)
        Path(partial).replace(path)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be written ({error.strerror})") from error
    finally:
        Path(partial).unlink(missing_ok=True)


def _family_of(checkpoint: Checkpoint) -> Family:
    model_type = checkpoint.config.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ExportError(f"checkpoint {checkpoint.where}: model_type {model_type} has no place in GGUF, expected {known}")


def _entries(checkpoint: Checkpoint, family: Family, metadata: dict[str, Value], kind: Kind) -> Iterator[_Entry]:
    num_layers = metadata[f"{family.gguf}.block_count"]
    assert isinstance(num_layers, int)
    known = family.names(num_layers)
    names = checkpoint.names()
    tied = bool(checkpoint.config.get("tie_word_embeddings", family.gguf in ("gpt2", "gemma3")))
    head = f"{family.head}.weight"
    for name in names:
        if name not in known and not name.endswith(_BUFFERS):
            raise CheckpointError(f"checkpoint {checkpoint.where}: tensor {name} is not part of {family.model_type}")
    for name, (stored, storing) in known.items():
        if name not in names:
            if name.endswith(".weight") and not (name == head and tied):
                raise CheckpointError(f"checkpoint {checkpoint.where}: tensor {name} is missing")
            continue
        if name == head and tied:
            continue
        shape = checkpoint.shape(name)
        shape = shape[::-1] if storing is Storing.TRANSPOSED else shape
        yield _Entry(name=stored, source=name, storing=storing, shape=shape, kind=_kind(stored, shape, kind))


def _kind(name: str, shape: tuple[int, ...], kind: Kind) -> Kind:
    if len(shape) < 2 or name in _ALWAYS_F32:
        return Kind.F32
    block_size, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block_size == 0 else Kind.F16


def _num_bytes(entry: _Entry) -> int:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[entry.kind]
    return int(np.prod(entry.shape, dtype=np.int64)) // block_size * block_bytes


def _write(
    path: Path,
    checkpoint: Checkpoint,
    family: Family,
    metadata: dict[str, Value],
    entries: list[_Entry],
    kind: GgufKind,
) -> None:
    writer = gguf.GGUFWriter(path, family.gguf)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(checkpoint.where).stem or checkpoint.where)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "F16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        _add_value(writer, key, value)
    positions = _llama3_positions(checkpoint, family, metadata)
    if positions is not None:
        writer.add_tensor_info("rope_freqs.weight", positions.shape, positions.dtype, positions.nbytes, Kind.F32)
    for entry in entries:
        # Of blocks the writer takes the shape in bytes, of numbers that in values.
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[entry.kind]
        shape = entry.shape if block_size == 1 else (*entry.shape[:-1], entry.shape[-1] // block_size * block_bytes)
        dtype = np.dtype(_NUMPY.get(entry.kind, "u1"))
        writer.add_tensor_info(entry.name, shape, dtype, _num_bytes(entry), entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if positions is not None:
        writer.write_tensor_data(positions)
    for entry in entries:
        writer.write_tensor_data(_encode(checkpoint, entry, metadata, family.gguf))
    writer.close()


def _encode(
    checkpoint: Checkpoint, entry: _Entry, metadata: dict[str, Value], arch: str
) -> NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint8]:
    values = checkpoint.load(entry.source)
    if not np.isfinite(values).all():
        raise CheckpointError(f"checkpoint {checkpoint.where}: tensor {entry.source} has values that are not finite")
    if entry.storing is Storing.LESS_ONE:
        values += 1.0
    elif entry.storing is Storing.TRANSPOSED:
        values = np.ascontiguousarray(values.T)
    heads, kv_heads = (metadata.get(f"{arch}.attention.{name}", 1) for name in ("head_count", "head_count_kv"))
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    order = row_order(entry.storing, len(values), heads, kv_heads)
    if order is not None:
        moved = np.empty_like(values)
        moved[order] = values
        values = moved
    if entry.kind is Kind.F32:
        return values
    if entry.kind is Kind.Q8_0:
        return gguf.quants.quantize(values, Kind.Q8_0)
    half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ExportError(f"checkpoint {checkpoint.where}: tensor {entry.source} has values above float16's 65504")
    return half


def _llama3_positions(checkpoint: Checkpoint, family: Family, metadata: dict[str, Value]) -> FloatArray | None:
    rope = rope_of(checkpoint.config)
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    theta, head_dim = metadata[f"{family.gguf}.rope.freq_base"], metadata[f"{family.gguf}.rope.dimension_count"]
    assert isinstance(theta, float) and isinstance(head_dim, int)
    return llama3_factors(rope, theta, head_dim)


def _add_value(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
