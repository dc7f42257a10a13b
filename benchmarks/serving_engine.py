"""One stream by the engine in process, for `serving.py`: prompts one after the other, greedy, as the server runs them.

python benchmarks/serving_engine.py < JOB.json > FOUND.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from ryot.edge.bundle import load_bundle
from ryot.edge.generate import Generation, generate
from ryot.edge.session import OnnxruntimeEngine
from ryot.edge.tokenizer import load_tokenizer


def main() -> None:
    job = json.load(sys.stdin)
    bundle = load_bundle(Path(job["path"]))
    engine, tokenizer = OnnxruntimeEngine(bundle, threads=job["threads"]), load_tokenizer(bundle)

    def stream(prompt: list[int], tokens: int) -> Generation:
        return generate(engine, tokenizer, prompt, max_new_tokens=tokens, ignore_eos=True)

    for _ in range(2):
        list(stream(job["prompts"][0], job["tokens"]))
    rates = []
    began_cpu_s = time.process_time()
    for prompt in job["prompts"]:
        pieces = iter(stream(prompt, job["tokens"]))
        next(pieces)
        began_s = time.perf_counter()
        for _ in pieces:
            pass
        rates.append((job["tokens"] - 1) / (time.perf_counter() - began_s))
    json.dump({"tok_s": rates, "cpu_s": time.process_time() - began_cpu_s}, sys.stdout)


if __name__ == "__main__":
    main()
