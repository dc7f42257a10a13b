"""A report made from synthetic samples: no model was trained or measured for any figure here."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from ryot.artifact import ArtifactId
from ryot.edge.protocol import MeasureResult
from ryot.mapping import read_mapping
from ryot.report.build import build_report
from ryot.report.rows import ExportedArtifact, Report, StageTime, VariantRow
from ryot.report.targets import load_target

MACHINE = {
    "cpu": {
        "model": "Synthetic CPU 3.0 GHz",
        "isa": ["avx2"],
        "cores": 2,
        "caches": {"L1": 32768, "L2": 524288},
        "ram_bytes": 16_000_000_000,
    },
    "governor": "performance",
    "kernel": "6.1.0",
    "python": "3.11.2",
    "packages": {"onnxruntime": "1.26.0", "numpy": "2.4"},
}
CORPUS = {
    "name": "synthetic",
    "sha256": "0" * 64,
    "tokenizer_sha256": "1" * 64,
    "vocab_size": 2048,
    "train_tokens": 3_900_000,
    "val_tokens": 170_000,
    "test_tokens": 170_000,
}
#: variant, precision -> size MB, TTFT ms, tok/s, peak MB, bpb ratio, KL, top-1
ARTIFACTS = {
    ("baseline", "fp32"): (8.61, 4.9, 3900, 62.0, 1.0, 0.0, 1.0),
    ("baseline", "int8-dyn"): (2.31, 2.9, 5600, 55.5, 1.0021, 0.0011, 0.981),
    ("optimized", "fp32"): (5.35, 3.7, 5200, 58.3, 1.0, 0.0, 1.0),
    ("optimized", "int8-dyn"): (1.47, 2.1, 8300, 53.9, 1.0034, 0.0017, 0.976),
}


def make_result(
    case: ArtifactId, round_: int, rng: np.random.Generator, *, ttft_ms: float, tok_s: float, peak_mb: float
) -> MeasureResult:
    """A measure result with correlated samples inside the process and an offset of its own."""
    offset = rng.normal(0, 0.006)

    def series(count: int, scale: float) -> np.ndarray:
        noise = np.empty(count)
        noise[0] = rng.normal(0, 0.01)
        for i in range(1, count):
            noise[i] = 0.7 * noise[i - 1] + rng.normal(0, 0.007)
        return scale * np.exp(noise + offset)

    ttft = series(30, ttft_ms)
    ttft[11] *= 1.6
    tokens = [series(64, 1000 / tok_s) for _ in range(6)]
    values = {
        "case": str(case),
        "round": round_,
        "ok": True,
        "reason": "",
        "load_ms": float(40 * math.exp(rng.normal(0, 0.03))),
        "cold_start_ms": float(180 * math.exp(rng.normal(0, 0.03))),
        "first_ttft_ms": float(ttft[0] * 2.2),
        "ttft_ms": [round(float(v), 5) for v in ttft],
        "e2e_ttft_ms": [round(float(v) + 0.08, 5) for v in ttft],
        "decode_tok_s": [round(1000 / float(t.mean()), 3) for t in tokens],
        "token_ms": [[round(float(v), 5) for v in t] for t in tokens],
        "peak_rss_bytes": int(peak_mb * 1e6 * math.exp(rng.normal(0, 0.001))),
        "peak_rss_outside_bytes": int(peak_mb * 1e6 * 0.999),
        "memory_limit": "checked",
        "memory_limit_bytes": 500_000_000,
        "prompt_tokens": 128,
        "decode_tokens": 64,
        "decode_depth": 32,
        "batch_size": 1,
        "runs": 30,
        "runs_ok": 30,
        "calibration_ms": [20.1, 20.3],
        "load_average": [0.4, 0.6],
        "threads": 1,
        "cpus": [1],
        "started_at": "2026-01-01T00:00:00+00:00",
        "steady": True,
    }
    return read_mapping(MeasureResult, values)


def make_results(
    *, rounds: int = 3, seed: int = 0, artifacts: dict = ARTIFACTS, slowdown: float = 1.0
) -> dict[ArtifactId, list[MeasureResult]]:
    """Results of every artifact in every round."""
    rng = np.random.default_rng(seed)
    results: dict[ArtifactId, list[MeasureResult]] = {}
    for k in range(rounds):
        for (variant, precision), (_, ttft, tok_s, peak, *_) in artifacts.items():
            case = ArtifactId(variant, 0, precision)
            result = make_result(case, k, rng, ttft_ms=ttft * slowdown, tok_s=tok_s / slowdown, peak_mb=peak)
            results.setdefault(case, []).append(result)
    return results


def change_results(
    results: dict[ArtifactId, list[MeasureResult]], only: ArtifactId | None = None, *, rounds: int = 99, **changes
) -> dict[ArtifactId, list[MeasureResult]]:
    """The results with some fields changed: of all artifacts or one, in the first `rounds` rounds."""
    return {
        case: [dataclasses.replace(r, **changes) if only in (None, case) and r.round < rounds else r for r in found]
        for case, found in results.items()
    }


def make_artifacts(artifacts: dict = ARTIFACTS, **changes) -> list[ExportedArtifact]:
    """What is known of each artifact beside its timings."""
    return [
        ExportedArtifact(
            variant=variant,
            seed=0,
            precision=precision,
            size_bytes=int(size * 1e6),
            context_tokens=128,
            quality={"kl": kl, "top1": top1, "bpb": 1.78 * ratio, "bpb_ratio": ratio},
            path=f"variants/{variant}/seed-0/{precision}",
            **changes,
        )
        for (variant, precision), (size, _, _, _, ratio, kl, top1) in artifacts.items()
    ]


def make_variants() -> list[VariantRow]:
    """Two trainings with loss curves."""

    def curve(tokens: int, seconds: float, end: float) -> tuple:
        share = np.linspace(0, 1, 25)
        loss = end + (7.62 - end) * np.exp(-6 * share)
        return tuple((float(tokens * s), float(seconds * s), round(float(x), 4)) for s, x in zip(share, loss))

    common = {"seed": 0, "initial_val_loss": 7.62, "concurrent": True, "grad_norm_max": 3.1}
    return [
        VariantRow(
            name="baseline", params=2_136_064, tokens=1_228_800, train_wall_s=129.6, tokens_per_s=9481.0,
            val_loss=3.93, val_bpb=1.79, test_loss=3.95, test_bpb=1.78, curve=curve(1_228_800, 129.6, 3.93),
            train_curve=curve(1_228_800, 129.6, 3.85), summary="historical transformer", **common,
        ),
        VariantRow(
            name="optimized", params=1_246_464, tokens=409_600, train_wall_s=24.9, tokens_per_s=16450.0,
            val_loss=3.90, val_bpb=1.775, test_loss=3.92, test_bpb=1.766, curve=curve(409_600, 24.9, 3.90),
            train_curve=curve(409_600, 24.9, 3.8), summary="Llama-shaped", compile_s=0.0, **common,
        ),
    ]  # fmt: skip


def make_report(**changes) -> Report:
    """The report of two variants in two precisions against phase1."""
    values = {
        "run_id": "synthetic-run",
        "command": "ryot-deploy cluster-run",
        "preset": "reference",
        "artifacts": make_artifacts(),
        "results": make_results(),
        "targets": [load_target("phase1")],
        "machine": MACHINE,
        "corpus": CORPUS,
        "variants": make_variants(),
        "plan": {"preset": "reference", "seeds": 1, "threads": 1},
        "stages": [StageTime(stage="train", variant="baseline", wall_s=140.2), StageTime(stage="measure", wall_s=61.0)],
        "created_at": "2026-01-01T00:00:00+00:00",
        "bundle": "bundle",
    }
    return build_report(**{**values, **changes})
