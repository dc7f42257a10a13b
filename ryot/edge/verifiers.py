"""Checks that tell how good a text is: programs, not another model's opinion, and never shown to the model.

A verifier is named by a table, `{"kind": "regex", "pattern": "^[0-9]+$"}`, or on a command line by a word, `json`,
`regex=^[0-9]+$`. Best-of-N, the server, reinforcement and evaluation use the same ones:

    json                                the answer parses
    python       tests?, limits?        it parses; with tests, they pass when they are run behind it, in a sandbox
    regex        pattern                the pattern is found
    json_schema  schema                 it is JSON that the schema accepts; needs the package jsonschema
    exact        answer                 it is that text, but for space around it
    number       answer, tolerance?     the last number in it is that one
    majority     pattern?               the share of all candidates that give the same answer
    command      command, limits?       the command, given it on stdin in a sandbox, exits with 0
    entry_point  function, options?     `module:function` of the operator's own, called with prompt and answer

Any of them may be told `"with_prompt": true`, and then looks at the prompt followed by the answer.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
import shlex
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

from ryot.errors import ConfigError


class Verdict(NamedTuple):
    """What a verifier says about an answer."""

    reward: float
    """From 0 (useless) to 1 (passes)."""
    detail: str = ""
    """Why it is not 1, where that can be said."""

    @property
    def passed(self) -> bool:
        """Whether nothing is missing."""
        return self.reward >= 1


PASSED = Verdict(1.0)
Check = Callable[[str], Verdict]


class Verifier(ABC):
    """Scores answers to one prompt."""

    kind: ClassVar[str]
    #: Whether an answer's reward depends on the others, so that none is known before all are there.
    needs_all: ClassVar[bool] = False
    with_prompt: bool = False

    @abstractmethod
    def check(self, text: str) -> Verdict:
        """The verdict on one text."""

    def score(self, prompt: str, answers: Sequence[str]) -> list[Verdict]:
        """The verdict on each of several answers to a prompt."""
        return [self.check(text) for text in self.texts(prompt, answers)]

    def texts(self, prompt: str, answers: Sequence[str]) -> list[str]:
        """What is looked at."""
        return [prompt + answer for answer in answers] if self.with_prompt else list(answers)


class JsonVerifier(Verifier):
    """1 when the text is JSON, else the share of its characters before the first error."""

    kind = "json"

    def check(self, text: str) -> Verdict:
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return Verdict(min(error.pos, max(0, len(text) - 1)) / max(1, len(text)), str(error))
        except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
            return Verdict(0.0, str(error))
        return PASSED


class PythonVerifier(Verifier):
    """1 when the text is a Python module, else the share of its lines before the first error."""

    kind = "python"

    def check(self, text: str) -> Verdict:
        try:
            ast.parse(text)
        except SyntaxError as error:
            lines = text.count("\n") + 1
            return Verdict(min((error.lineno or 1) - 1, lines - 1) / lines, str(error))
        except (ValueError, RecursionError, MemoryError) as error:  # a null character; brackets nested too deep
            return Verdict(0.0, str(error))
        return PASSED


@dataclass
class RegexVerifier(Verifier):
    """1 when the pattern is found anywhere; a dot is any character."""

    pattern: re.Pattern[str]
    kind = "regex"

    def check(self, text: str) -> Verdict:
        return PASSED if self.pattern.search(text) else Verdict(0.0, "the pattern is not found")


@dataclass
class SchemaVerifier(Verifier):
    """1 for JSON that a schema accepts, a half for other JSON, less for what is none."""

    validate: Callable[[object], str | None]
    """What is wrong with a value; None where nothing is."""
    kind = "json_schema"

    def check(self, text: str) -> Verdict:
        parsed = JsonVerifier().check(text)
        if not parsed.passed:
            return Verdict(0.5 * parsed.reward, parsed.detail)
        try:
            wrong = self.validate(json.loads(text))
        except RecursionError as error:
            return Verdict(0.0, str(error))
        return PASSED if wrong is None else Verdict(0.5, wrong)


@dataclass
class ExactVerifier(Verifier):
    """1 for the answer itself, but for space around it."""

    answer: str
    kind = "exact"

    def check(self, text: str) -> Verdict:
        return PASSED if text.strip() == self.answer.strip() else Verdict(0.0, "is not the answer")


_NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?")


@dataclass
class NumberVerifier(Verifier):
    """1 when the last number of a text is the answer."""

    answer: float
    tolerance: float
    kind = "number"

    def check(self, text: str) -> Verdict:
        found = _NUMBER.findall(text)
        if not found:
            return Verdict(0.0, "there is no number")
        close = abs(float(found[-1].replace(",", "")) - self.answer) <= self.tolerance
        return PASSED if close else Verdict(0.0, f"the last number is {found[-1][:40]}")


@dataclass
class MajorityVerifier(Verifier):
    """The share of candidates that give the same answer; with a pattern, its first group is what is compared."""

    pattern: re.Pattern[str] | None
    kind = "majority"
    needs_all = True

    def check(self, text: str) -> Verdict:
        raise AssertionError("one text has no majority")

    def score(self, prompt: str, answers: Sequence[str]) -> list[Verdict]:
        votes = [self._vote(text) for text in self.texts(prompt, answers)]
        counts = Counter(vote for vote in votes if vote is not None)
        return [
            Verdict(0.0, "gives no answer") if vote is None else Verdict(counts[vote] / len(votes)) for vote in votes
        ]

    def _vote(self, text: str) -> str | None:
        if self.pattern is None:
            return text.strip()
        found = self.pattern.search(text)
        return None if found is None else found[1 if self.pattern.groups else 0]


@dataclass
class EntryPointVerifier(Verifier):
    """What a function of the operator's own says: a number from 0 to 1, or whether it passes."""

    function: Callable[..., object]
    name: str
    options: Mapping[str, object]
    kind = "entry_point"

    def check(self, text: str) -> Verdict:
        raise AssertionError("a function is given the prompt too")

    def score(self, prompt: str, answers: Sequence[str]) -> list[Verdict]:
        return [self._call(prompt, text) for text in self.texts(prompt, answers)]

    def _call(self, prompt: str, text: str) -> Verdict:
        found = self.function(prompt, text, **self.options)
        if not isinstance(found, int | float) or not 0 <= found <= 1:
            raise ConfigError(f"verifier {self.name}: returned {found!r}, expected a number from 0 to 1")
        return Verdict(float(found))


