"""A batch of prompts by onnxruntime-genai in process, for `serving.py`: it has no server, and rows end together.

python benchmarks/serving_genai.py < JOB.json > FOUND.json
"""

from __future__ import annotations

import json
import sys
import time

import onnxruntime_genai as og


def main() -> None:
    job = json.load(sys.stdin)
    config = og.Config(job["path"])
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": job["threads"]}}}}))
    model = og.Model(config)
    prompts, tokens = job["prompts"], job["tokens"]
    length = len(prompts[0]) + tokens

    def run(count: int) -> tuple[float, float]:
        params = og.GeneratorParams(model)
        params.set_search_options(
            do_sample=False,
            max_length=length,
            min_length=length,
            batch_size=len(prompts),
            past_present_share_buffer=True,
        )
        generator = og.Generator(model, params)
        began_s = time.perf_counter()
        generator.append_tokens([token for prompt in prompts for token in prompt])
        generator.generate_next_token()
        first_s = time.perf_counter() - began_s
        for _ in range(count - 1):
            generator.generate_next_token()
        return first_s, time.perf_counter() - began_s

    run(4)
    began_cpu_s = time.process_time()
    first_s, whole_s = run(tokens)
    total = tokens * len(prompts)
    found = {
        "tokens": total,
        "failed": 0,
        "wall_s": whole_s,
        "tok_s": total / whole_s,
        "requests_s": len(prompts) / whole_s,
        "cpu_ms_per_token": 1e3 * (time.process_time() - began_cpu_s) / total,
        "ttft_ms": [1e3 * first_s],
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
