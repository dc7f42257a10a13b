"""Makes everything that `edge_vs_peers.py` compares, of one size, from one checkpoint of random weights.

    python benchmarks/peer_models.py S FOLDER CORE

In FOLDER/S: `checkpoint/` (Hugging Face layout), a bundle per artifact, with a float32 and with an int8 cache, bundles
in genai's default blocks, `plain/plain.onnx`, GGUF files, and `models.json`, which says what there is, what the tool
would choose for this CPU, and how many bytes of weights a decode step of each artifact reads. What is there is not made
again, but for bundles of another checkpoint or decision of the tool, or made by another version of `ryot/deploy`.

Random weights have the speed of trained ones and none of their quality. Their spread keeps greedy decoding from
running in circles, and the row of the head that belongs to end-of-text is 0, so that no engine ever stops early.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_verdicts import KV8
from tokenizers import Tokenizer, models

import ryot.deploy
from ryot.config import ModelConfig, digest
from ryot.deploy.export import FLOAT_CACHE, ExportOptions, export_unscored
from ryot.deploy.plain import export_plain
from ryot.deploy.precisions import STANDARD_GRAPH, num_bytes, quantize_matrices
from ryot.deploy.quantize import CacheFormat, observe_kv_scales
from ryot.deploy.settings import ExportSettings
from ryot.deploy.standard import StandardGraph
from ryot.deploy.tune import choose_inference, format_decision
from ryot.deploy.verify import SAFETY, greedy, reference_logits
from ryot.deploy.weights import load_decoder_weights
from ryot.models.sources.folder import open_folder
from ryot.models.spec import DecoderSpec
from ryot.train.checkpoint import checkpoint_digest, load_model, load_weights, save_checkpoint
from ryot.train.model import Decoder
from ryot.train.tokenizer import END_OF_TEXT, END_OF_TEXT_ID

SIZES = {
    "S": ModelConfig(
        architecture="llama",
        vocab_size=2048,
        dim=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        ff_dim=512,
        max_seq_len=256,
        tie_embeddings=False,
    ).spec,
    "M": ModelConfig(
        architecture="llama",
        vocab_size=8192,
        dim=512,
        num_layers=6,
        num_heads=8,
        num_kv_heads=8,
        ff_dim=2048,
        max_seq_len=512,
        tie_embeddings=False,
    ).spec,
    "L": ModelConfig(
        architecture="llama",
        vocab_size=49_152,
        dim=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        ff_dim=1536,
        max_seq_len=512,
        tie_embeddings=True,
    ).spec,
}
PROMPT_TOKENS = 128
#: Tokens that every fp32 artifact must make alike.
CHECK_TOKENS = 32
#: onnxruntime-genai's own model builder quantizes in blocks of 32 unless told otherwise.
GENAI_BLOCK = 32
#: Our quantized artifacts.
ARTIFACTS = ("int8-dyn", "int8", "int4", "int8-dyn+int8", "int8-dyn+int4")
#: Random prompts, as long as the context, that the range of keys and values is taken from.
KV_PROMPTS = 4
#: Standard deviation of the untied tables' values; a head of 1.5 spreads the logits.
EMBEDDING_SPREAD, HEAD_SPREAD = 0.5, 1.5
#: GGUF file types: (tensor type of the matrices, `general.file_type`).
GGUF_TYPES = {"F32": ("F32", 0), "Q8_0": ("Q8_0", 7), "Q4_0": ("Q4_0", 2)}


def draw_prompt(cfg: DecoderSpec, number: int, length: int = PROMPT_TOKENS) -> list[int]:
    """Prompt `number` of a size: uniform ids, never end-of-text."""
    return np.random.default_rng((7, number)).integers(1, cfg.vocab_size, length).tolist()


def main() -> None:
    size, folder, core = sys.argv[1], Path(sys.argv[2]) / sys.argv[1], int(sys.argv[3])
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    cfg = SIZES[size]
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        _tell(size, "checkpoint")
        save_checkpoint(checkpoint, spec=cfg, state=draw_state(cfg), tokenizer_json=_tokenizer(cfg.vocab_size))
    _tell(size, "tuning")
    decision = choose_inference(cfg, folder)
    made = {
        "decision": {**dataclasses.asdict(decision), "text": format_decision(decision)},
        "bundles": _export_bundles(size, checkpoint, folder, decision.settings),
        "plain": str(_once(folder / "plain", functools.partial(_export_plain, checkpoint)) / "plain.onnx"),
        "gguf": _write_ggufs(cfg, checkpoint, folder),
        "reference": _reference(cfg, checkpoint),
        "read_bytes": _read_bytes(cfg, checkpoint, decision.settings),
        "parameters": cfg.num_parameters,
    }
    (folder / "models.json").write_text(json.dumps(made, indent=1) + "\n")


@torch.no_grad()
def draw_state(cfg: DecoderSpec) -> dict[str, torch.Tensor]:
    """Seeded weights for `Decoder`, matrices of a deviation of 1 / sqrt(inputs), norms of 1."""
    generator = torch.Generator().manual_seed(0)
    model = Decoder(cfg)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        scale = parameter.shape[1] ** -0.5
        if not cfg.tie_embeddings:
            scale = {"embedding.weight": EMBEDDING_SPREAD, "head.weight": HEAD_SPREAD * scale}.get(name, scale)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.head_weight_VE(model.table_VE)[END_OF_TEXT_ID] = 0.0
    return model.state_dict()


def _export_bundles(size: str, checkpoint: Path, folder: Path, options: ExportSettings) -> dict[str, str]:
    """Bundles by name: an artifact, `genai ARTIFACT` in genai's blocks, `ARTIFACT kv8` with an int8 cache."""
    cfg = SIZES[size]
    code = [path.read_text() for path in sorted(Path(ryot.deploy.__file__).parent.glob("*.py"))]
    origin = [checkpoint_digest(checkpoint), *code]
    prompts = np.asarray([draw_prompt(cfg, i, cfg.max_seq_len) for i in range(KV_PROMPTS)], dtype=np.int64)
    made: dict[str, str] = {}

    def export(name: str, quantize: ExportSettings, cache: CacheFormat = FLOAT_CACHE) -> None:
        target = folder / "bundles" / name.replace(" ", "-") / digest(quantize, origin)[:16]
        if not target.exists():
            _tell(size, name)
            shutil.rmtree(target.parent, ignore_errors=True)  # made under another decision, or by another version
            precision = name.removeprefix("genai ").removesuffix(KV8)
            what = ExportOptions(settings=quantize)
            export_unscored(open_folder(checkpoint), precision, target, options=what, prompts=prompts[:1], cache=cache)
        made[name] = str(target)

    for artifact in ("fp32", *ARTIFACTS):
        export(artifact, options)
    for precision in ("int8", "int4"):
        export(
            f"genai {precision}",
            dataclasses.replace(options, int8_block_size=GENAI_BLOCK, int4_block_size=GENAI_BLOCK),
        )
    observed = observe_kv_scales(StandardGraph(Path(made["fp32"]) / STANDARD_GRAPH), prompts)
    cache = CacheFormat(scales=observed.per_tensor(), record={"method": "per-tensor"})
    for artifact in ARTIFACTS:
        export(artifact + KV8, dataclasses.replace(options, kv_dtype="int8"), cache)
    return made


