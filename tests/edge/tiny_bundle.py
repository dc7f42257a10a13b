"""Small real bundles with random weights: two decoder layers, a byte-level tokenizer, graphs for onnxruntime.

The graphs are written here with `onnx.helper`, apart from `ryot.deploy`, so that the runtime is tested against the
contract and not against the code that usually writes bundles.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ryot.edge.bundle import Bundle, load_bundle
from ryot.edge.session import OnnxruntimeEngine

#: Heads are wider than DIM / HEADS, as some families' are.
VOCAB, DIM, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FF, CONTEXT = 384, 64, 2, 4, 2, 32, 96, 64
#: Of an int8 cache: keys and values are about 1 in size.
KV_SCALE = 4 / 127
TEXT = "def add(a, b):\n    return a + b\n\nclass Naïve:\n    '''Grüße, 日本語 and 🙂🙃'''\n" * 4


class GraphWriter:
    """Collects nodes and initializers; initializers are shared between graphs by name."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights, self.nodes, self.used = weights, [], {}

    def weight(self, name: str) -> str:
        self.used[name] = self.weights[name]
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        self.used[name] = value
        return name

    def op(self, kind: str, inputs: list[str], output: str, *more: str, domain: str = "", **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output, *more], name=output, domain=domain, **attributes))
        return output

    def linear(self, x: str, name: str) -> str:
        return self.op("MatMul", [x, self.weight(name)], f"{name}.out")


