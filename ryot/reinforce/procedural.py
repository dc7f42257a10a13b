"""Built-in tasks: made by a rule, so that there are as many as one likes, and each answer can be checked.

addition:DIGITS   47+85=          -> 132, as a number
sorting:COUNT     sort 4 1 3:     -> 1 3 4, exactly
brackets:DEPTH    close ([{:      -> }]), exactly
json:FIELDS       json name age:  -> {"name": "…", "age": …}, by a schema
python:LEVEL      a function's name and docstring -> its body, by tests in a sandbox
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from ryot.errors import ConfigError
from ryot.reinforce.tasks import Task, TaskSplit

#: At most so many different prompts of a kind, and of these are held out. Of the others every second one has an answer.
NUM_PROMPTS, NUM_TEST = 40_000, 500

_Made = tuple[str, dict[str, object], str]
"""Prompt, verifier, answer."""


def _addition(level: int, rng: random.Random) -> _Made:
    a, b = (rng.randrange(10**level) for _ in range(2))
    return f"{a}+{b}=", {"kind": "exact", "answer": str(a + b)}, str(a + b)


def _sorting(level: int, rng: random.Random) -> _Made:
    digits = [rng.randrange(10) for _ in range(level)]
    answer = " ".join(map(str, sorted(digits)))
    return f"sort {' '.join(map(str, digits))}:", {"kind": "exact", "answer": answer}, answer


def _brackets(level: int, rng: random.Random) -> _Made:
    pairs = ("()", "[]", "{}", "<>")
    text, stack = "", ""
    while len(text) < 2 * level:
        if stack and rng.random() < 0.35:
            text, stack = text + stack[0], stack[1:]
        else:
            pair = rng.choice(pairs)
            text, stack = text + pair[0], pair[1] + stack
    return f"close {text}:", {"kind": "exact", "answer": stack}, stack


_FIELDS = {"name": "string", "age": "integer", "city": "string", "open": "boolean", "price": "integer", "tag": "string"}
_WORDS = ("ann", "bob", "oslo", "rome", "red", "blue", "kim", "lee")


def _json(level: int, rng: random.Random) -> _Made:
    names = rng.sample(sorted(_FIELDS), k=min(level, len(_FIELDS)))
    schema = {
        "type": "object",
        "properties": {name: {"type": _FIELDS[name]} for name in names},
        "required": names,
        "additionalProperties": False,
    }
    values: dict[str, object] = {}
    for name in names:
        kind = _FIELDS[name]
        values[name] = (
            rng.choice(_WORDS) if kind == "string" else rng.randrange(100) if kind == "integer" else rng.random() < 0.5
        )
    hint = " ".join(f"{name}:{_FIELDS[name][0]}" for name in names)
    return f"json {hint} {rng.randrange(1000)}:", {"kind": "json_schema", "schema": schema}, json.dumps(values)


def _python(level: int, rng: random.Random) -> _Made:
    a, b = rng.randrange(2, 10 * level), rng.randrange(1, 10 * level)
    wording, expression = rng.choice(
        (
            (f"x plus {a}", f"x + {a}"),
            (f"{a} times x", f"{a} * x"),
            (f"{a} times x plus {b}", f"{a} * x + {b}"),
            (f"x minus {b} times {a}", f"x - {b} * {a}"),
            (f"the larger of x and {a}", f"max(x, {a})"),
        )
    )
    prompt = f'def f(x):\n    """Return {wording}."""\n    return '
    value = eval(f"lambda x: {expression}")  # an expression of the table above
    tests = "\n".join(f"assert f({x}) == {value(x)}" for x in (-3, 0, 1, 7, 41))
    return prompt, {"kind": "python", "tests": tests, "with_prompt": True}, expression


#: Each with its usual level.
KINDS: dict[str, tuple[Callable[[int, random.Random], _Made], int]] = {
    "addition": (_addition, 3),
    "sorting": (_sorting, 6),
    "brackets": (_brackets, 5),
    "json": (_json, 2),
    "python": (_python, 2),
}


def make_tasks(name: str) -> list[Task]:
    """The tasks of a kind, always the same; a name is `KIND` or `KIND:LEVEL`. Raises `ConfigError`."""
    kind, _, level_text = name.partition(":")
    if kind not in KINDS or not (level_text or "1").isdigit() or not 0 < int(level_text or 1) < 100:
        raise ConfigError(
            f"task: got {name!r}, expected a .jsonl file, or KIND:LEVEL with KIND one of {', '.join(KINDS)}"
        )
    make, usual = KINDS[kind]
    level = int(level_text or usual)
    rng = random.Random(f"{kind}:{level}")
    made: dict[str, _Made] = {}
    for _ in range(2 * NUM_PROMPTS):
        one = make(level, rng)
        made.setdefault(one[0], one)
        if len(made) == NUM_PROMPTS:
            break
    # Prompts that are made often come early; the splits shall be alike.
    ordered = list(made.values())
    rng.shuffle(ordered)
    num_test = min(NUM_TEST, len(ordered) // 5)

    def split(number: int) -> TaskSplit:
        return "test" if number < num_test else "train"

    return [
        Task(prompt=prompt, verifier=verifier, split=split(number), answer=answer if number % 2 else None)
        for number, (prompt, verifier, answer) in enumerate(ordered)
    ]
