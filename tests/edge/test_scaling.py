"""Several candidates from one prompt, and checks that tell which one is best."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from ryot.edge.bundle import Bundle, load_bundle
from ryot.edge.engines import open_engine
from ryot.edge.generate import generate, generate_candidates
from ryot.edge.sampling_params import SamplingParams
from ryot.edge.scaling import build_reward, choose_best, parses_as_json, parses_as_python
from ryot.edge.tokenizer import load_tokenizer
from ryot.errors import ConfigError

from .test_cli import run_cli

SAMPLED = SamplingParams(temperature=1.5, seed=2)


@pytest.mark.parametrize("engine", ["capi", "python"])
def test_candidates_share_a_prompt_and_draw_for_themselves(bundle: Bundle, engine: str) -> None:
    tokenizer = load_tokenizer(bundle)
    decoder = open_engine(bundle, batch_size=4, engine=engine)
    options = {"sampling": SAMPLED, "max_new_tokens": 20, "ignore_eos": True}
    candidates = generate_candidates(decoder, tokenizer, "def ", **options)
    assert len({tuple(c.tokens) for c in candidates}) == 4
    alone = generate(open_engine(bundle, engine=engine), tokenizer, "def ", **options)
    assert candidates[0].text == "".join(alone)


def test_the_best_candidate_comes_first_and_ties_keep_their_order(bundle: Bundle) -> None:
    decoder = open_engine(bundle, batch_size=6)
    found = choose_best(
        decoder, load_tokenizer(bundle), "x", lambda text: len(text) % 3, sampling=SAMPLED, max_new_tokens=15
    )
    assert [c.reward for c in found] == sorted((len("x" + c.completion.text) % 3 for c in found), reverse=True)
    assert sorted(c.row for c in found) == list(range(6))
    for left, right in itertools.pairwise(found):
        assert left.reward > right.reward or left.row < right.row


def test_greedy_candidates_would_all_be_the_same(bundle: Bundle) -> None:
    decoder = open_engine(bundle, batch_size=2)
    with pytest.raises(ConfigError, match="temperature: got 0, which makes all candidates the same"):
        generate_candidates(decoder, load_tokenizer(bundle), "x", sampling=SamplingParams())


@pytest.mark.parametrize(
    ("text", "reward"), [("x = 1\n", 1.0), ("x = 1\ny = (\n", 1 / 3), ("x = = 1", 0.0), ("a\0", 0.0), ("", 1.0)]
)
def test_python_is_rewarded_by_how_far_it_parses(text: str, reward: float) -> None:
    assert parses_as_python(text) == pytest.approx(reward)


@pytest.mark.parametrize(("text", "reward"), [('{"a": [1, 2]}', 1.0), ("[1, x]", 4 / 6), ("", 0.0)])
def test_json_is_rewarded_by_how_far_it_parses(text: str, reward: float) -> None:
    assert parses_as_json(text) == pytest.approx(reward)


def test_a_pattern_or_a_command_decides() -> None:
    matches = build_reward("match=^a.*z$")
    assert (matches("a\nz"), matches("ab")) == (1.0, 0.0)
    command = build_reward(f"command={sys.executable} -c 'import sys; sys.exit(sys.stdin.read() != \"yes\")'")
    assert (command("yes"), command("no")) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rust", "reward: got 'rust', expected one of python, json, match=REGEX, command=COMMAND"),
        ("match=(", "is no regular expression"),
        ("python=3", "reward: got 'python=3'"),
    ],
)
def test_unknown_checks_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_reward(name)
    assert message in str(caught.value)


def test_a_command_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="the command '/nowhere/check' cannot be run"):
        build_reward("command=/nowhere/check")("x")


def test_run_py_prints_the_best_of_several(llama_path: Path) -> None:
    options = ["--temperature", "1.5", "--seed", "2", "--max-new-tokens", "20", "--ignore-eos"]
    run = run_cli(llama_path, "--prompt", "def ", "--best-of", "4", "--reward", "match=e", *options)
    bundle = load_bundle(llama_path)
    candidates = generate_candidates(
        open_engine(bundle, batch_size=4),
        load_tokenizer(bundle),
        "def ",
        sampling=SAMPLED,
        max_new_tokens=20,
        ignore_eos=True,
    )
    assert (run.returncode, run.stdout) == (0, candidates[0].text + "\n")
    assert run.stderr == "candidate 1 of 4, reward 1.00\n"
    run = run_cli(llama_path, "--prompt", "def ", "--best-of", "4")
    assert (run.returncode, run.stderr) == (2, "Error: --best-of N and --reward CHECK are used together\n")
