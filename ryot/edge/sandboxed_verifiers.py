"""The verifiers that run programs: each in a sandbox, whoever wrote them."""

from __future__ import annotations

import json
import math
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import ryot
from ryot.edge.sandbox import Limits, run_sandboxed
from ryot.edge.verifiers import PASSED, Verdict, Verifier
from ryot.errors import ConfigError

#: Of an answer that is run with tests: a process of its own each, all in one sandbox.
_ANSWER_TESTS = Path(__file__).with_name("answer_tests.py")
#: Bytes of a line about one answer, at most.
KEPT_RESULT = 1600
#: Bytes of a verdict as JSON, at most: 300 characters of twelve bytes, and the reward.
KEPT_VERDICT = 4000
#: Time of a check of a stranger's pattern or schema.
ISOLATED = Limits(wall_s=5.0, cpu_s=2, processes=1)
_CHECK = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from ryot.edge.verifiers import build_verifier
json.dump(build_verifier(json.loads(sys.argv[1])).check(sys.stdin.read()), sys.stdout)
"""


def read_limits(value: object, *, bounded: bool) -> Limits:
    """The limits of a table; those that it does not name are the defaults, and `bounded` ones are at most these.

    Raises `ConfigError`.
    """
    if value is None:
        return Limits()
    known = {field.name: type(getattr(Limits(), field.name)) for field in fields(Limits)}
    if not isinstance(value, dict) or not value.keys() <= known.keys():
        raise ConfigError(f"verifier.limits: got {value!r}, expected an object with {', '.join(known)}")
    for name, limit in value.items():
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
            raise ConfigError(f"verifier.limits.{name}: got {limit!r}, expected a number above 0")
        if known[name] is int and limit < 1:
            raise ConfigError(f"verifier.limits.{name}: got {limit!r}, expected a whole number")
        if bounded and limit > (most := getattr(Limits(), name)):
            raise ConfigError(f"verifier.limits.{name}: got {limit!r}, expected at most {most} from a client")
    return Limits(**{name: known[name](limit) for name, limit in value.items()})


@dataclass
class CommandVerifier(Verifier):
    """1 when the command, given the text on stdin, exits with 0 within the limits."""

    command: Sequence[str]
    limits: Limits
    kind = "command"

    def check(self, text: str) -> Verdict:
        outcome = run_sandboxed(self.command, text, limits=self.limits)
        if outcome.status == 0:
            return PASSED
        why = f"took too much {outcome.reason}" if outcome.reason else f"exit status {outcome.status}"
        return Verdict(0.0, f"{why}: {outcome.output.strip()[-300:]}".rstrip(": "))


@dataclass
class TestsVerifier(Verifier):
    """1 when the tests pass behind the text, a Python module.

    Text and tests share a process, so that a text could in principle find out how success is told (a secret that is
    printed after the last test); it cannot by ending the process early or by printing.
    """

    __test__ = False  # pytest would take it for one of its own
    tests: str
    limits: Limits
    kind = "python"

    def check(self, text: str) -> Verdict:
        return self.score("", [text])[0]

    def score(self, prompt: str, answers: Sequence[str]) -> list[Verdict]:
        secret = secrets.token_hex(16)
        wall_s = self.limits.wall_s
        orders = {
            "texts": self.texts(prompt, answers),
            "tests": self.tests,
            "secret": secret,
            "wall_s": wall_s,
            "cpu_s": self.limits.cpu_s,
        }
        # Each text has the limits for itself; the process that forks them needs as much for all.
        count = len(answers)
        limits = Limits(
            wall_s=wall_s * (count + 1),
            cpu_s=self.limits.cpu_s * (count + 1),
            memory_bytes=self.limits.memory_bytes,
            disk_bytes=self.limits.disk_bytes,
            files=self.limits.files,
            open_files=self.limits.open_files,
            processes=self.limits.processes + 1,
        )
        command = [sys.executable, "-I", "-S", str(_ANSWER_TESTS)]
        outcome = run_sandboxed(command, json.dumps(orders), limits=limits, kept_output=KEPT_RESULT * (count + 1))
        lines = [line for line in outcome.output.splitlines() if line.startswith(secret)]
        results = {int(number): said for _, number, said in (line.split(" ", 2) for line in lines)}
        return [_read_result(results.get(number, "did not end")) for number in range(count)]


def _read_result(said: str) -> Verdict:
    return PASSED if said == "passed" else Verdict(0.0, said)


@dataclass
class IsolatedVerifier(Verifier):
    """Another verifier, run in a sandbox: for a stranger's patterns, which may take forever."""

    table: Mapping[str, object]
    verifier: Verifier

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.verifier.kind

    def score(self, prompt: str, answers: Sequence[str]) -> list[Verdict]:
        return [self.check(text) for text in self.verifier.texts(prompt, answers)]

    def check(self, text: str) -> Verdict:
        folders = [str(Path(ryot.__file__).parents[1]), *(path for path in sys.path if path)]
        folders = [path for path in folders if Path(path).exists()]
        table = {name: value for name, value in self.table.items() if name != "with_prompt"}
        words = [json.dumps(table), json.dumps(folders)]
        # What Python warns of in a pattern is no part of the verdict.
        command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _CHECK, *words]
        outcome = run_sandboxed(command, text, limits=ISOLATED, readable=folders, kept_output=KEPT_VERDICT)
        if outcome.reason or outcome.status in (128 + 9, 128 + 24):
            return Verdict(0.0, "the check took too long")
        if outcome.status != 0:
            return Verdict(0.0, f"the check failed: {outcome.output.strip().rpartition(chr(10))[2][:300]}")
        return Verdict(*json.loads(outcome.output))
