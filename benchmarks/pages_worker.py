"""One bundle in a fresh process, with or without the calls of `ryot/edge/pages.py`; `pages.py` starts it.

    python benchmarks/pages_worker.py BUNDLE 0|1 TURNS     (one JSON object on stdout)

Nothing heavy is imported: it would be counted to the peak.
"""

import json
import random
import sys
import time
from typing import Any

import ryot.edge.capi as capi
import ryot.edge.engine as engine
from ryot.edge.bundle import load_bundle
from ryot.edge.probe import read_peak_rss_bytes

PROMPT, FIRST_STEPS, STEPS = 128, 100, 48


def measure(bundle: str, calls: bool, turns: int) -> dict[str, Any]:
    """Times in ms, the peak resident size in bytes after the first answer and at the end."""
    if not calls:
        capi.release_code = lambda: 0
        engine.move_to_huge_pages = lambda: 0
    begin = time.perf_counter()
    decoder = capi.CApiEngine(load_bundle(bundle, verify=False))
    load_ms = (time.perf_counter() - begin) * 1e3
    draw = random.Random(0)
    first_peak, prompt_ms, token_ms = 0, [], []
    for turn in range(turns + 1):
        ids = [[draw.randrange(1, decoder.bundle.model.vocab_size) for _ in range(PROMPT)]]
        begin = time.perf_counter()
        decoder.prefill(ids)
        answered = time.perf_counter()
        steps = STEPS if turn else FIRST_STEPS
        for _ in range(steps):
            decoder.step()
        prompt_ms.append((answered - begin) * 1e3)
        if turn:
            token_ms.append((time.perf_counter() - answered) / steps * 1e3)
        else:
            first_peak = read_peak_rss_bytes("self") or 0
    return {
        "load_ms": load_ms,
        "prompt_ms": prompt_ms,
        "token_ms": token_ms,
        "first_peak_rss_bytes": first_peak,
        "peak_rss_bytes": read_peak_rss_bytes("self") or 0,
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2] == "1", int(sys.argv[3]))))
