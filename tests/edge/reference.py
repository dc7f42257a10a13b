"""The oracle of the engines' tests: a bundle's standard graph, computed in one piece by a plain `session.run`."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from ryot.edge.bundle import Bundle

# fp32 with sums of at most a few hundred terms, logits of about 2 in size: the order of summation differs between
# a whole pass and a cached step by some 1e-6; ten times that is the limit.
TOLERANCE = 2e-5


def full_logits(bundle: Bundle, ids: np.ndarray) -> np.ndarray:
    """Logits [S, V] of all positions of one sequence, without any cache."""
    session = ort.InferenceSession(bundle.path / bundle.graphs["standard"], providers=["CPUExecutionProvider"])
    shape = bundle.model
    feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
    if bundle.position_ids:
        feeds["position_ids"] = np.arange(len(ids), dtype=np.int64)[None]
    empty = np.zeros((1, shape.num_kv_heads, 0, shape.head_dim), bundle.kv_dtype)
    for layer in range(shape.num_layers):
        feeds |= {f"past_key_values.{layer}.key": empty, f"past_key_values.{layer}.value": empty}
    return session.run(["logits"], feeds)[0][0]


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 384, length)