class Rights(NamedTuple):
    """Which kinds whoever names a verifier may use; a stranger's patterns are run in a sandbox, where they cannot hang.

    By default everything, as for who runs the program.
    """

    allowed: frozenset[str] = frozenset(("tests", "command", "entry_point"))
    """Of what runs programs: `tests` of `python`, `command`, `entry_point`; a stranger's by `entry_point=FUNCTION`."""
    trusted: bool = True
    """Whether patterns and schemas are the operator's own."""


OWNER = Rights()
#: Fields of each kind beside `kind` and `with_prompt`.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "json": (),
    "python": ("tests", "limits"),
    "regex": ("pattern",),
    "json_schema": ("schema",),
    "exact": ("answer",),
    "number": ("answer", "tolerance"),
    "majority": ("pattern",),
    "command": ("command", "limits"),
    "entry_point": ("function", "options"),
}


def parse_verifier(text: str) -> dict[str, object]:
    """The table of a verifier as a command line names it: a table in JSON, `KIND`, or `KIND=ARGUMENT`.

    The argument is the pattern, schema, answer, command or function, of `python` the tests. Raises `ConfigError`.
    """
    if text.startswith("{"):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"verifier: {text[:60]!r} is not JSON ({error})") from error
        assert isinstance(found, dict)
        return found
    kind, given, argument = text.partition("=")
    names = FIELDS.get(kind, ())
    if kind not in FIELDS or (given and not names):
        raise ConfigError(f"verifier: got {text[:60]!r}, expected a table in JSON, or one of {_words()}")
    if not given:
        return {"kind": kind}
    value: object = argument
    if kind in ("json_schema", "number"):
        try:
            value = json.loads(argument)
        except ValueError as error:
            raise ConfigError(f"verifier: {kind}={argument[:60]!r} is not JSON ({error})") from error
    return {"kind": kind, names[0]: value}


def _words() -> str:
    return ", ".join(f"{kind}={names[0].upper()}" if names else kind for kind, names in FIELDS.items())


