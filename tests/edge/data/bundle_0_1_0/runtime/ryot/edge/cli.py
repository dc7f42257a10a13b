"""The command line of a bundle's `run.py`: generate text, verify, measure. Needs nothing but the bundle."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryot.edge.bundle import load_bundle
from ryot.edge.engines import ENGINES
from ryot.errors import EXIT_INTERRUPTED, EXIT_OK, ConfigError, RyotError

if TYPE_CHECKING:
    from ryot.edge.bundle import Bundle
    from ryot.edge.engine import Engine
    from ryot.edge.protocol import MeasureResult
    from ryot.edge.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 64


def run(bundle_path: Path, arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks of the bundle in `bundle_path`; returns the exit code.

    stdout carries the text (or, with `--bench`, the figures), stderr an error as one line.
    """
    options = build_parser().parse_args(arguments)
    try:
        return _run(bundle_path, options)
    except RyotError as error:
        if options.traceback:
            raise
        sys.stderr.write(f"Error: {error}\n")
        if error.hint:
            sys.stderr.write(f"hint: {error.hint}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has seen enough; nothing may be written there any more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def build_parser() -> argparse.ArgumentParser:
    """The options of `run.py`."""
    parser = argparse.ArgumentParser(
        prog="run.py",
        description="Run this bundle: stream a continuation of the prompt to stdout.",
        epilog='example: python run.py --prompt "def " --max-new-tokens 40',
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="continue this text; - reads it from stdin")
    what.add_argument("--verify", action="store_true", help="check every file's hash and the golden prompts")
    what.add_argument("--bench", action="store_true", help="measure this bundle on this machine")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"tokens to generate; default: {DEFAULT_NEW_TOKENS}, or what fits",
    )
    text.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    text.add_argument("--ignore-eos", action="store_true", help="go on after the end of a text")
    text.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0, the default, takes the best token"
    )
    text.add_argument("--top-k", type=int, default=0, metavar="N", help="keep the N best tokens; default: all")
    text.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="keep the best tokens up to this probability; default: 1"
    )
    text.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="X",
        help="keep tokens of this share of the best one's probability; default: 0",
    )
    text.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="make tokens already there less likely; default: 1, not at all",
    )
    text.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same text; default: 0")
    best = parser.add_argument_group("several candidates")
    best.add_argument(
        "--best-of", type=int, default=1, metavar="N", help="draw N continuations together, print the best; default: 1"
    )
    best.add_argument(
        "--reward", metavar="CHECK", help="what is best: python or json (it parses), match=REGEX, command=COMMAND"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of onnxruntime; default: 1")
    parser.add_argument(
        "--engine", choices=ENGINES, default="auto", help="how onnxruntime is called; default: capi where it works"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="fresh processes that --bench measures; default: 3"
    )
    parser.add_argument("--json", action="store_true", help="print the raw results of --bench as JSON")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def _run(bundle_path: Path, options: argparse.Namespace) -> int:
    if options.threads < 1:
        raise ConfigError(f"--threads: got {options.threads}, expected a whole number above 0")
    bundle = load_bundle(bundle_path)
    if options.bench:
        return _bench(bundle, options)
    if options.verify:
        return _verify(bundle, options.threads, options.engine)
    return _generate(bundle, options)


def _generate(bundle: Bundle, options: argparse.Namespace) -> int:
    from ryot.edge.engines import open_decoder
    from ryot.edge.sampling_params import SamplingParams
    from ryot.edge.tokenizer import load_tokenizer

    sampling = SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    if options.best_of < 1:
        raise ConfigError(f"--best-of: got {options.best_of}, expected a whole number above 0")
    if (options.best_of > 1) != (options.reward is not None):
        raise ConfigError("--best-of N and --reward CHECK are used together")
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    tokenizer = load_tokenizer(bundle)
    decoder = open_decoder(bundle, threads=options.threads, batch_size=options.best_of, engine=options.engine)
    num_tokens = options.max_new_tokens
    if num_tokens is None:
        # What fits, but a prompt that fills the context is still an error and not an empty answer.
        num_tokens = max(1, min(DEFAULT_NEW_TOKENS, decoder.max_len - max(1, len(tokenizer.encode(prompt)))))
    # Text of a byte-level model may hold any character, whatever the terminal's encoding.
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    limits = {"max_new_tokens": num_tokens, "stop": options.stop, "ignore_eos": options.ignore_eos}
    for piece in _pieces(decoder, tokenizer, prompt, options.reward, sampling=sampling, **limits):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return EXIT_OK


def _pieces(decoder: Engine, tokenizer: Tokenizer, prompt: str, reward: str | None, **options: Any) -> Iterable[str]:
    """The text as it comes, or, where a reward chooses among candidates, in one piece."""
    if reward is None:
        from ryot.edge.generate import generate

        return generate(decoder, tokenizer, prompt, **options)
    from ryot.edge.scaling import build_reward, choose_best

    best = choose_best(decoder, tokenizer, prompt, build_reward(reward), **options)[0]
    sys.stderr.write(f"candidate {best.row + 1} of {decoder.batch_size}, reward {best.reward:.2f}\n")
    return [best.completion.text]


def _verify(bundle: Bundle, threads: int, engine: str) -> int:
    from ryot.edge.engines import open_decoder
    from ryot.edge.generate import check_golden

    compared = check_golden(open_decoder(bundle, threads=threads, engine=engine))
    total = sum(len(golden.tokens) for golden in bundle.golden)
    sys.stdout.write(f"{bundle.name}: {len(bundle.files)} files as in the manifest, ")
    sys.stdout.write(f"{compared} of {total} golden tokens compared and equal\n")
    return EXIT_OK


def _bench(bundle: Bundle, options: argparse.Namespace) -> int:
    from ryot.edge.measure import build_spec, measure_rounds, record_environment
    from ryot.edge.noise import find_noise

    if options.rounds < 1:
        raise ConfigError(f"--rounds: got {options.rounds}, expected a whole number above 0")
    spec = build_spec(bundle, threads=options.threads, engine=options.engine)
    results = measure_rounds({bundle.name: spec}, rounds=options.rounds)
    if options.json:
        environment = record_environment()
        json.dump({"environment": environment, "results": [r.to_mapping() for r in results]}, sys.stdout)
        sys.stdout.write("\n")
    else:
        for line in describe_results(results):
            sys.stdout.write(line + "\n")
    for remark in find_noise(results):
        sys.stderr.write(f"note: {remark}\n")
    return EXIT_OK if all(r.ok for r in results) else 1


def describe_results(results: Sequence[MeasureResult]) -> list[str]:
    """The figures of one arm, a line each: the median over processes of each process's median, and the extremes."""
    import statistics  # slow to import, and generating text does without

    good = [r for r in results if r.ok]
    lines = [f"round {r.round}: {r.reason}" for r in results if not r.ok]
    if not good:
        return lines
    first = good[0]
    label = f"{first.precision}, batch {first.batch_size}, threads {first.threads}"
    lines.append(f"{label}, {len(good)} processes, {sum(r.runs for r in good)} runs")
    rows = (
        (f"TTFT pp{first.prompt_tokens}", "ms", [statistics.median(r.ttft_ms) for r in good]),
        ("TTFT from text", "ms", [statistics.median(r.e2e_ttft_ms) for r in good if r.e2e_ttft_ms]),
        (
            f"decode tg{first.decode_tokens} @ d{first.decode_depth}",
            "tok/s",
            [statistics.median(r.decode_tok_s) for r in good if r.decode_tok_s],
        ),
        ("first token after start", "ms", [r.cold_start_ms for r in good if r.cold_start_ms is not None]),
        ("load", "ms", [r.load_ms for r in good if r.load_ms is not None]),
        ("peak memory", "MB", [r.peak_rss_bytes / 1e6 for r in good if r.peak_rss_bytes is not None]),
    )
    for name, unit, values in rows:
        if values:
            middle, low, high = statistics.median(values), min(values), max(values)
            lines.append(f"{name:<24}{middle:>12,.2f} {unit:<6} ({low:,.2f} to {high:,.2f})")
    return lines
