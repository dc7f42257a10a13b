"""KernelOptimizer, the inference half: times the weight formats on this CPU for one shape, and chooses.

Speed does not depend on what the weights say, so random ones of the right shape serve: each candidate is a real bundle
of graphs run by the device's own engine. All candidates are loaded at once and take turns, so that a drifting
machine slows them alike; of each its best turn counts, for whatever else runs on the machine can only add time.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.random  # loaded when first used otherwise, and a Ctrl-C in the middle of that is swallowed
import onnxruntime as ort

from ryot.config import USUAL_PRECISIONS, GraphAttention, digest
from ryot.decisions import recall
from ryot.deploy import bundle
from ryot.deploy.datafile import DataFile
from ryot.deploy.graph import build_graph
from ryot.deploy.matrices import (
    BlockMatrix,
    DynamicMatrix,
    FloatMatrix,
    Matrix,
)
from ryot.deploy.precisions import serialize
from ryot.deploy.settings import ExportSettings
from ryot.deploy.weights import DecoderWeights
from ryot.edge.bundle import DATA_NAME, GRAPH_ROLES, load_bundle
from ryot.edge.machine import CpuFacts, describe_cpu
from ryot.edge.session import OnnxruntimeEngine
from ryot.models.block_sizes import block_size_for
from ryot.models.spec import DecoderSpec, layer_shapes, parameter_shapes
from ryot.scratch import scratch_folder

log = logging.getLogger(__name__)

#: What was decided by an older method is not taken over.
SCHEMA = 4
BLOCK_SIZES = (32, 64, 128, 256)
#: A candidate must be this much faster than the one preferred without measuring; less is noise.
MIN_GAIN = 1.03
#: A second copy of the weights must pay this much of a request's time.
MIN_PAIR_GAIN = 1.10
#: Turns of each candidate, at least, and seconds after which no further turn begins.
MIN_TURNS, MAX_TURNS, TURNS_S = 4, 16, 3.0
DECODE_STEPS = 24
#: All scores of a full prompt, one row, at once take at most this; above it only `flash`, which needs no such room, is
#: tried. The rows of a batch go through such a graph one after the other.
MAX_SCORE_BYTES = 32_000_000
#: Precision, block size, and how the graph attends.
_Format = tuple[str, int, GraphAttention]
#: What is timed of a large model: parameters inside the layers, values of a table, and context, at most. A few layers
#: are as fast as many, since a layer's weights are in no cache when it comes round again.
MAX_LAYER_PARAMETERS, MAX_TABLE_VALUES, MAX_CONTEXT = 16_000_000, 8_000_000, 256
#: Tokens that a request generates for each one of its prompt, when prefill and decode are weighed.
ANSWER_SHARE = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A weight format that was timed."""

    precision: str
    block_size: int
    """0 where the format has no blocks."""
    attention: GraphAttention = "flash"
    prefill_ms: float
    """A prompt that fills the context."""
    decode_ms: float
    """One token at half the context."""
    verdict: str = ""
    """What it was chosen for, if for anything."""

    @property
    def label(self) -> str:
        parts = [self.precision, *([str(self.block_size)] if self.block_size else [])]
        return "/".join(parts if self.attention == "flash" else [*parts, self.attention])


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceDecision:
    """What to export for one shape on one CPU, with its evidence."""

    settings: ExportSettings
    """Block sizes, how a pair's prefill graph attends, the fastest precision; int8-dyn's bits are up to the targets."""
    one_session: str
    """The precision that is fastest with one copy of the weights."""
    latency: str
    """The fastest precision, a pair where a second copy pays."""
    candidates: tuple[Candidate, ...]
    cpu: str
    onnxruntime: str
    num_layers: int
    """Layers that were timed: fewer than the model's for a large one."""
    cached: bool = False


def choose_inference(spec: DecoderSpec, cache_dir: Path, *, threads: int = 1) -> InferenceDecision:
    """The decision for this shape on this machine, from `cache_dir` or measured now (a few seconds).

    Measure on an idle core: what else runs there ends up in the figures.
    """
    cpu = describe_cpu()
    key = digest(SCHEMA, cpu["model"], cpu["isa"], cpu["caches"], ort.__version__, spec, threads)
    path = cache_dir / "inference" / f"{key[:16]}.json"
    decision, cached = recall(path, InferenceDecision, lambda: measure_inference(spec, threads=threads))
    return dataclasses.replace(decision, cached=cached)


