"""Files of requests: every one answered once, whatever happens on the way."""

from __future__ import annotations

import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ryot.edge.bundle import Bundle
from ryot.edge.cores import count_usable_cores, read_quota
from ryot.edge.generate import generate
from ryot.edge.session import OnnxruntimeEngine
from ryot.edge.tokenizer import load_tokenizer
from ryot.edge.widths import WIDTHS
from ryot.errors import DataError
from ryot.serve.batch import Answered, open_batch
from ryot.serve.sizing import MEASURED_FROM


def write_requests(path: Path, count: int, *, max_tokens: int = 8) -> dict[str, str]:
    """Requests of several lengths, in no order; the prompts by custom id."""
    rng = random.Random(0)
    prompts = {f"r{i}": f"def f{i % 7}(" + "a, " * rng.randrange(20) for i in range(count)}
    lines = []
    for custom_id, prompt in prompts.items():
        body = {"model": "tiny-7", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        lines.append({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return prompts


def start(bundle: Bundle, requests: Path, answers: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from ryot.cli.main import run; run()", "batch", bundle.path, requests]
    return subprocess.Popen([str(part) for part in (*command, "-o", answers, *more)], stderr=subprocess.PIPE, text=True)


def finish(bundle: Bundle, requests: Path, answers: Path, *more: str) -> tuple[int, str]:
    process = start(bundle, requests, answers, *more)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def read(answers: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in answers.read_text().splitlines()]


def text_of(answer: dict[str, object]) -> str:
    return answer["response"]["body"]["choices"][0]["text"]  # type: ignore[index]


def test_answers_are_what_the_engine_gives_alone(chat_bundle: Bundle, tmp_path: Path) -> None:
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    prompts = write_requests(requests, 20)
    code, stderr = finish(chat_bundle, requests, answers)
    assert code == 0, stderr
    found = read(answers)
    assert sorted(str(answer["custom_id"]) for answer in found) == sorted(prompts)
    engine, tokenizer = OnnxruntimeEngine(chat_bundle), load_tokenizer(chat_bundle)
    for answer in found:
        prompt = prompts[str(answer["custom_id"])]
        alone = generate(engine, tokenizer, prompt, max_new_tokens=8, ignore_eos=True)
        assert text_of(answer) == "".join(alone)
    assert "20 of 20 answers, 20 of them new (0 refused), 160 tokens" in stderr


def test_a_batch_takes_the_cores_and_widths_of_its_machine(
    chat_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RYOT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    write_requests(few, 2, max_tokens=1)
    write_requests(many, MEASURED_FROM, max_tokens=1)
    cores = count_usable_cores()

    def first_line(requests: Path, name: str, *more: str) -> str:
        code, stderr = finish(chat_bundle, requests, tmp_path / name, *more)
        assert code == 0, stderr
        return stderr.splitlines()[0]

    head = f"{cores} threads (the cores it may use), "
    assert first_line(few, "1") == f"{head}32 rows (not measured for fewer than {MEASURED_FROM} requests)"
    assert first_line(few, "2", "--threads", "1", "--rows", "3") == "1 threads (as asked), 3 rows (as asked)"
    told = first_line(many, "3")
    found = re.fullmatch(
        re.escape(head) + r"(\d+) rows \(measured here: \d+ tok/s; wider steps bring hardly more\)", told
    )
    assert found and int(found[1]) in WIDTHS
    # What was measured is known from then on, for a small file too.
    assert first_line(few, "4") == told


@pytest.mark.parametrize(
    ("cgroups", "files", "quota"),
    [
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1.5),
        ("0::/not/mounted\n", {"cpu.max": "50000 100000\n"}, 0.5),
        (
            "2:cpu,cpuacct:/x\n0::/\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
            3.0,
        ),
        ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("4:memory:/x\n", {}, None),
    ],
)
def test_a_containers_share_of_the_cores_is_read(
    tmp_path: Path, cgroups: str, files: dict[str, str], quota: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_quota(cgroups, tmp_path) == quota


def test_a_batch_killed_at_any_moment_ends_with_every_answer_once(chat_bundle: Bundle, tmp_path: Path) -> None:
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    prompts = write_requests(requests, 300, max_tokens=12)
    for wanted in (20, 150):
        process = start(chat_bundle, requests, answers, "--rows", "4")
        while process.poll() is None and (not answers.exists() or answers.read_bytes().count(b"\n") < wanted):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was to be killed before its end"
    # As if the kill had come in the middle of a line.
    with answers.open("a") as file:
        file.write('{"id": "batch_req_0", "custom_id": "r1')
    before = answers.read_bytes().count(b"\n")
    code, stderr = finish(chat_bundle, requests, answers)
    assert code == 0, stderr
    assert f"300 of 300 answers, {300 - before} of them new" in stderr
    assert sorted(str(answer["custom_id"]) for answer in read(answers)) == sorted(prompts)
    whole = answers.read_bytes()
    with answers.open("ab") as file:
        file.write(whole.splitlines()[0][:-5])
    assert "300 of 300 answers, 0 of them new" in finish(chat_bundle, requests, answers)[1]
    assert answers.read_bytes() == whole


def test_a_full_disk_leaves_answers_that_can_be_gone_on_with(chat_bundle: Bundle, tmp_path: Path) -> None:
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    write_requests(requests, 3)
    with open_batch(requests, answers, lambda progress: None) as batch:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        # Beyond this size a write is cut short; the next one fails.
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, before[1]))
        try:
            with pytest.raises(DataError, match=r"answers\.jsonl: .*File too large"):
                batch.write(1, Answered(200, b'{"custom_id": "r0"}' + b" " * 30, 1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    code, stderr = finish(chat_bundle, requests, answers)
    assert code == 0, stderr
    assert sorted(str(answer["custom_id"]) for answer in read(answers)) == ["r0", "r1", "r2"]


def test_an_error_of_the_machine_is_no_answer(chat_bundle: Bundle, tmp_path: Path) -> None:
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    write_requests(requests, 2)
    # A byte order mark in front is none of the first request.
    requests.write_bytes(b"\xef\xbb\xbf" + requests.read_bytes())
    with open_batch(requests, answers, lambda progress: None) as batch:
        assert not batch.bad
        batch.write(1, Answered(500, b'{"custom_id": "r0"}', 0))
        assert (batch.progress.lost, batch.progress.done, answers.read_bytes()) == (1, 0, b"")
    code, stderr = finish(chat_bundle, requests, answers)
    assert code == 0, stderr
    assert sorted(str(answer["custom_id"]) for answer in read(answers)) == ["r0", "r1"]


def test_bad_lines_are_reported_and_the_others_answered(chat_bundle: Bundle, tmp_path: Path) -> None:
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    write_requests(requests, 2)
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    with requests.open("ab") as file:
        file.write(b"{not json\n\n\xff\n" + json.dumps({"body": body}).encode() + b"\n")
        for line in (
            {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": body},
            {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": body},
            {"custom_id": "hot", "method": "POST", "url": "/v1/chat/completions", "body": body | {"temperature": 9}},
            {"custom_id": "lost", "method": "POST", "url": "/v1/embeddings", "body": body},
        ):
            file.write(json.dumps(line).encode() + b"\n")
    code, stderr = finish(chat_bundle, requests, answers)
    assert code == 1
    found = {answer["custom_id"]: answer["response"]["status_code"] for answer in read(answers)}  # type: ignore[index]
    assert found == {"r0": 200, "r1": 200, "chat": 200, "hot": 400, "lost": 400}
    for number, reason in (
        (3, "is not JSON"),
        (5, "is not UTF-8"),
        (6, "custom_id: is missing"),
        (8, "was there before"),
    ):
        assert f"line {number} is passed over" in stderr and reason in stderr


def test_answers_to_other_requests_are_left_alone(chat_bundle: Bundle, tmp_path: Path) -> None:
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    write_requests(requests, 2)
    for text, message in (
        ('{"custom_id": "x"}\n', "answers 'x', which"),
        ("hello\n", "line 1 is no answer of a batch"),
    ):
        answers.write_text(text)
        code, stderr = finish(chat_bundle, requests, answers)
        assert code == 1 and message in stderr
        assert answers.read_text() == text
