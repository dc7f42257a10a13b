"""Tasks: those that are built in pass their own verifiers, and a file that makes no sense is refused by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ryot.config import find_named, resolve_variant
from ryot.edge.verifiers import build_verifier, parse_verifier
from ryot.errors import ConfigError, DataError
from ryot.reinforce.procedural import KINDS
from ryot.reinforce.tasks import load_tasks, task_corpus


@pytest.mark.parametrize("kind", KINDS)
def test_a_built_in_tasks_answer_passes_and_another_does_not(kind: str) -> None:
    tasks = load_tasks(kind)
    assert tasks == load_tasks(kind)
    prompts = {split: {task.prompt for task in tasks if task.split == split} for split in ("train", "test")}
    assert len(prompts["train"]) >= 100 and len(prompts["test"]) >= 20
    assert not prompts["train"] & prompts["test"]
    for task in [task for task in tasks if task.answer is not None][:3]:
        assert task.answer is not None
        right, wrong = build_verifier(task.verifier).score(task.prompt, [task.answer, "no " + task.answer])
        assert (right.reward, wrong.passed) == (1.0, False)


def test_the_corpus_of_a_task_holds_no_held_out_prompt() -> None:
    tasks = load_tasks("addition:3")
    texts = [document.text for document in task_corpus("addition:3").documents]
    assert len(texts) == sum(task.split == "train" and task.answer is not None for task in tasks)
    assert 0.45 < len(texts) / sum(task.split == "train" for task in tasks) < 0.55
    held_out = {task.prompt for task in tasks if task.split == "test"}
    assert not [text for text in texts if text[: text.index("=") + 1] in held_out]


def test_a_recipe_may_know_the_first_of_the_answers_alone() -> None:
    every, few = load_tasks("addition:3"), load_tasks("addition:3", answers=150)
    assert [(task.prompt, task.split) for task in few] == [(task.prompt, task.split) for task in every]
    answered = [task for task in every if task.split == "train" and task.answer is not None]
    assert [task for task in few if task.split == "train" and task.answer is not None] == answered[:150]
    assert [d.text for d in task_corpus("addition:3", answers=150).documents] == [
        document.text for document in task_corpus("addition:3").documents[:150]
    ]
    with pytest.raises(
        DataError, match=f"{len(answered)} training tasks have an answer, expected rlvr.answers = 99999"
    ):
        load_tasks("addition:3", answers=99999)


def test_a_file_of_tasks_is_read(tmp_path: Path) -> None:
    lines = [
        {"prompt": "1+1=", "verifier": "exact=2", "split": "train", "answer": "2"},
        {"prompt": "1+2=", "verifier": {"kind": "number", "answer": 3}, "split": "test"},
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = load_tasks(str(path))
    assert (first.verifier, first.answer) == ({"kind": "exact", "answer": "2"}, "2")
    assert (second.prompt, second.answer, second.split) == ("1+2=", None, "test")
    with pytest.raises(DataError, match="1 training tasks have an answer to learn from, expected 100"):
        task_corpus(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: is not JSON"),
        ("3", "line 1: got 3, expected an object"),
        ('{"prompt": "", "verifier": "json", "split": "train"}', "line 1: prompt: got '', expected a text"),
        ('{"prompt": "a", "verifier": "json", "split": "dev"}', "line 1: split: got 'dev', expected train or test"),
        ('{"prompt": "a", "verifier": "rust", "split": "train"}', "line 1: verifier: got 'rust'"),
        ('{"prompt": "a", "verifier": {"kind": "regex", "pattern": "("}, "split": "test"}', "is no regular expression"),
        ('{"prompt": "a", "verifier": "json", "split": "train", "weight": 1}', "line 1: 'weight' is not known"),
        ('{"prompt": "a", "verifier": "json", "split": "train"}', "none is in the test split"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError) as caught:
        load_tasks(str(path))
    assert message in str(caught.value)


def test_a_line_of_a_file_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    # JSON may hold U+2028 and U+0085 inside a string as they are.
    path = tmp_path / "tasks.jsonl"
    prompts = {"train": "a\u2028b\u0085c", "test": "d"}
    lines = [{"prompt": text, "verifier": "exact=x", "split": split} for split, text in prompts.items()]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    assert [task.prompt for task in load_tasks(str(path))] == list(prompts.values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\\ud800", "verifier": "json", "split": "train"}', "line 2: prompt: holds half of a surrogate"),
        (b'{"prompt": "\xff"}', "line 2: byte 82 of the file is not UTF-8"),
        (b'{"prompt": ' + b"[" * 100_000, "line 2: is nested too deep"),
    ],
)
def test_text_that_cannot_be_is_refused_with_its_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    # A byte order mark in front is none of the text.
    first = {"prompt": "a", "verifier": "json", "split": "train", "answer": "{}"}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(first).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        load_tasks(str(path))
    assert message in str(caught.value)


def test_a_prompt_in_both_splits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    task = {"prompt": "a", "verifier": "json"}
    path.write_text("".join(json.dumps(task | {"split": split}) + "\n" for split in ("train", "test")))
    with pytest.raises(DataError, match="the prompt 'a' is in both splits"):
        load_tasks(str(path))


@pytest.mark.parametrize("name", ["division", "addition:", "addition:0", "addition:x", "addition:500"])
def test_a_kind_that_is_none_is_refused(name: str) -> None:
    if name == "addition:":
        assert load_tasks(name) == load_tasks("addition")
        return
    with pytest.raises(ConfigError, match=r"expected a .jsonl file, or KIND:LEVEL with KIND one of addition"):
        load_tasks(name)


def test_a_recipe_is_another_when_its_file_of_tasks_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, path = tmp_path / "mine.toml", tmp_path / "tasks.jsonl"
    packaged = find_named("variants", "rlvr").read_text()
    recipe.write_text(packaged.replace('task = "json:1"', 'task = "tasks.jsonl"'))
    found = []
    for verifier in ("exact=a", "exact=b"):
        tasks = [{"prompt": split, "verifier": verifier, "split": split} for split in ("train", "test")]
        path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
        found.append(resolve_variant(str(recipe), "reference").rlvr)
    first, second = found
    assert first is not None and second is not None and first != second
    # Workers of a cluster run in other folders.
    monkeypatch.chdir("/")
    assert load_tasks(second.task, second.sha256)[0].verifier == parse_verifier("exact=b")
    with pytest.raises(DataError, match="has changed since the run began"):
        load_tasks(first.task, first.sha256)
    path.unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve_variant(str(recipe), "reference")
