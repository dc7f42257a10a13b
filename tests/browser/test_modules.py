"""The page's modules beside their Python counterparts: chat templates, sampling, unpacked matrices."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from ryot.edge.chat import ChatTemplate
from ryot.edge.sampling import reference_choice
from ryot.edge.sampling_params import SamplingParams
from ryot.errors import ConfigError

from .conftest import Run

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SECTIONS = """{{- bos_token }}
{%- if tools is not none %}{{ tools | tojson }}{% endif %}
{%- set ns = namespace(first=true) %}
{%- for message in messages %}
    {%- if message.role == "system" %}
        {{- raise_exception("no system messages") }}
    {%- endif %}
    {%- if (message.role == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("turns must alternate") }}{% endif %}
    {%- if ns.first %}{% set ns.first = false %}[{{ message | tojson }}]{% endif %}
    {{- "\\n### " ~ message.role | upper ~ ": " ~ message.content | trim }}
    {%- if not loop.last %}{{ eos_token }}{% endif %}
{%- endfor %}
{% generation %}{% endgeneration %}
{%- if add_generation_prompt is defined and add_generation_prompt %}{{ "\\n### ASSISTANT:" }}{% endif %}
"""
TALKS = [
    [{"role": "user", "content": '  Grüße <|im_end|> "quoted" {{ x }}\n'}],
    [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b 🙂"), ("user", "c\n\n"))],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
    [{"role": "user", "content": ""}, {"role": "user", "content": "twice"}],
]


@pytest.mark.parametrize("source", [CHATML, SECTIONS], ids=["chatml", "sections"])
def test_templates_are_rendered_as_jinja2_does(source: str, run_module: Run) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    code = """
        const { ChatTemplate } = modules;
        const template = new ChatTemplate(source, tokens);
        return talks.map(talk => { try { return template.render(talk); } catch (error) { return error; } })
          .map(found => found instanceof Error ? {error: found.message} : found);
    """
    found = run_module(code, source=source, tokens=tokens, talks=TALKS)
    template = ChatTemplate(source, tokens, "here")
    for talk, text in zip(TALKS, found, strict=True):
        try:
            assert text == template.render(talk)
        except ConfigError as error:
            assert str(error).rpartition(": ")[2] in text["error"]


def test_tokens_are_chosen_as_python_chooses_them(run_module: Run) -> None:
    rng = np.random.default_rng(0)
    # Equal logits are in it, which the lower id must win.
    logits = (rng.standard_normal((4, 700)) * 3).round(1).astype(np.float32)
    grid = itertools.product((0.0, 0.7, 2.0), (0, 1, 40), (1.0, 0.9, 0.3), (0.0, 0.2))
    params = [dict(zip(("temperature", "topK", "topP", "minP"), values)) for values in grid]
    points = [0.0, *rng.random(6).tolist(), 0.999999]
    code = """
        const { chooseToken } = modules;
        return logits.map(row => params.map(p => points.map(at => chooseToken(Float32Array.from(row), p, at))));
    """
    found = run_module(code, logits=logits.tolist(), params=params, points=points)
    for row, by_params in zip(logits, found, strict=True):
        for p, chosen in zip(params, by_params, strict=True):
            if p["temperature"] == 0:
                assert chosen == [int(row.argmax())] * len(points)
                continue
            ours = SamplingParams(temperature=p["temperature"], top_k=p["topK"], top_p=p["topP"], min_p=p["minP"])
            assert chosen == [reference_choice(row, ours, at) for at in points], p


N, K = 24, 80
#: What a graph of one quantized product looks like, by what is special about it.
PRODUCTS = {
    "4 bits": {"bits": 4, "block_size": 32},
    "4 bits, zeros": {"bits": 4, "block_size": 16, "zeros": True},
    "8 bits": {"bits": 8, "block_size": 128},
    "8 bits, zeros, bias": {"bits": 8, "block_size": 32, "zeros": True, "bias": True},
}


def blocks_graph(
    rng: np.random.Generator, *, bits: int, block_size: int, zeros: bool = False, bias: bool = False
) -> onnx.ModelProto:
    """A product in blocks; the last one of a row is padded. Level 0 of accuracy multiplies in float32."""
    blocks = -(-K // block_size)
    constants = {
        "codes": rng.integers(0, 256, (N, blocks, block_size * bits // 8), np.uint8),
        "scales": rng.random((N, blocks), np.float32),
    }
    if zeros:
        constants["zeros"] = rng.integers(0, 256, (N, -(-blocks * bits // 8)), np.uint8)
    if bias:
        constants["bias"] = rng.random(N, np.float32)
    names = ["x", "codes", "scales", "zeros" if zeros else "", "", "bias" if bias else ""]
    sizes = {"bits": bits, "block_size": block_size, "N": N, "K": K}
    return one_node_model("MatMulNBits", names, constants, accuracy_level=0, **sizes)


def one_node_model(op: str, inputs: list[str], constants: dict[str, np.ndarray], **attributes: int) -> onnx.ModelProto:
    node = helper.make_node(op, inputs, ["y"], domain="com.microsoft", name="y", **attributes)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["S", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["S", N])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


EXPAND = """
    const change = modules[name];
    const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
    const text = bytes => btoa(Array.from(bytes, b => String.fromCharCode(b)).join(''));
    const { model: written, files } = change(bytes(model), new Map([['model.onnx.data', bytes(data)]]));
    return {model: text(written), files: [...files].filter(([name]) => name.includes('/'))
      .map(([name, file]) => [name, text(file.subarray(0, file.byteLength))])};