def build_verifier(table: Mapping[str, object], rights: Rights = OWNER) -> Verifier:
    """The verifier of a table. Raises `ConfigError` naming the field, the value and what was expected."""
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise ConfigError(f"verifier.kind: got {kind!r}, expected one of {', '.join(FIELDS)}")
    known = (*FIELDS[kind], "kind", "with_prompt")
    if unknown := [name for name in table if name not in known]:
        raise ConfigError(f"verifier.{unknown[0]}: is no field of {kind}, expected one of {', '.join(known)}")
    what = "tests" if kind == "python" and table.get("tests") is not None else kind
    # Python has functions that run any text as a program: a stranger calls only those that were named.
    known_as = f"{what}={table.get('function')}" if what == "entry_point" and not rights.trusted else what
    if what in OWNER.allowed and known_as not in rights.allowed:
        raise ConfigError(f"verifier.kind: {what} runs programs, which is not allowed here")
    verifier = _build(kind, table, rights)
    verifier.with_prompt = _field(table, "with_prompt", bool, False)
    if not rights.trusted and kind in ("regex", "json_schema", "majority"):
        if kind == "majority" and table.get("pattern") is not None:
            raise ConfigError("verifier.pattern: is not taken from a client here")
        from ryot.edge.sandboxed_verifiers import IsolatedVerifier

        return verifier if kind == "majority" else IsolatedVerifier(table, verifier)
    return verifier


def _build(kind: str, table: Mapping[str, object], rights: Rights) -> Verifier:
    match kind:
        case "json":
            return JsonVerifier()
        case "python" if table.get("tests") is None:
            return PythonVerifier()
        case "regex":
            return RegexVerifier(_pattern(table))
        case "json_schema":
            return SchemaVerifier(_build_validator(_field(table, "schema", dict)))
        case "exact":
            return ExactVerifier(_field(table, "answer", str))
        case "number":
            return NumberVerifier(_number(table, "answer", None), _number(table, "tolerance", 0.0))
        case "majority":
            return MajorityVerifier(None if table.get("pattern") is None else _pattern(table))
        case "entry_point":
            name = _field(table, "function", str)
            return EntryPointVerifier(_load_function(name), name, _field(table, "options", dict, {}))
    from ryot.edge.sandboxed_verifiers import CommandVerifier, TestsVerifier, read_limits

    limits = read_limits(table.get("limits"), bounded=not rights.trusted)
    if kind == "python":
        return TestsVerifier(_field(table, "tests", str), limits)
    return CommandVerifier(_command(table.get("command")), limits)


T = TypeVar("T")
_NAMES: Mapping[type, str] = {bool: "true or false", dict: "an object", str: "a string"}


def _field(table: Mapping[str, object], name: str, kind: type[T], default: T | None = None) -> T:
    value = table.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind):
        raise ConfigError(f"verifier.{name}: got {value!r}, expected {_NAMES[kind]}")
    return value


def _number(table: Mapping[str, object], name: str, default: float | None) -> float:
    value = table.get(name, default)
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number that is too large
        pass
    raise ConfigError(f"verifier.{name}: got {value!r}, expected a number")


def _pattern(table: Mapping[str, object]) -> re.Pattern[str]:
    pattern = _field(table, "pattern", str)
    try:
        return re.compile(pattern, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"verifier.pattern: {pattern[:60]!r} is no regular expression ({error})") from error


def _command(value: object) -> list[str]:
    try:
        words = shlex.split(value) if isinstance(value, str) else value
    except ValueError:  # a quotation that does not end
        words = None
    if (
        not isinstance(words, list)
        or not words
        or not all(isinstance(word, str) and "\0" not in word for word in words)
    ):
        raise ConfigError(f"verifier.command: got {value!r}, expected a command, or a list of its words")
    return words


def _load_function(name: str) -> Callable[..., object]:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"verifier.function: {name!r} cannot be loaded ({error}), expected module:function"
        ) from error
    if not callable(function):
        raise ConfigError(f"verifier.function: {name!r} is no function")
    return function  # type: ignore[no-any-return]


def _build_validator(schema: Mapping[str, object]) -> Callable[[object], str | None]:
    try:
        import jsonschema
        import referencing
    except ImportError as error:
        raise ConfigError(
            "verifier: json_schema needs the package jsonschema", hint="pip install jsonschema"
        ) from error
    try:
        kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"verifier.schema: is no JSON schema ({error.message})") from error
    except TypeError as error:  # a $schema that is no text
        raise ConfigError(f"verifier.schema: is no JSON schema ({error})") from error
    except RecursionError as error:
        raise ConfigError("verifier.schema: is nested too deep") from error
    # A registry of its own, empty one: the default one fetches what a schema refers to from the network.
    validator = kind(schema, registry=referencing.Registry())

    def validate(value: object) -> str | None:
        try:
            found = jsonschema.exceptions.best_match(validator.iter_errors(value))
        except referencing.exceptions.Unresolvable as error:
            raise ConfigError(f"verifier.schema: refers to {error.ref!r}, which is not in it") from error
        return None if found is None else str(found.message)[:300]

    return validate