def _export_plain(checkpoint: Path, folder: Path) -> None:
    folder.mkdir()
    export_plain(load_model(checkpoint), folder / "plain.onnx")


def _reference(cfg: DecoderSpec, checkpoint: Path) -> dict[str, Any]:
    """Torch's greedy tokens after prompt 0, its margins, and the margin below which a token decides nothing."""
    model = load_model(checkpoint)
    prompt = np.asarray([draw_prompt(cfg, 0)], dtype=np.int64)
    tokens, margins = greedy(model, prompt, CHECK_TOKENS)
    _, error = reference_logits(model, np.concatenate((prompt, tokens), axis=1))
    return {"tokens": tokens[0].tolist(), "margins": margins[0].tolist(), "tolerance": SAFETY * error}


def _read_bytes(cfg: DecoderSpec, checkpoint: Path, options: ExportSettings) -> dict[str, int]:
    """Bytes of weights that one decode step reads: all matrices, of an embedding that is no head only a row."""
    weights = load_decoder_weights(open_folder(checkpoint))
    found = {}
    for precision in ("fp32", "int8-dyn", "int8", "int4"):
        matrices = quantize_matrices(weights, precision, options)
        found[precision] = num_bytes({n: m for n, m in matrices.items() if cfg.tie_embeddings or n != "embedding"})
    return found


