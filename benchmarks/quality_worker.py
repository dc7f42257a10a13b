"""Scores a point of `quality_speed.py` on the windows that llama-perplexity scores, by its own protocol.

    python benchmarks/quality_worker.py FOLDER GRAPH     (the nats of each window as JSON)

llama-perplexity reads a text in windows, each from an empty cache, and scores the tokens of the second half: those
behind position `context / 2`. Where the model begins a text with a token, that one stands in place of each window's
first. A graph reads a window in the pieces that our engine cuts prompts into.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peer_process import ONE_THREAD
from quality_plan import perplexity_command

#: The perplexity up to each window, as llama-perplexity prints it.
RUNNING = re.compile(r"\[(\d+)\](\d+\.\d+)")


def score_point(plan: Mapping[str, Any], point: Mapping[str, Any]) -> list[float]:
    """Nats of each window; of a point with several graphs those of the worst. Raises `RuntimeError` if it fails."""
    if not point["graphs"]:
        return _kept(plan, point["path"], lambda: _score_gguf(plan, point["path"]))
    scores = [_kept(plan, graph, lambda graph=graph: _score_in_process(plan, graph)) for graph in point["graphs"]]
    return max(scores, key=sum)


def _kept(plan: Mapping[str, Any], path: str, score: Any) -> list[float]:
    """What `score` gives, or gave for this file and these windows before."""
    folder = Path(plan["folder"])
    windows = (folder / "windows.npy").read_bytes()
    stat = Path(path).stat()
    key = hashlib.sha256(windows + repr((path, stat.st_size, stat.st_mtime_ns)).encode()).hexdigest()[:16]
    kept = folder / "quality" / f"{key}.json"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(score()))
    return list(json.loads(kept.read_text()))


def _score_gguf(plan: Mapping[str, Any], path: str) -> list[float]:
    """From the running perplexities: four decimals of some 10, times the windows so far, leave 1e-4 nats a token."""
    command = perplexity_command(plan, path, Path(plan["folder"]) / "text.txt")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = [float(value) for _, value in RUNNING.findall(done.stdout + done.stderr)]
    quality = plan["quality"]
    if done.returncode or len(values) != quality["chunks"]:
        raise RuntimeError(f"llama-perplexity: code {done.returncode}, {len(values)} of {quality['chunks']} windows")
    targets = quality["context"] - quality["context"] // 2 - 1
    sums = [number * targets * math.log(value) for number, value in enumerate(values, start=1)]
    return [b - a for a, b in zip([0.0, *sums], sums)]


def _score_in_process(plan: Mapping[str, Any], graph: str) -> list[float]:
    """A process of its own gives the memory back."""
    command = [sys.executable, __file__, plan["folder"], graph]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | ONE_THREAD)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise RuntimeError(f"{graph}: code {done.returncode}: {last[0][:200]}")
    return list(json.loads(done.stdout))


def score_graph(folder: Path, graph: Path) -> list[float]:
    """Nats of each window by a graph with the inputs and outputs that genai names."""
    import numpy as np

    from ryot.deploy.standard import StandardGraph
    from ryot.edge.engine import PIECE_TOKENS

    model = StandardGraph(graph, threads=len(os.sched_getaffinity(0)))
    windows = np.load(folder / "windows.npy")
    context = windows.shape[1]
    first = context // 2
    nats = []
    for window in windows:
        past, total = _empty_cache(graph.parent), 0.0
        for start in range(0, context, PIECE_TOKENS):
            logits, past = model.run(window[None, start : start + PIECE_TOKENS], past)
            # Rows that predict a scored token: positions first to context - 2.
            rows = np.arange(max(first, start), min(context - 1, start + logits.shape[1]))
            for some in np.array_split(rows, -(-len(rows) // 64)) if len(rows) else []:
                values = logits[0, some - start].astype(np.float64)
                values -= values.max(axis=-1, keepdims=True)
                chosen = values[np.arange(len(some)), window[some + 1]]
                total += float((np.log(np.exp(values).sum(axis=-1)) - chosen).sum())
        nats.append(total)
    return nats


def _empty_cache(folder: Path) -> Any:
    """The cache that a builder's graph begins with, whose inputs do not say how wide a head is; None for a bundle."""
    import numpy as np

    from ryot.edge.bundle import MANIFEST_NAME

    if (folder / MANIFEST_NAME).exists():
        return None
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    names = (decoder["inputs"]["past_key_names"], decoder["inputs"]["past_value_names"])
    return {name % layer: empty for layer in range(decoder["num_hidden_layers"]) for name in names}


if __name__ == "__main__":
    print(json.dumps(score_graph(Path(sys.argv[1]), Path(sys.argv[2]))))