def measure_inference(spec: DecoderSpec, *, threads: int = 1) -> InferenceDecision:
    """Time all candidates for this shape now and decide."""
    cpu = describe_cpu()
    timed = timed_part(spec)
    formats: list[_Format] = [("fp32", 0, "flash"), ("int8-dyn", 0, "flash")]
    if 4 * timed.num_heads * timed.max_seq_len**2 <= MAX_SCORE_BYTES:
        formats.append(("int8-dyn", 0, "full"))
    formats += [(precision, size, "flash") for precision in ("int8", "int4") for size in _distinct_block_sizes(spec)]
    with scratch_folder("tune") as scratch:
        decoders = []
        for i, format_ in enumerate(formats):
            folder = scratch / str(i)
            folder.mkdir()
            decoders.append(_random_decoder(timed, format_, folder, threads))
        times = _take_turns(decoders)
    candidates = [
        Candidate(precision=p, block_size=size, attention=attention, prefill_ms=prefill, decode_ms=decode)
        for (p, size, attention), (prefill, decode) in zip(formats, times)
    ]
    return decide(timed, candidates, cpu, num_layers=timed.num_layers)


def timed_part(spec: DecoderSpec) -> DecoderSpec:
    """The decoder that is timed for this one: itself if it is small, else some of its layers, tokens and context."""
    layers = min(spec.num_layers, max(2, MAX_LAYER_PARAMETERS // _layer_parameters(spec)))
    return dataclasses.replace(
        spec,
        num_layers=layers,
        layer_rotaries=spec.layer_rotaries[:layers],
        layer_windows=spec.layer_windows[:layers],
        vocab_size=min(spec.vocab_size, MAX_TABLE_VALUES // spec.table_dim),
        max_seq_len=min(spec.max_seq_len, MAX_CONTEXT),
    )


def format_decision(decision: InferenceDecision) -> str:
    """The decision and every candidate, one per line, for people."""
    q = decision.settings
    lines = [
        f"inference on {decision.cpu}, onnxruntime {decision.onnxruntime}: fastest {decision.latency}, "
        f"with one copy of the weights {decision.one_session}; blocks of {q.int8_block_size} (int8) and "
        f"{q.int4_block_size} (int4); {q.prefill_attention} attention in a pair's prefill"
    ]
    lines += [
        f"  {c.label:<13} prompt {c.prefill_ms:9.3f} ms  token {c.decode_ms:8.4f} ms  {c.verdict}".rstrip()
        for c in decision.candidates
    ]
    return "\n".join(lines)


def decide(spec: DecoderSpec, candidates: list[Candidate], cpu: CpuFacts, *, num_layers: int) -> InferenceDecision:
    """The decision that these times lead to.

    A request is weighed as one full prompt and `ANSWER_SHARE` as many new tokens.
    """
    answer = ANSWER_SHARE * spec.max_seq_len

    def request_ms(prefill: Candidate, decode: Candidate) -> float:
        return prefill.prefill_ms + answer * decode.decode_ms

    def best_block(precision: str) -> Candidate:
        """The usual block size unless a request is clearly faster with another."""
        mine = [c for c in candidates if c.precision == precision]
        usual = block_size_for(spec.dim, ExportSettings().int8_block_size)
        preferred = next((c for c in mine if c.block_size == usual), mine[-1])
        fastest = min(mine, key=lambda c: request_ms(c, c))
        gains = request_ms(fastest, fastest) * MIN_GAIN < request_ms(preferred, preferred)
        return fastest if gains else preferred

    best = {precision: best_block(precision) for precision in ("int8", "int4")}
    best |= {c.precision: c for c in candidates if not c.block_size and c.attention == "flash"}
    quick = [best[precision] for precision in USUAL_PRECISIONS]
    single = min(quick, key=lambda c: request_ms(c, c))
    dynamic = best["int8-dyn"]
    full = next((c for c in candidates if c.attention == "full"), None)
    if full and full.prefill_ms * MIN_GAIN < dynamic.prefill_ms:
        dynamic = full
    partner = min((best["int8"], best["int4"]), key=lambda c: c.decode_ms)
    pair_pays = request_ms(dynamic, partner) * MIN_PAIR_GAIN < request_ms(single, single)
    latency = f"int8-dyn+{partner.precision}" if pair_pays else single.precision
    verdicts: dict[str, list[str]] = {c.label: [] for c in candidates}
    for precision in ("int8", "int4"):
        verdicts[best[precision].label].append(f"block size of {precision}")
    verdicts[single.label].append("fastest with one copy of the weights")
    if pair_pays:
        verdicts[dynamic.label].append("prefill of the fastest pair")
        verdicts[partner.label].append("decode of the fastest pair")
    return InferenceDecision(
        settings=ExportSettings(
            int8_block_size=best["int8"].block_size,
            int4_block_size=best["int4"].block_size,
            prefill_attention=dynamic.attention,
            fastest=latency,
        ),
        one_session=single.precision,
        latency=latency,
        candidates=tuple(dataclasses.replace(c, verdict=", ".join(verdicts[c.label])) for c in candidates),
        cpu=cpu["model"],
        onnxruntime=ort.__version__,
        num_layers=num_layers,
    )


def _distinct_block_sizes(spec: DecoderSpec) -> list[int]:
    """Block sizes that come out different for this width: 256 is 128 where 256 divides nothing."""
    seen: dict[tuple[int, int], int] = {}
    for size in BLOCK_SIZES:
        seen.setdefault((block_size_for(spec.dim, size), block_size_for(spec.ff_dim, size)), size)
    return list(seen.values())


def _layer_parameters(spec: DecoderSpec) -> int:
    return sum(math.prod(shape) for shape in layer_shapes(spec).values())


def _random_decoder(spec: DecoderSpec, format_: _Format, folder: Path, threads: int) -> OnnxruntimeEngine:
    """A loaded bundle of one graph with random weights; there is no tokenizer in it, for no text passes through."""
    precision, block_size, attention = format_
    generator = np.random.default_rng(0)
    arrays = {
        name: np.full(shape, 0.02, np.float32) if len(shape) == 1 else _random(generator, shape)
        for name, shape in parameter_shapes(spec).items()
    }
    weights = DecoderWeights(spec=spec, arrays=arrays)
    matrices = {
        name: _random_matrix(generator, name, weights[f"{name}.weight"], precision, block_size)
        for name in dict.fromkeys(("embedding", *weights.linears))
    }
    with DataFile(folder / DATA_NAME) as data:
        model = build_graph("fast", weights, matrices, data, attention=attention)
        (folder / _GRAPH).write_bytes(serialize(model))
    entries = bundle.graph_entries(spec, precision, "float32") | {"graphs": dict.fromkeys(GRAPH_ROLES, _GRAPH)}
    bundle.write_manifest(folder, {**_MANIFEST, **entries})
    return OnnxruntimeEngine(load_bundle(folder, verify=False), threads=threads)


def _random_matrix(
    generator: np.random.Generator, name: str, values_NK: np.ndarray, precision: str, block_size: int
) -> Matrix:
    """A matrix in the format that `precision` gives it, of random codes: quantizing would only take time."""
    N, K = values_NK.shape
    if precision == "fp32":
        return FloatMatrix(values_NK)
    if precision == "int8-dyn" and name != "embedding":
        codes = generator.integers(-63, 64, (N, K), dtype=np.int8)
        return DynamicMatrix(codes, np.full(N, 1e-3, np.float32))
    bits = 4 if precision == "int4" else 8
    size = block_size_for(K, block_size or ExportSettings().int8_block_size)
    blocks = -(-K // size)
    codes_NCE = generator.integers(0, 1 << bits, (N, blocks, size), dtype=np.uint8)
    return BlockMatrix(codes_NCE, np.full((N, blocks), 1e-3, np.float32), bits, K)


def _random(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return generator.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5)


def _take_turns(decoders: list[OnnxruntimeEngine]) -> list[tuple[float, float]]:
    """(ms of a full prompt, ms of a token at half the context) of each, the best of its turns."""
    context = decoders[0].bundle.model.context_length
    vocab_size = decoders[0].bundle.model.vocab_size
    prompt = np.random.default_rng(0).integers(0, vocab_size, (1, context))
    half = prompt[:, : max(1, context // 2)]
    steps = min(DECODE_STEPS, context - half.shape[1])
    prefill: list[list[float]] = [[] for _ in decoders]
    decode: list[list[float]] = [[] for _ in decoders]
    deadline = time.perf_counter() + TURNS_S
    for turn in range(MAX_TURNS):
        if turn >= MIN_TURNS and time.perf_counter() > deadline:
            break
        for i, decoder in enumerate(decoders):
            begin = time.perf_counter()
            decoder.prefill(prompt)
            middle = time.perf_counter()
            decoder.prefill(half)
            start = time.perf_counter()
            for _ in range(steps):
                decoder.step()
            end = time.perf_counter()
            prefill[i].append((middle - begin) * 1e3)
            decode[i].append((end - start) / max(1, steps) * 1e3)
    return [(min(p), min(d)) for p, d in zip(prefill, decode)]


#: The one graph of a bundle that is only timed.
_GRAPH = "fast.onnx"
#: Fields of a manifest that say nothing about how a graph is run.
_MANIFEST: dict[str, object] = {
    "name": "tune",
    "variant": "",
    "seed": 0,
    "eos_token_ids": [0],
    "bos_token_id": 0,
    "onnxruntime_min": "0",
    "golden": [],
    "tolerance": 0.0,
    "prompts": [],
}