"""


def expand(
    run_module: Run, folder: Path, model: onnx.ModelProto, *, external: bool, name: str = "expandMatrices"
) -> tuple[Path, list[str]]:
    """The file of the graph as the page changes it, and the operators in it."""
    data = b""
    if external:
        onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
        model = onnx.load(folder / "m.onnx", load_external_data=False)
        data = (folder / "model.onnx.data").read_bytes()
    encode = lambda raw: base64.b64encode(raw).decode()  # noqa: E731
    found = run_module(EXPAND, name=name, model=encode(model.SerializeToString()), data=encode(data))
    for file, values in found["files"]:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(base64.b64decode(values))
    path = folder / "expanded.onnx"
    path.write_bytes(base64.b64decode(found["model"]))
    return path, [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_unpacked_matrices_multiply_as_packed_ones(kind: str, external: bool, run_module: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = blocks_graph(rng, **PRODUCTS[kind])
    expected = ort.InferenceSession(model.SerializeToString())
    path, operators = expand(run_module, tmp_path, model, external=external)
    assert operators[0] == "FusedMatMul"
    x = rng.standard_normal((3, K)).astype(np.float32)
    y, z = (session.run(None, {"x": x})[0] for session in (expected, ort.InferenceSession(path)))
    # Both are sums of 80 products in float32, in two orders: 80 roundings of 2**-24 of the largest sum at most.
    assert np.abs(y - z).max() <= 80 * 2.0**-24 * np.abs(y).max()


@pytest.mark.parametrize("per_column", [False, True])
def test_products_of_rounded_tokens_are_unpacked(per_column: bool, run_module: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    constants = {
        "codes": rng.integers(-127, 128, (K, N)).astype(np.int8),
        "scales": rng.random(N if per_column else 1, np.float32),
        "step": np.array(1 / 127, np.float32),
        "zero": np.array(128, np.uint8),
    }
    model = one_node_model("MatMulIntegerToFloat", ["q", "codes", "step", "scales", "zero"], constants)
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]))
    path, operators = expand(run_module, tmp_path, model, external=True)
    assert operators == ["QuantizeLinear", "FusedMatMul"]
    x = rng.uniform(-1, 1, (3, K)).astype(np.float32)
    y = x.astype(np.float64) @ (constants["codes"] * constants["scales"].astype(np.float64))
    z = ort.InferenceSession(path).run(None, {"x": x})[0]
    assert np.abs(y - z).max() <= 80 * 2.0**-24 * np.abs(y).max()


@pytest.mark.parametrize("per_column", [False, True])
def test_dynamic_products_are_unpacked_too(per_column: bool, run_module: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    constants = {
        "codes": rng.integers(-127, 128, (K, N)).astype(np.int8),
        "scales": rng.random(N if per_column else 1, np.float32),
        "bias": rng.random(N, np.float32),
    }
    model = one_node_model("DynamicQuantizeMatMul", ["x", "codes", "scales", "", "bias"], constants)
    path, operators = expand(run_module, tmp_path, model, external=True)
    assert operators == ["FusedMatMul", "Add"]
    x = rng.standard_normal((3, K)).astype(np.float32)
    y = x.astype(np.float64) @ (constants["codes"] * constants["scales"].astype(np.float64)) + constants["bias"]
    z = ort.InferenceSession(path).run(None, {"x": x})[0]
    assert np.abs(y - z).max() <= 80 * 2.0**-24 * np.abs(y).max()


def test_embeddings_without_zero_points_are_the_same(run_module: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, width, size = 40, 64, 16
    constants = {
        "codes": rng.integers(0, 256, (rows, width // 2), np.uint8),
        "scales": rng.random((rows, width // size), np.float32),
        "zeros": rng.integers(0, 256, (rows, width // size // 2), np.uint8),
    }
    attributes = {"bits": 4, "block_size": size, "gather_axis": 0, "quantize_axis": 1}
    node = helper.make_node(
        "GatherBlockQuantized", ["codes", "ids", "scales", "zeros"], ["y"], domain="com.microsoft", **attributes
    )
    graph = helper.make_graph(
        [node],
        "embedding",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["S"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["S", width])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    path, operators = expand(run_module, tmp_path, model, external=True, name="centerEmbeddings")
    assert operators == ["GatherBlockQuantized"]
    (changed,) = onnx.load(path, load_external_data=False).graph.node
    assert len(changed.input) == 3
    ids = {"ids": np.arange(rows)}
    y, z = (ort.InferenceSession(m).run(None, ids)[0] for m in (tmp_path / "m.onnx", path))
    assert np.array_equal(y, z)
