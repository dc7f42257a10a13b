"""The program that a bundle's `run.py` is: text from a bundle, and the check that it is whole and computes right."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ryot.edge.bundle import load_bundle
from ryot.edge.generate import check_golden, generate
from ryot.edge.sampling import SamplingParams
from ryot.edge.session import Decoder
from ryot.edge.tokenizer import load_tokenizer
from ryot.errors import ConfigError, RyotError

EXAMPLE = 'example: python run.py --prompt "def " --max-new-tokens 40'


def build_parser(program: str = "run.py") -> argparse.ArgumentParser:
    """The options of the program."""
    parser = argparse.ArgumentParser(prog=program, description="Run this bundle on the CPU.", epilog=EXAMPLE)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="continue this text; '-' reads it from stdin")
    what.add_argument("--verify", action="store_true", help="check every file's hash and the golden prompts")
    what.add_argument("--bench", action="store_true", help="time prompt and decoding with the bundle's held-out text")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: as many as the context holds")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-text token")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    defaults = SamplingParams()
    for name, kind, text in (
        ("temperature", float, "0 takes the best token each time"),
        ("top-k", int, "keep the K best tokens; 0 keeps all"),
        ("top-p", float, "keep the best tokens of this probability together; 1 keeps all"),
        ("min-p", float, "keep tokens of this share of the best one's probability; 0 keeps all"),
        ("repetition-penalty", float, "above 1 makes tokens already seen less likely"),
        ("seed", int, "of the random draws"),
    ):
        default = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=f"{text} (default: {default:g})")
    return parser


def main(bundle: Path, argv: Sequence[str] | None = None) -> int:
    """Run the program on the bundle at `bundle`; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        if args.verify:
            verify(bundle, args.threads)
        elif args.bench:
            bench(bundle, args.threads)
        else:
            stream(bundle, args)
    except RyotError as error:
        hint = f"\nhint: {error.hint}" if error.hint else ""
        sys.stderr.write(f"Error: {error}{hint}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


def stream(path: Path, args: argparse.Namespace) -> None:
    """Write the continuation of the prompt to stdout as it comes."""
    sampling = SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    bundle = load_bundle(path, verify=False)
    decoder = Decoder(bundle, threads=args.threads)
    generation = generate(
        decoder,
        load_tokenizer(bundle),
        sys.stdin.read() if args.prompt == "-" else args.prompt,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        stop=args.stop,
        ignore_eos=args.ignore_eos,
    )
    for piece in generation:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def verify(path: Path, threads: int) -> None:
    """Check hashes and golden tokens and say what was checked. Raises `BundleError` at the first difference."""
    bundle = load_bundle(path, verify=True)
    compared = check_golden(Decoder(bundle, threads=threads))
    golden = (
        f"{compared} golden tokens of {len(bundle.golden)} prompts as expected" if compared else "no golden prompts"
    )
    sys.stdout.write(f"{bundle.name} {bundle.precision}: {len(bundle.files)} files unchanged, {golden}\n")


def bench(path: Path, threads: int, *, seconds: float = 2.0) -> None:
    """Write the medians of prompt (a full context) and decoding (from a quarter of it), `seconds` of each."""
    bundle = load_bundle(path, verify=False)
    decoder = Decoder(bundle, threads=threads)
    if not bundle.prompts:
        raise ConfigError(f"bundle {path}: has no held-out prompts to time with")
    context = bundle.model.context_length
    depth = max(1, context // 4)
    prompt_ms: list[float] = []
    token_ms: list[float] = []
    for times, run in ((prompt_ms, _time_prompt), (token_ms, _time_decode)):
        run(decoder, bundle.prompts[0], depth)
        deadline, number = time.perf_counter() + seconds, 0
        while time.perf_counter() < deadline or number < 3:
            times.append(run(decoder, bundle.prompts[number % len(bundle.prompts)], depth))
            number += 1
    prompt, token = (sorted(times)[len(times) // 2] for times in (prompt_ms, token_ms))
    sys.stdout.write(f"pp{context} {prompt:9.2f} ms\ntg{context - depth} @ d{depth} {1000 / token:9.1f} tokens/s\n")


def _time_prompt(decoder: Decoder, prompt: Sequence[int], depth: int) -> float:
    start = time.perf_counter()
    decoder.prefill([prompt])
    return (time.perf_counter() - start) * 1000


def _time_decode(decoder: Decoder, prompt: Sequence[int], depth: int) -> float:
    """Milliseconds a token."""
    decoder.prefill([prompt[:depth]])
    count = decoder.max_len - depth
    start = time.perf_counter()
    for _ in range(count):
        decoder.step()
    return (time.perf_counter() - start) * 1000 / count
