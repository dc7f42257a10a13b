"""Scores a point of `quality_speed.py` on the windows that llama-perplexity scores, by its own protocol.

    python benchmarks/quality_worker.py FOLDER GRAPH [--write FILE | --beside FILE]     (a `Score` as JSON)

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from peer_process import ONE_THREAD
from quality_plan import perplexity_command

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ryot.deploy.standard import StandardGraph

    IntArray = NDArray[np.int64]
    FloatArray = NDArray[np.float64]

#: What llama-perplexity prints of the windows so far: the perplexity alone; beside a reference, in a row, also how that
#: grew, KL, how far probabilities are apart, and the share of equal likeliest tokens in per cent.
RUNNING = re.compile(r"\[(\d+)\](\d+\.\d+)")
RUNNING_BESIDE = re.compile(r"^ *\d+ +(\S+) ± +\S+ +\S+ ± +\S+ +(\S+) ± +\S+ +\S+ ± +\S+ % +(\S+) ±", re.MULTILINE)
#: Points that the others of llama.cpp, and all graphs, are held against: the same weights unrounded.
GGUF_REFERENCE, GRAPH_REFERENCE = "F16", "fp32"
ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a point makes of the windows."""

    nats: list[float]
    """Of each window."""
    kl: float | None = None
    """Nats per token from the reference's distribution; None for the reference, and where there is none."""
    top1: float | None = None
    """Share of the tokens whose likeliest one is the reference's."""


class Scorer:
    """Scores points, and keeps what each gave for these windows.

    A reference's distributions, some 0.8 GB, are computed when the first point is held against them, into `scratch`.
    """

    def __init__(self, plan: Mapping[str, Any], points: Sequence[Mapping[str, Any]], scratch: Path):
        self._plan, self._scratch = plan, scratch
        self._folder = Path(plan["folder"])
        self._windows = (self._folder / "windows.npy").read_bytes()
        self._references = {
            point["name"]: _paths(point)[0] for point in points if point["name"] in (GGUF_REFERENCE, GRAPH_REFERENCE)
        }

    def score(self, point: Mapping[str, Any]) -> Score:
        """Of a point with several graphs the worst. Raises `RuntimeError` if it fails."""
        reference = self._references.get(GRAPH_REFERENCE if point["graphs"] else GGUF_REFERENCE)
        return max((self._kept(path, reference) for path in _paths(point)), key=lambda score: sum(score.nats))

    def _kept(self, path: str, reference: str | None) -> Score:
        """What the file gives, or gave for these windows before."""
        of = [(name, Path(name).stat().st_size, Path(name).stat().st_mtime_ns) for name in (path, reference) if name]
        kept = self._folder / "quality" / f"{hashlib.sha256(self._windows + repr(of).encode()).hexdigest()[:16]}.json"
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps(asdict(self._held_against(path, reference))))
        return Score(**json.loads(kept.read_text()))

    def _held_against(self, path: str, reference: str | None) -> Score:
        score = _score_gguf if path.endswith(".gguf") else _score_in_process
        if reference is None:
            return score(self._plan, path)
        base = self._scratch / hashlib.sha256(reference.encode()).hexdigest()[:16]
        if path == reference:
            return score(self._plan, path, write=base)
        if not base.exists():
            score(self._plan, reference, write=base)
        return score(self._plan, path, beside=base)


def _paths(point: Mapping[str, Any]) -> list[str]:
    return list(point["graphs"]) or [point["path"]]