def random_weights(seed: int, context: int = CONTEXT) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def matrix(rows: int, cols: int) -> np.ndarray:
        return (rng.standard_normal((rows, cols)) / np.sqrt(rows)).astype(np.float32)

    weights = {"embed": rng.standard_normal((VOCAB, DIM)).astype(np.float32)}
    weights["positions"] = rng.standard_normal((context, DIM)).astype(np.float32)
    weights["head"] = matrix(DIM, VOCAB) * 2
    for layer in range(LAYERS):
        weights[f"{layer}.qkv"] = matrix(DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        weights[f"{layer}.o"] = matrix(HEADS * HEAD_DIM, DIM)
        weights[f"{layer}.up"] = matrix(DIM, FF)
        weights[f"{layer}.down"] = matrix(FF, DIM)
    for norm in [f"{layer}.norm{i}" for layer in range(LAYERS) for i in (1, 2)] + ["norm"]:
        weights[norm] = np.ones(DIM, np.float32)
    angles = np.outer(np.arange(context), 1 / 10_000 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    weights["cos"], weights["sin"] = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return weights


def write_graph(
    weights: dict[str, np.ndarray],
    *,
    standard: bool,
    position_ids: bool,
    kv_dtype: str = "float32",
    window: int | None = None,
    rounds_behind: bool = False,
) -> onnx.ModelProto:
    """A pre-norm decoder; `standard` takes an attention mask and gives the logits of all positions.

    With `window` a token attends to itself and the `window - 1` tokens before it. With `rounds_behind` new tokens
    attend to each other in float32, and their keys and values are rounded to an int8 cache only then.
    """
    g = GraphWriter(weights)
    ms = "com.microsoft"
    if standard:
        g.constant("axis", np.array([1], np.int64)), g.constant("one", np.array([1], np.int64))
        g.op("ReduceSum", ["attention_mask", "axis"], "mask.sum", keepdims=0)
        g.op("Cast", [g.op("Sub", ["mask.sum", "one"], "mask.last")], "seqlens_k", to=TensorProto.INT32)
        g.op("Shape", ["attention_mask"], "mask.shape")
        g.op("Gather", ["mask.shape", g.constant("index", np.array(1, np.int64))], "mask.total", axis=0)
        g.op("Cast", ["mask.total"], "total_sequence_length", to=TensorProto.INT32)
    x = g.op("Gather", [g.weight("embed"), "input_ids"], "x")
    if position_ids:
        x = g.op("Add", [x, g.op("Gather", [g.weight("positions"), "position_ids"], "x.pos")], "x.sum")
    if rounds_behind:
        g.constant("0", np.array([0], np.int64)), g.constant("2", np.array([2], np.int64))
        g.constant("scale", np.array(KV_SCALE, np.float32)), g.constant("zero", np.array(0, np.int8))
        g.op("Cast", ["total_sequence_length"], "total", to=TensorProto.INT64)
        g.op("Sub", ["total", g.op("Shape", ["input_ids"], "new", start=1, end=2)], "past_length")
        g.op("Sub", [g.op("Shape", ["past_key_values.0.key"], "room", start=2, end=3), "total"], "unused")
        g.op("Concat", ["0", "unused"], "pads", axis=0)
    values = {}
    for layer in range(LAYERS):
        p = f"{layer}"
        h = g.op("SimplifiedLayerNormalization", [x, g.weight(f"{p}.norm1")], f"{p}.h1", axis=-1, epsilon=1e-5)
        past = [f"past_key_values.{p}.key", f"past_key_values.{p}.value"]
        inputs = [g.linear(h, f"{p}.qkv"), "", "", *past, "seqlens_k", "total_sequence_length"]
        inputs += ["", ""] if position_ids else [g.weight("cos"), g.weight("sin")]
        attributes: dict[str, object] = {
            "num_heads": HEADS,
            "kv_num_heads": KV_HEADS,
            "do_rotary": int(not position_ids),
        }
        if rounds_behind:
            for at, name in enumerate(past):
                cut = g.op("Slice", [name, "0", "past_length", "2"], f"{name}.cut")
                inputs[3 + at] = g.op("DequantizeLinear", [cut, "scale", "zero"], f"{name}.float")
        elif kv_dtype == "int8":
            scale = g.constant("kv_scale", np.full(1, KV_SCALE, np.float32))
            inputs += ["", "", "", scale, scale]
            attributes |= {"kv_cache_bit_width": 8, "k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"}
        if window is not None:
            attributes["local_window_size"] = window
        present = [f"present.{p}.key", f"present.{p}.value"]
        made = [f"{name}.float" for name in present] if rounds_behind else present
        a = g.op("GroupQueryAttention", inputs, f"{p}.attn", *made, domain=ms, **attributes)
        for name in present if rounds_behind else ():
            codes = g.op("QuantizeLinear", [f"{name}.float", "scale", "zero"], f"{name}.codes")
            g.op("Pad", [codes, "pads", "", "2"], name)
        x = g.op("Add", [x, g.linear(a, f"{p}.o")], f"{p}.x1")
        h = g.op("SimplifiedLayerNormalization", [x, g.weight(f"{p}.norm2")], f"{p}.h2", axis=-1, epsilon=1e-5)
        h = g.op("QuickGelu", [g.linear(h, f"{p}.up")], f"{p}.act", domain=ms, alpha=1.0)
        x = g.op("Add", [x, g.linear(h, f"{p}.down")], f"{p}.x2")
        values |= {name: ["B", KV_HEADS, "T", HEAD_DIM] for name in past + present}
    if not standard:
        x = g.op("Gather", [x, g.constant("last", np.array([-1], np.int64))], "x.last", axis=1)
    x = g.op("SimplifiedLayerNormalization", [x, g.weight("norm")], "h", axis=-1, epsilon=1e-5)
    g.op("MatMul", [x, g.weight("head")], "logits")

    def info(name: str, shape: list[object], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [info("input_ids", ["B", "S"], TensorProto.INT64)]
    if position_ids:
        inputs.append(info("position_ids", ["B", "S"], TensorProto.INT64))
    if standard:
        inputs.append(info("attention_mask", ["B", "A"], TensorProto.INT64))
    else:
        inputs += [info("seqlens_k", ["B"], TensorProto.INT32), info("total_sequence_length", [], TensorProto.INT32)]
    cache = TensorProto.INT8 if kv_dtype == "int8" else TensorProto.FLOAT
    inputs += [info(name, shape, cache) for name, shape in values.items() if name.startswith("past")]
    outputs = [info("logits", ["B", "S" if standard else 1, VOCAB])]
    if not standard:
        g.op("ArgMax", ["logits"], "next_token", axis=-1, keepdims=0)
        outputs.append(info("next_token", ["B", 1], TensorProto.INT64))
    outputs += [info(name, shape, cache) for name, shape in values.items() if name.startswith("present")]
    initializers = [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in g.used.items()]
    graph = helper.make_graph(g.nodes, "decoder", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(ms, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def share_data(graphs: dict[str, onnx.ModelProto], folder: Path) -> None:
    """Write the graphs with their weights in one external data file."""
    places: dict[str, tuple[int, int]] = {}
    with (folder / "model.onnx.data").open("wb") as data:
        for graph in graphs.values():
            for tensor in graph.graph.initializer:
                if len(tensor.raw_data) < 256:
                    continue
                if tensor.name not in places:
                    data.seek(-data.tell() % 4096, 1)
                    places[tensor.name] = (data.tell(), len(tensor.raw_data))
                    data.write(tensor.raw_data)
                offset, length = places[tensor.name]
                onnx.external_data_helper.set_external_data(tensor, "model.onnx.data", offset, length)
                tensor.ClearField("raw_data")
    for name, graph in graphs.items():
        (folder / name).write_bytes(graph.SerializeToString())


def write_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(path))


def write_manifest(folder: Path, **fields: object) -> None:
    """(Re)write the manifest so that it fits the files in `folder`."""
    path = folder / "ryot_manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {}
    manifest |= fields
    manifest["files"] = {
        f.name: {"sha256": hashlib.sha256(f.read_bytes()).hexdigest(), "bytes": f.stat().st_size}
        for f in sorted(folder.iterdir())
        if f != path
    }
    path.write_text(json.dumps(manifest))


def write_bundle(
    folder: Path,
    *,
    position_ids: bool = False,
    two_sessions: bool = False,
    seed: int = 0,
    context: int = CONTEXT,
    kv_dtype: str = "float32",
    window: int | None = None,
) -> Path:
    """A bundle with golden prompts that the engine itself gave; random prompts stand in for held-out text."""
    folder.mkdir(parents=True)
    weights = random_weights(seed, context)
    kind: dict[str, Any] = {"position_ids": position_ids, "kv_dtype": kv_dtype, "window": window}
    fast = write_graph(weights, standard=False, **kind)
    graphs = {"model.onnx": write_graph(weights, standard=True, **kind)}
    names = ("prefill.onnx", "decode.onnx") if two_sessions else ("fast.onnx",)
    for name in names:
        graphs[name] = onnx.ModelProto.FromString(fast.SerializeToString())
    if two_sessions and kv_dtype == "int8":
        graphs["prefill.onnx"] = write_graph(weights, standard=False, rounds_behind=True, **kind)
    share_data(graphs, folder)
    write_tokenizer(folder / "tokenizer.json")
    rng = np.random.default_rng(seed + 1)
    write_manifest(
        folder,
        schema=1,
        name=f"tiny-{seed}",
        variant="tiny",
        seed=seed,
        precision="fp32",
        model={
            "architecture": "opt" if position_ids else "llama",
            "vocab_size": VOCAB,
            "dim": DIM,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "num_kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "ff_dim": FF,
            "context_length": context,
            "num_parameters": sum(w.size for w in weights.values()),
            "tie_embeddings": False,
        },
        graphs={"standard": "model.onnx", "prefill": names[0], "decode": names[-1]},
        position_ids=position_ids,
        kv_dtype=kv_dtype,
        eos_token_ids=[0],
        bos_token_id=0,
        opset=21,
        onnxruntime_min="1.20",
        golden=[],
        tolerance=1e-3,
        prompts=rng.integers(1, 300, (8, context)).tolist(),
        quantization={},
        quality={},
        provenance={},
        config={},
    )
    write_manifest(folder, golden=[golden_prompt(load_bundle(folder), rng.integers(1, 300, n)) for n in (5, 20)])
    return folder


def golden_prompt(bundle: Bundle, ids: np.ndarray, num_tokens: int = 12) -> dict[str, object]:
    decoder = OnnxruntimeEngine(bundle)
    decoder.prefill(ids[None])
    tokens, margins = [], []
    for _ in range(num_tokens):
        second, best = np.sort(decoder.logits[0])[-2:]
        tokens.append(int(decoder.next_token[0]))
        margins.append(float(best - second))
        decoder.step()
    return {"ids": ids.tolist(), "tokens": tokens, "margins": margins}
