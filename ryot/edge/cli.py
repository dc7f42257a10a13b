"""The command line of a bundle's `run.py`: generate text, chat, verify, measure. Needs nothing but the bundle."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ryot.edge.bundle import load_bundle
from ryot.edge.engines import ENGINES
from ryot.errors import EXIT_INTERRUPTED, EXIT_OK, BundleError, ConfigError, RyotError

if TYPE_CHECKING:
    from ryot.edge.bundle import Bundle
    from ryot.edge.generate import Completion
    from ryot.edge.protocol import MeasureResult
    from ryot.edge.sampling_params import SamplingParams
    from ryot.edge.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 64
#: An answer in a chat mostly ends by itself.
DEFAULT_ANSWER_TOKENS = 512
#: Fresh processes of a measurement on a device.
BENCH_ROUNDS = 3


def run(bundle_path: Path, arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks of the bundle in `bundle_path`; returns the exit code.

    stdout carries the text (or, with `--bench`, the figures), stderr an error as one line.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.prompt is None and not (options.chat or options.verify or options.bench):
        parser.error("one of the arguments --prompt --chat --verify --bench is required")
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
        description="Run this bundle: stream a continuation of the prompt, or answers in a chat, to stdout.",
        epilog='example: python run.py --prompt "def " --max-new-tokens 40',
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="continue this text; - reads it from stdin")
    what.add_argument("--verify", action="store_true", help="check every file's hash and the golden prompts")
    what.add_argument("--bench", action="store_true", help="measure this bundle on this machine")
    chat = parser.add_argument_group("chat")
    chat.add_argument(
        "--chat",
        action="store_true",
        help="answer each line of stdin by the model's chat template; with --prompt, that one message",
    )
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before the first message")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"tokens to generate; default: {DEFAULT_NEW_TOKENS}, in a chat {DEFAULT_ANSWER_TOKENS}, or what fits",
    )
    text.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    text.add_argument(
        "--split-special-tokens",
        action="store_true",
        help="take special tokens in the prompt or messages as plain text",
    )
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
    text.add_argument(
        "--speculate",
        action="store_true",
        help="compute several tokens at once where a text repeats itself; takes the weights once more in memory",
    )
    text.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same text; default: 0")
    best = parser.add_argument_group("several candidates")
    best.add_argument(
        "--best-of", type=int, default=1, metavar="N", help="draw N continuations together, print the best; default: 1"
    )
    best.add_argument(
        "--verifier",
        metavar="SPEC",
        help="what is best: json or python (prompt and text parse), regex=PATTERN, exact=TEXT, number=N, "
        "json_schema=SCHEMA, majority, command=COMMAND (in a sandbox), entry_point=MODULE:FUNCTION, or a table in JSON",
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of onnxruntime; default: 1")
    parser.add_argument(
        "--engine", choices=ENGINES, default="auto", help="how onnxruntime is called; default: capi where it works"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=BENCH_ROUNDS,
        metavar="N",
        help=f"fresh processes that --bench measures; default: {BENCH_ROUNDS}",
    )
    parser.add_argument(
        "--trusted-keys", type=Path, metavar="FILE", help="what --verify asks a signature of: lines of 'trusted KEY'"
    )
    parser.add_argument("--json", action="store_true", help="print the raw results of --bench as JSON")
    parser.add_argument(
        "--metrics-to",
        metavar="URL",
        help="send counts and latencies of --prompt or --chat, no text, to this OTLP receiver; default: to nobody",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def _run(bundle_path: Path, options: argparse.Namespace) -> int:
    if options.threads < 1:
        raise ConfigError(f"--threads: got {options.threads}, expected a whole number above 0")
    if options.verify:
        return _verify(bundle_path, options)
    bundle = load_bundle(bundle_path)
    return _bench(bundle, options) if options.bench else _generate(bundle, options)


def _read_prompt(given: str) -> str:
    """The prompt, from stdin for `-`; UTF-8, whatever the locale is."""
    data = sys.stdin.buffer.read() if given == "-" else os.fsencode(given)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {data[error.start]:#04x} at offset {error.start}"
        raise ConfigError(f"--prompt: is not UTF-8 ({where})") from error


def _generate(bundle: Bundle, options: argparse.Namespace) -> int:
    _check_text_options(options)
    if options.metrics_to is None:
        return _write_text(bundle, options, lambda completion: None)
    from ryot.edge.telemetry import Meter

    meter = Meter(options.metrics_to)
    try:
        return _write_text(bundle, options, meter.observe)
    except RyotError:
        meter.fail()
        raise
    finally:
        meter.close()


def _write_text(bundle: Bundle, options: argparse.Namespace, seen: Callable[[Completion], None]) -> int:
    """Write what was asked for; `seen` gets each text that one prompt led to, once it has ended."""
    from ryot.edge.engines import open_engine
    from ryot.edge.generate import encode_prompt, generate
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
    prompt = None if options.prompt is None else _read_prompt(options.prompt)
    tokenizer = load_tokenizer(bundle)
    # Text may hold any character, whatever the terminal's encoding.
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    tokenizer.split_special_tokens = tokenizer.split_special_tokens or options.split_special_tokens
    if options.speculate:
        from ryot.edge.single import stream_text

        assert prompt is not None  # checked with the options
        _write(
            stream_text(
                bundle,
                tokenizer,
                prompt,
                threads=options.threads,
                max_new_tokens=options.max_new_tokens or DEFAULT_NEW_TOKENS,
                sampling=sampling,
                stop=options.stop,
                ignore_eos=options.ignore_eos,
            )
        )
        return EXIT_OK
    if options.verifier is not None:
        assert prompt is not None
        _write([_choose_best(bundle, tokenizer, prompt, sampling, options)])
        return EXIT_OK
    decoder = open_engine(bundle, threads=options.threads, engine=options.engine)
    limits = {"stop": options.stop, "ignore_eos": options.ignore_eos, "sampling": sampling}
    if options.chat:
        from ryot.edge.chat import Chat, load_chat_template
        from ryot.edge.repl import converse

        template = load_chat_template(bundle.path, tokenizer.config)
        split = options.split_special_tokens
        chat = Chat(decoder, tokenizer, template, system=options.system, split_special_tokens=split)
        limits["max_new_tokens"] = DEFAULT_ANSWER_TOKENS if options.max_new_tokens is None else options.max_new_tokens
        converse(chat, prompt, write=_write, seen=seen, **limits)
        return EXIT_OK
    assert prompt is not None  # one of the options is there
    num_tokens = _num_tokens(options, len(encode_prompt(bundle, tokenizer, prompt)), decoder.max_len)
    generation = generate(decoder, tokenizer, prompt, max_new_tokens=num_tokens, **limits)
    _write(generation)
    seen(generation.completion)
    return EXIT_OK


def _num_tokens(options: argparse.Namespace, prompt_tokens: int, max_len: int) -> int:
    """Tokens to generate: as many as asked for, or what fits. After a prompt that fills the context 1, which fails."""
    if options.max_new_tokens is not None:
        return int(options.max_new_tokens)
    return max(1, min(DEFAULT_NEW_TOKENS, max_len - prompt_tokens))


def _check_text_options(options: argparse.Namespace) -> None:
    """Raise `ConfigError` for options that make no sense together."""
    if options.best_of < 1:
        raise ConfigError(f"--best-of: got {options.best_of}, expected a whole number above 0")
    if (options.best_of > 1) != (options.verifier is not None):
        raise ConfigError("--best-of N and --verifier SPEC are used together")
    if options.system is not None and not options.chat:
        raise ConfigError("--system: is for a chat; give --chat too")
    if options.speculate and (options.chat or options.best_of > 1):
        raise ConfigError("--speculate: is for --prompt alone, one candidate")
    if options.metrics_to is not None and (options.speculate or options.best_of > 1):
        raise ConfigError("--metrics-to: is for --prompt or --chat, one candidate, without --speculate")
    if options.chat and options.verifier is not None:
        raise ConfigError("--best-of: is for --prompt alone, not for a chat")


def _write(pieces: Iterable[str]) -> None:
    """Write text to stdout as it comes, and a newline."""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _choose_best(
    bundle: Bundle, tokenizer: Tokenizer, prompt: str, sampling: SamplingParams, options: argparse.Namespace
) -> str:
    """The candidate that the verifier likes best, which stderr names."""
    from ryot.edge.best_of import choose_best
    from ryot.edge.generate import encode_prompt
    from ryot.edge.scheduler import Scheduler
    from ryot.edge.sequence import Request
    from ryot.edge.slots import SlotEngine
    from ryot.edge.verifiers import build_verifier, parse_verifier

    table = parse_verifier(options.verifier)
    # A continuation is judged with what it continues, unless its kind or its table looks at an answer.
    if table.get("kind") in ("json", "python", "json_schema", "command", "regex"):
        table.setdefault("with_prompt", True)
    verifier = build_verifier(table)
    ids = encode_prompt(bundle, tokenizer, prompt)
    count = options.best_of
    memory_bytes = bundle.model.kv_cache_bytes(bundle.model.context_length, count)
    engine = SlotEngine(bundle, threads=options.threads, batch_size=count, memory_bytes=memory_bytes)
    scheduler = Scheduler(engine, tokenizer, prefix_cache_bytes=memory_bytes)
    num_tokens = _num_tokens(options, len(ids), engine.max_len)
    if num_tokens < 1:
        raise ConfigError(f"max_new_tokens: got {num_tokens}, expected a whole number above 0")
    requests = [
        Request(
            prompt_ids=ids,
            max_tokens=num_tokens,
            sampling=sampling,
            choice=choice,
            stop=tuple(options.stop),
            ignore_eos=options.ignore_eos,
        )
        for choice in range(count)
    ]
    candidates = choose_best(scheduler, requests, prompt, verifier)
    best = candidates[0]
    known = f"candidate {best.choice + 1} of {count}, reward {best.verdict.reward:.2f}"
    stopped = f"; {len(candidates)} had ended when it passed" if len(candidates) < count else ""
    sys.stderr.write(f"{known}{stopped}\n")
    return best.completion.text


def _verify(bundle_path: Path, options: argparse.Namespace) -> int:
    from ryot.edge.trust import check_whole, load_trusted_keys

    keys = None if options.trusted_keys is None else load_trusted_keys(options.trusted_keys)
    bundle, signer = check_whole(bundle_path, keys)
    _check_int8(bundle)
    from ryot.edge.engines import open_engine
    from ryot.edge.generate import check_golden, golden_rows

    rows = golden_rows(bundle)
    compared = check_golden(open_engine(bundle, threads=options.threads, batch_size=rows, engine=options.engine))
    total = sum(len(golden.tokens) for golden in bundle.golden)
    sys.stdout.write(f"{bundle.name}: {len(bundle.files)} files as in the manifest, ")
    sys.stdout.write(f"{compared} of {total} golden tokens compared and equal")
    sys.stdout.write(f", signed by {signer}\n" if signer else "\n")
    return EXIT_OK


def _check_int8(bundle: Bundle) -> None:
    """Raise `BundleError` where sums of this bundle's int8 products overflow on this CPU."""
    from ryot.edge.machine import describe_cpu, overflows_on

    if overflows_on(bundle, describe_cpu()["isa"]):
        raise BundleError(
            f"bundle {bundle.path}: its weights have 8 bits, whose sums overflow on this CPU, which has no VNNI",
            hint="export it with a target whose device is like this one, which takes 7 bits",
        )


def _bench(bundle: Bundle, options: argparse.Namespace) -> int:
    from ryot.edge.measure import build_spec, measure_rounds, record_environment
    from ryot.edge.noise import find_noise
    from ryot.mapping import to_mapping

    if options.rounds < 1:
        raise ConfigError(f"--rounds: got {options.rounds}, expected a whole number above 0")
    spec = build_spec(bundle, threads=options.threads, engine=options.engine)
    results = measure_rounds({bundle.name: spec}, rounds=options.rounds)[bundle.name]
    if options.json:
        environment = record_environment()
        json.dump({"environment": environment, "results": [to_mapping(r, keep_none=True) for r in results]}, sys.stdout)
        sys.stdout.write("\n")
    else:
        for line in describe_results(results):
            sys.stdout.write(line + "\n")
    for remark in find_noise(results):
        sys.stderr.write(f"note: {remark}\n")
    return EXIT_OK if all(r.ok for r in results) else 1


def describe_results(results: Sequence[MeasureResult]) -> list[str]:
    """The figures of one case, one per line: the median over processes of each process's median, and the extremes."""
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