def _score_gguf(plan: Mapping[str, Any], path: str, *, write: Path | None = None, beside: Path | None = None) -> Score:
    """From the running perplexities: four decimals of some 10, times the windows so far, leave 1e-4 nats per token."""
    command = perplexity_command(plan, path, Path(plan["folder"]) / "text.txt")
    if write:
        command += ["--kl-divergence-base", str(write)]
    if beside:
        command += ["--kl-divergence-base", str(beside), "--kl-divergence"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    if beside:
        rows = [[float(value) for value in row] for row in RUNNING_BESIDE.findall(text)]
    else:
        rows = [[float(value)] for _, value in RUNNING.findall(text)]
    quality = plan["quality"]
    if done.returncode or len(rows) != quality["chunks"]:
        raise RuntimeError(f"llama-perplexity: code {done.returncode}, {len(rows)} of {quality['chunks']} windows")
    targets = quality["context"] - quality["context"] // 2 - 1
    sums = [number * targets * math.log(row[0]) for number, row in enumerate(rows, start=1)]
    nats = [b - a for a, b in zip([0.0, *sums], sums)]
    return Score(nats=nats, kl=rows[-1][1], top1=rows[-1][2] / 100) if beside else Score(nats=nats)


def _score_in_process(
    plan: Mapping[str, Any], graph: str, *, write: Path | None = None, beside: Path | None = None
) -> Score:
    """A process of its own gives the memory back."""
    command = [sys.executable, __file__, plan["folder"], graph]
    command += ["--write", str(write)] if write else ["--beside", str(beside)] if beside else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | ONE_THREAD)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise RuntimeError(f"{graph}: code {done.returncode}: {last[0][:200]}")
    return Score(**json.loads(done.stdout))


def score_graph(folder: Path, graph: Path, *, write: Path | None = None, beside: Path | None = None) -> Score:
    """By a graph with the inputs and outputs that genai names.

    The natural logarithms of all probabilities, [tokens, V] float32, go to the file `write`, or are held against those
    of the file `beside`.
    """
    from ryot.deploy.standard import StandardGraph

    model = StandardGraph(graph, threads=len(os.sched_getaffinity(0)))
    nats, kls, same = [], [], []
    with (write or beside or Path(os.devnull)).open("wb" if write else "rb") as base:
        for window in np.load(folder / "windows.npy"):
            total = 0.0
            for rows, logprobs in _second_half(model, window, _empty_cache(graph.parent)):
                total -= float(logprobs[np.arange(len(rows)), window[rows + 1]].sum())
                if write:
                    logprobs.astype(np.float32).tofile(base)
                elif beside:
                    theirs = np.fromfile(base, np.float32, logprobs.size).reshape(logprobs.shape)
                    kls.append((np.exp(theirs) * (theirs - logprobs)).sum(axis=-1))
                    same.append(theirs.argmax(axis=-1) == logprobs.argmax(axis=-1))
            nats.append(total)
    if not kls:
        return Score(nats=nats)
    return Score(nats=nats, kl=float(np.concatenate(kls).mean()), top1=float(np.concatenate(same).mean()))


def _second_half(model: StandardGraph, window: IntArray, past: Any) -> Iterator[tuple[IntArray, FloatArray]]:
    """Rows that predict a scored token, positions T / 2 to T - 2, some at a time, and log probabilities [R, V]."""
    from ryot.edge.engine import PIECE_TOKENS

    context = len(window)
    for start in range(0, context, PIECE_TOKENS):
        logits, past = model.run(window[None, start : start + PIECE_TOKENS], past)
        rows = np.arange(max(context // 2, start), min(context - 1, start + logits.shape[1]))
        for some in np.array_split(rows, -(-len(rows) // ROWS)) if len(rows) else []:
            values = logits[0, some - start].astype(np.float64)
            values -= values.max(axis=-1, keepdims=True)
            yield some, values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def _empty_cache(folder: Path) -> Any:
    """The cache that a builder's graph begins with, whose inputs do not say how wide a head is; None for a bundle."""
    from ryot.edge.bundle import MANIFEST_NAME

    if (folder / MANIFEST_NAME).exists():
        return None
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    names = (decoder["inputs"]["past_key_names"], decoder["inputs"]["past_value_names"])
    return {name % layer: empty for layer in range(decoder["num_hidden_layers"]) for name in names}


if __name__ == "__main__":
    folder, graph, *how = sys.argv[1:]
    base = {how[0].removeprefix("--"): Path(how[1])} if how else {}
    print(json.dumps(asdict(score_graph(Path(folder), Path(graph), **base))))
