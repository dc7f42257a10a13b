"""What a model is reinforced on: prompts, each with the verifier of its answers, split into training and held-out.

A file of tasks is JSONL, a table per line: `prompt`, `verifier` (a table, or a word as on a command line), `split`
(`train` or `test`), and `answer`, one that passes, where supervised training is to see it. A model is reinforced on the
training prompts that have none, so that it answers what it has not seen answered; where all have one, on all. A
recipe's `answers` leaves the first so many of the answers, in the file's order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ryot.config import VariantConfig
from ryot.edge.verifiers import build_verifier, parse_verifier
from ryot.errors import ConfigError, DataError
from ryot.train.corpus import Corpus, Document, load_corpus
from ryot.train.records import Pair

#: Fewer than these have no validation and test parts worth the name.
MIN_DOCUMENTS = 100

TaskSplit = Literal["train", "test"]
_KEYS = ("prompt", "verifier", "split", "answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One prompt."""

    prompt: str
    verifier: Mapping[str, object]
    """The table of its verifier."""
    split: TaskSplit
    answer: str | None = None
    """An answer that passes."""


def load_tasks(source: str, sha256: str = "", *, answers: int = 0) -> list[Task]:
    """The tasks of a `.jsonl` file, or of a built-in kind: `NAME` or `NAME:LEVEL`.

    `answers` keeps the first so many of the training split's answers; 0 keeps all. Raises `ConfigError` for a name that
    is none, `DataError` for a file that cannot be used, is not the one whose `sha256` is given, or has fewer answers.
    """
    if source.endswith(".jsonl"):
        tasks = _read_tasks(Path(source), sha256)
    else:
        from ryot.reinforce.procedural import make_tasks

        tasks = make_tasks(source)
    for split in ("train", "test"):
        if not any(task.split == split for task in tasks):
            raise DataError(f"tasks {source}: none is in the {split} split")
    shared = {task.prompt for task in tasks if task.split == "train"} & {t.prompt for t in tasks if t.split == "test"}
    if shared:
        raise DataError(f"tasks {source}: the prompt {min(shared)[:60]!r} is in both splits")
    return _keep_answers(tasks, answers, f"tasks {source}") if answers else tasks


def _keep_answers(tasks: Sequence[Task], count: int, where: str) -> list[Task]:
    answered = [number for number, task in enumerate(tasks) if task.split == "train" and task.answer is not None]
    if len(answered) < count:
        raise DataError(f"{where}: {len(answered)} training tasks have an answer, expected rlvr.answers = {count}")
    hidden = set(answered[count:])
    return [replace(task, answer=None) if number in hidden else task for number, task in enumerate(tasks)]


def _read_tasks(path: Path, sha256: str) -> list[Task]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"tasks {path}: cannot be read ({error.strerror})") from error
    try:
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"tasks {path}: line {line}: byte {error.start} of the file is not UTF-8") from error
    if sha256 and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(
            f"tasks {path}: has changed since the run began (sha256 {found[:12]}…, was {sha256[:12]}…)",
            hint="restore it, or start a new run",
        )
    return [_read_task(line, f"tasks {path}: line {n}") for n, line in enumerate(lines, start=1) if line.strip()]


def _read_task(line: str, where: str) -> Task:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is not JSON ({error})") from error
    except RecursionError as error:
        raise DataError(f"{where}: is nested too deep") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: got {line[:60]}, expected an object")
    if unknown := [key for key in values if key not in _KEYS]:
        raise DataError(f"{where}: {unknown[0]!r} is not known, expected {', '.join(_KEYS)}")
    prompt, split, answer, verifier = (values.get(key) for key in ("prompt", "split", "answer", "verifier"))
    if not isinstance(prompt, str) or not prompt:
        raise DataError(f"{where}: prompt: got {prompt!r}, expected a text")
    if split not in ("train", "test"):
        raise DataError(f"{where}: split: got {split!r}, expected train or test")
    if answer is not None and not isinstance(answer, str):
        raise DataError(f"{where}: answer: got {answer!r}, expected a text")
    for key, text in (("prompt", prompt), ("answer", answer or "")):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: {key}: holds half of a surrogate pair, which UTF-8 cannot hold") from error
    try:
        table = parse_verifier(verifier) if isinstance(verifier, str) else verifier
        if not isinstance(table, dict):
            raise ConfigError(f"verifier: got {verifier!r}, expected a table or a word")
        build_verifier(table)
    except ConfigError as error:
        raise DataError(f"{where}: {error}", hint=error.hint) from error
    return Task(prompt=prompt, verifier=table, split=split, answer=answer)


def supervised_texts(tasks: Sequence[Task]) -> list[str]:
    """Prompt and answer of each training task that has one: what a model learns from before it is reinforced."""
    return [pair.prompt + pair.completion for pair in _answered(tasks)]


def _answered(tasks: Sequence[Task]) -> list[Pair]:
    return [Pair(t.prompt, t.answer) for t in tasks if t.split == "train" and t.answer is not None]


def task_corpus(source: str, *, answers: int = 0, as_records: bool = False) -> Corpus:
    """The text of supervised training: a document for each training task that has an answer, none of a held-out one.

    `answers` is as for `load_tasks`. `as_records` keeps prompt and answer apart, for a model whose texts end with
    another token than the next begins. Raises like `load_tasks`, and `DataError` where too few have one.
    """
    tasks = load_tasks(source, answers=answers)
    texts: Sequence[str | Pair] = _answered(tasks) if as_records else supervised_texts(tasks)
    if len(texts) < MIN_DOCUMENTS:
        raise DataError(
            f"tasks {source}: {len(texts)} training tasks have an answer to learn from, expected {MIN_DOCUMENTS}",
            hint="give answers, or text of your own with --data",
        )
    documents = [Document(f"{number:06d}", text) for number, text in enumerate(texts)]
    return Corpus(name=f"task {Path(source).name}", documents=tuple(documents))


def load_text(data: Sequence[str], variants: Sequence[VariantConfig]) -> Corpus:
    """The user's text; where there is none and all recipes reinforce on one task, that task's own answers.

    Raises like `load_corpus` and `load_tasks`.
    """
    tasks = {None if variant.rlvr is None else (variant.rlvr.task, variant.rlvr.answers) for variant in variants}
    if not data and len(tasks) == 1 and (task := next(iter(tasks))) is not None:
        return task_corpus(task[0], answers=task[1], as_records=any(variant.init for variant in variants))
    for named in tasks:
        if named is not None:
            load_tasks(named[0], answers=named[1])  # a file that cannot be used is said now
    return load_corpus(data)
