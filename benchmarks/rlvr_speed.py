"""How fast are rollouts: the edge engine against torch's generation with a cache, the same weights, turn by turn?

    python benchmarks/rlvr_speed.py [--model SOURCE] [--rounds 5]

16 samples of one prompt at temperature 1, on one thread: the fleet that reinforcement uses (in each precision that it
has, log probabilities included, and once more with the time of taking in new weights), transformers' `generate`, and
the plainest loop over our own torch decoder with its cache. Without a model the weights are random, of the reference
preset's optimized recipe at full width ("S" of the README). A ratio is taken round by round; its interval is over
rounds. What rounding costs is the difference of the samples' log probabilities from the torch decoder's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from record import RESULTS, describe_setting, write_result
from tabulate import tabulate

from ryot.adaptation import RolloutPrecision
from ryot.config import ModelConfig, find_named, load_toml
from ryot.deploy.weights import load_decoder_weights
from ryot.models.sources.opening import open_checkpoint
from ryot.models.sources.write_hf import write_hf
from ryot.reinforce.grpo import answer_logprobs, build_batch
from ryot.reinforce.rollouts import Group, LocalFleet, Policy
from ryot.train.checkpoint import build_decoder, save_checkpoint
from ryot.train.model import Decoder
from ryot.train.tokenizer import train_tokenizer

SAMPLES = 16
CONTEXT = 512


def random_checkpoint(folder: Path) -> Path:
    """S, with a tokenizer of some of the standard library."""
    size = load_toml(find_named("presets", "reference"))["model"]
    kept = {name: size[name] for name in ("vocab_size", "dim", "num_layers", "num_heads", "ff_dim")}
    model = ModelConfig(
        architecture="llama", num_kv_heads=size["num_heads"], max_seq_len=CONTEXT, tie_embeddings=True, **kept
    )
    torch.manual_seed(0)
    decoder = Decoder(model.spec)
    texts = [path.read_text() for path in sorted(Path(argparse.__file__).parent.glob("*.py"))[:40]]
    tokenizer = train_tokenizer(texts, model.vocab_size)
    path = folder / "random"
    save_checkpoint(path, spec=model.spec, state=decoder.state_dict(), tokenizer_json=tokenizer.to_str().encode())
    return path


def plain_loop(model: Decoder, ids: list[int], tokens: int) -> int:
    """What one writes first: a cache, a softmax, a draw."""
    with torch.no_grad():
        logits, cache = model.forward_cached(torch.tensor([ids] * SAMPLES), None)
        for _ in range(tokens - 1):
            drawn = torch.multinomial(logits[:, -1].softmax(-1), 1)
            logits, cache = model.forward_cached(drawn, cache)
    return SAMPLES * tokens


@torch.no_grad()
def mismatch(model: Decoder, group: Group, fleet: LocalFleet) -> tuple[float, float]:
    """Mean and largest difference of a token's log probability, in the fleet and in torch."""
    samples = fleet.sample([group])
    batch = build_batch([group], samples, [[1.0] * SAMPLES])
    assert batch is not None
    found, _ = answer_logprobs(model, batch)
    difference = (found - batch.sampled_BT[batch.answer_BT]).abs()
    return difference.mean().item(), difference.max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, .gguf file or hub id")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        source = args.model or str(random_checkpoint(Path(scratch)))
        checkpoint = open_checkpoint(source)
        weights = load_decoder_weights(checkpoint, CONTEXT)
        folder = Path(scratch) / "hf"
        write_hf(checkpoint, folder)
        rows = measure(weights, checkpoint.files["tokenizer.json"], folder, args)
    report(rows, weights.spec.num_parameters, args)


def measure(weights: Any, tokenizer_json: bytes, folder: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = build_decoder(weights.spec, weights.arrays)
    ids = np.random.default_rng(0).integers(3, weights.spec.vocab_size, args.prompt_tokens).tolist()
    # No token ends an answer: all sides generate the same number.
    policy = Policy(
        spec=weights.spec, text_files={"tokenizer.json": tokenizer_json}, eos=(weights.spec.vocab_size,), bos=None
    )
    precisions = get_args(RolloutPrecision)
    fleets = {p: LocalFleet(policy, rows=SAMPLES, threads=args.threads, precision=p) for p in precisions}
    arrays = dict(weights.arrays)
    group = Group(tuple(ids), SAMPLES, args.new_tokens, seed=0)

    def engine(precision: str) -> int:
        (samples,) = fleets[precision].sample([group])
        return sum(len(sample.tokens) for sample in samples)

    def engine_and_update(precision: str) -> int:
        fleets[precision].update(arrays)
        return engine(precision)

    def generate() -> int:
        with torch.no_grad():
            out = peer.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                num_return_sequences=SAMPLES,
                min_new_tokens=args.new_tokens,
                max_new_tokens=args.new_tokens,
                pad_token_id=0,
            )
        return SAMPLES * (out.shape[1] - len(ids))

    cases: dict[str, Callable[[], int]] = {}
    for precision, fleet in fleets.items():
        cases[f"engine {precision}"] = partial(engine, precision)
        cases[f"engine {precision}, new weights"] = partial(engine_and_update, precision)
        fleet.update(arrays)
    cases |= {"transformers generate": generate, "torch loop": lambda: plain_loop(ours, ids, args.new_tokens)}
    for case in cases.values():
        case()  # warm-up
    args.mismatches = {precision: mismatch(ours, group, fleet) for precision, fleet in fleets.items()}
    rows = []
    for number in range(args.rounds):
        row = {}
        for name, case in cases.items():
            begin = time.perf_counter()
            tokens = case()
            row[name] = tokens / (time.perf_counter() - begin)
        rows.append(row)
        print(number, row, file=sys.stderr, flush=True)
    for fleet in fleets.values():
        fleet.close()
    return rows


def report(rows: list[dict[str, float]], params: int, args: argparse.Namespace) -> None:
    table = []
    for name in rows[0]:
        ratios = [row[name] / row["transformers generate"] for row in rows]
        against_loop = [row[name] / row["torch loop"] for row in rows]
        table.append(
            [
                name,
                f"{statistics.median(row[name] for row in rows):,.0f}",
                *(f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in (ratios, against_loop)),
            ]
        )
    setting = describe_setting()
    head = ["", "tok/s", "times transformers generate", "times torch loop"]
    model = args.model and Path(args.model).name
    text = "\n".join(
        [
            f"# Rollouts a second, commit {setting['commit']}",
            "",
            f"{model or 'random weights (S)'}, {params / 1e6:.2f} M parameters, {SAMPLES} samples of a prompt of "
            f"{args.prompt_tokens} tokens, {args.new_tokens} new ones, {args.threads} thread(s), {len(rows)} rounds "
            "by turns; medians and extremes of the rounds' ratios.",
            "",
            tabulate(table, head, tablefmt="github", disable_numparse=True),
            "",
            "Difference of a token's log probability from torch's, mean and largest: "
            + ", ".join(f"{p} {mean:.2g} and {most:.2g}" for p, (mean, most) in args.mismatches.items())
            + ".",
        ]
    )
    setting["command"] = " ".join(Path(word).name if "/" in word else word for word in setting["command"].split())
    name = f"rlvr_speed-{Path(model).stem.lower()}" if model else "rlvr_speed"
    values = {**setting, "params": params, "mismatches": args.mismatches, "rows": rows}
    print(write_result(name, values, text, args.output))


if __name__ == "__main__":
    main()
