"""More computation for a better answer: several candidates from one prompt, and the one that a check likes best.

The reward is verifiable, something that a program can tell about the text: whether it parses, matches, or passes a
command. It is not another model's opinion, and it is never shown to the model.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ryot.edge.generate import Completion, generate_candidates
from ryot.errors import ConfigError

if TYPE_CHECKING:
    from ryot.edge.engine import Engine
    from ryot.edge.sampling_params import SamplingParams
    from ryot.edge.tokenizer import Tokenizer

#: From 0 (useless) to 1 (passes), for the prompt followed by a candidate's text.
Reward = Callable[[str], float]

COMMAND_TIMEOUT_S = 10.0
REWARDS = "python, json, match=REGEX, command=COMMAND"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One continuation and what the check says about it."""

    completion: Completion
    reward: float
    row: int
    """Its place in the batch, and so its random stream."""


def choose_best(
    decoder: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    reward: Reward,
    *,
    sampling: SamplingParams,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> list[Candidate]:
    """All `decoder.batch_size` candidates, best reward first, equal ones in the order of their rows.

    Raises like `generate.generate_candidates`.
    """
    completions = generate_candidates(
        decoder,
        tokenizer,
        prompt,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop=stop,
        ignore_eos=ignore_eos,
    )
    candidates = [
        Candidate(completion=completion, reward=reward(prompt + completion.text), row=row)
        for row, completion in enumerate(completions)
    ]
    return sorted(candidates, key=lambda c: -c.reward)


def build_reward(name: str) -> Reward:
    """The reward of a name: one of `REWARDS`. Raises `ConfigError` for any other."""
    kind, _, argument = name.partition("=")
    if kind == "python" and not argument:
        return parses_as_python
    if kind == "json" and not argument:
        return parses_as_json
    if kind == "match" and argument:
        try:
            pattern = re.compile(argument, re.DOTALL)
        except re.error as error:
            raise ConfigError(f"reward: {argument!r} is no regular expression ({error})") from error
        return lambda text: float(pattern.search(text) is not None)
    if kind == "command" and argument:
        command = shlex.split(argument)
        return lambda text: passes_command(command, text)
    raise ConfigError(f"reward: got {name!r}, expected one of {REWARDS}")


def parses_as_python(text: str) -> float:
    """1 when the text is a Python module, else the share of its lines before the first error."""
    try:
        ast.parse(text)
    except SyntaxError as error:
        lines = text.count("\n") + 1
        return min((error.lineno or 1) - 1, lines - 1) / lines
    except (ValueError, RecursionError):  # a null character; brackets nested too deep
        return 0.0
    return 1.0


def parses_as_json(text: str) -> float:
    """1 when the text is JSON, else the share of its characters before the first error."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return min(error.pos, max(0, len(text) - 1)) / max(1, len(text))
    except RecursionError:
        return 0.0
    return 1.0


def passes_command(command: Sequence[str], text: str, *, timeout_s: float = COMMAND_TIMEOUT_S) -> float:
    """1 when the command, given the text on stdin, exits with 0 in time. Raises `ConfigError` if it cannot start."""
    try:
        ended = subprocess.run(command, input=text.encode(), capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return 0.0
    except OSError as error:
        raise ConfigError(f"reward: the command {command[0]!r} cannot be run ({error.strerror})") from error
    return float(ended.returncode == 0)