def _write_ggufs(cfg: DecoderSpec, checkpoint: Path, folder: Path) -> dict[str, str]:
    """GGUF files by type; none where the `gguf` package is missing."""
    if importlib.util.find_spec("gguf") is None:
        return {}
    tensors = load_weights(checkpoint)
    return {
        kind: str(_once(folder / f"{kind}.gguf", functools.partial(write_gguf, cfg, tensors, kind)))
        for kind in GGUF_TYPES
    }


def write_gguf(cfg: DecoderSpec, tensors: Mapping[str, np.ndarray], kind: str, path: Path) -> None:
    """A llama model for llama.cpp; every matrix in one type, as in our own artifacts, norms in float32.

    `tensors` have Hugging Face's names. llama.cpp pairs neighbouring rotary dimensions where Hugging Face pairs the
    two halves of a head, so rows of queries and keys change places (llama.cpp, convert_hf_to_gguf.py, `permute`).
    """
    import gguf
    from gguf.quants import quantize

    name, file_type = GGUF_TYPES[kind]
    tensor_type = gguf.GGMLQuantizationType[name]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(cfg.max_seq_len)
    writer.add_embedding_length(cfg.dim)
    writer.add_block_count(cfg.num_layers)
    writer.add_feed_forward_length(cfg.ff_dim)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}".encode() for i in range(cfg.vocab_size)])
    writer.add_token_scores([0.0] * cfg.vocab_size)
    writer.add_token_types([1] * cfg.vocab_size)
    writer.add_bos_token_id(END_OF_TEXT_ID)
    writer.add_eos_token_id(END_OF_TEXT_ID)
    for theirs, values in _gguf_tensors(cfg, tensors):
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(theirs, np.ascontiguousarray(values, dtype=np.float32))
        else:
            writer.add_tensor(theirs, quantize(np.ascontiguousarray(values), tensor_type), raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_tensors(cfg: DecoderSpec, tensors: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
        return rows.reshape(heads, 2, cfg.head_dim // 2, -1).swapaxes(1, 2).reshape(rows.shape)

    pairs = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    found = [("token_embd.weight", tensors["model.embed_tokens.weight"])]
    found.append(("output_norm.weight", tensors["model.norm.weight"]))
    if not cfg.tie_embeddings:
        found.append(("output.weight", tensors["lm_head.weight"]))
    for layer in range(cfg.num_layers):
        for theirs, ours in pairs.items():
            values = tensors[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                values = neighbours(values, cfg.num_heads if theirs == "attn_q" else cfg.num_kv_heads)
            found.append((f"blk.{layer}.{theirs}.weight", values))
    return found


def _tokenizer(vocab_size: int) -> bytes:
    """One word an id: the files of a bundle are complete, no text passes through."""
    words = {END_OF_TEXT: END_OF_TEXT_ID} | {f"t{i}": i for i in range(1, vocab_size)}
    return Tokenizer(models.WordLevel(words, unk_token=END_OF_TEXT)).to_str().encode()


def _once(path: Path, build: Callable[[Path], object]) -> Path:
    """The file or folder `path`, built unless it is there; it appears whole."""
    if not path.exists():
        _tell(path.parent.name, path.name)
        partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
        build(partial)
        partial.replace(path)
    return path


def _tell(size: str, what: str) -> None:
    print(f"{size}: making {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
