"""Several candidates from one prompt, and the verifier that tells which one is best."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from ryot.edge.best_of import choose_best
from ryot.edge.bundle import Bundle, load_bundle
from ryot.edge.engines import open_engine
from ryot.edge.generate import generate
from ryot.edge.sampling_params import SamplingParams
from ryot.edge.scheduler import Scheduler
from ryot.edge.sequence import Request
from ryot.edge.slots import SlotEngine
from ryot.edge.tokenizer import load_tokenizer
from ryot.edge.verifiers import Verdict, Verifier, build_verifier
from ryot.errors import ConfigError

from .test_cli import run_cli

SAMPLED = SamplingParams(temperature=1.5, seed=2)
PROMPT = "def add(a, b):"


class LengthVerifier(Verifier):
    """A third of the length's rest by three; never 1."""

    kind = "length"

    def check(self, text: str) -> Verdict:
        return Verdict(len(text) % 3 / 3)


def open_scheduler(bundle: Bundle, rows: int) -> Scheduler:
    engine = SlotEngine(bundle, batch_size=rows, memory_bytes=2**24)
    return Scheduler(engine, load_tokenizer(bundle), prefix_cache_bytes=2**24)


def ask(scheduler: Scheduler, count: int, *, tokens: int = 20, sampling: SamplingParams = SAMPLED) -> list[Request]:
    ids = load_tokenizer(scheduler.engine.bundle).encode(PROMPT)
    return [
        Request(prompt_ids=ids, max_tokens=tokens, sampling=sampling, choice=choice, ignore_eos=True)
        for choice in range(count)
    ]


def test_candidates_share_a_prompt_and_draw_for_themselves(bundle: Bundle) -> None:
    scheduler = open_scheduler(bundle, 4)
    found = choose_best(scheduler, ask(scheduler, 4), PROMPT, LengthVerifier())
    assert len({tuple(candidate.completion.tokens) for candidate in found}) == 4
    first = next(candidate for candidate in found if candidate.choice == 0)
    alone = generate(
        open_engine(bundle), load_tokenizer(bundle), PROMPT, sampling=SAMPLED, max_new_tokens=20, ignore_eos=True
    )
    assert first.completion.text == "".join(alone)
    counters, size = scheduler.counters, len(first.completion.prompt_ids)
    # The prompt was computed once.
    assert (counters.prompt_tokens, counters.cached_tokens) == (4 * size, 3 * size)


def test_the_best_candidate_comes_first_and_ties_keep_their_order(bundle: Bundle) -> None:
    scheduler = open_scheduler(bundle, 6)
    found = choose_best(scheduler, ask(scheduler, 6, tokens=15), PROMPT, LengthVerifier())
    expected = sorted((len(candidate.completion.text) % 3 / 3 for candidate in found), reverse=True)
    assert [candidate.verdict.reward for candidate in found] == expected
    assert sorted(candidate.choice for candidate in found) == list(range(6))
    for left, right in itertools.pairwise(found):
        assert left.verdict.reward > right.verdict.reward or left.choice < right.choice


def test_when_one_passes_the_others_are_given_up_on(bundle: Bundle) -> None:
    # One row: candidates come one after the other, and the first one passes.
    scheduler = open_scheduler(bundle, 1)
    found = choose_best(scheduler, ask(scheduler, 4), PROMPT, build_verifier({"kind": "regex", "pattern": ""}))
    assert [candidate.choice for candidate in found] == [0]
    assert scheduler.idle and scheduler.counters.step_tokens < 25


def test_a_majority_waits_for_all(bundle: Bundle) -> None:
    scheduler = open_scheduler(bundle, 2)
    found = choose_best(scheduler, ask(scheduler, 3), PROMPT, build_verifier({"kind": "majority"}))
    assert [candidate.verdict.reward for candidate in found] == [pytest.approx(1 / 3)] * 3


def test_greedy_candidates_would_all_be_the_same(bundle: Bundle) -> None:
    scheduler = open_scheduler(bundle, 2)
    with pytest.raises(ConfigError, match="temperature: got 0, which makes all candidates the same"):
        choose_best(scheduler, ask(scheduler, 2, sampling=SamplingParams()), PROMPT, LengthVerifier())


def test_run_py_prints_the_best_of_several(llama_path: Path) -> None:
    options = ["--temperature", "1.5", "--seed", "2", "--max-new-tokens", "20", "--ignore-eos"]
    run = run_cli(llama_path, "--prompt", PROMPT, "--best-of", "4", "--verifier", "exact=x", *options)
    bundle = load_bundle(llama_path)
    alone = generate(
        open_engine(bundle), load_tokenizer(bundle), PROMPT, sampling=SAMPLED, max_new_tokens=20, ignore_eos=True
    )
    assert (run.returncode, run.stdout) == (0, "".join(alone) + "\n")
    assert run.stderr == "candidate 1 of 4, reward 0.00\n"
    run = run_cli(llama_path, "--prompt", PROMPT, "--best-of", "4", "--verifier", "regex=^def", *options)
    assert run.stderr.startswith("candidate 1 of 4, reward 1.00")
    run = run_cli(llama_path, "--prompt", "def ", "--best-of", "4")
    assert (run.returncode, run.stderr) == (2, "Error: --best-of N and --verifier SPEC are used together\n")
