"""What reaches the server that no well-behaved client sends: each gets an answer that says what is wrong."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from openai import AuthenticationError, RateLimitError
from prometheus_client.parser import text_string_to_metric_families

from ryot.edge.bundle import Bundle
from tests.otlp import Receiver, total
from tests.serve.conftest import Server, connect, get, metric, running

JSON = {"Content-Type": "application/json"}


def post(
    server: Server, path: str, body: object, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, object]]:
    """Status and JSON of an answer; a body that is no bytes is sent as JSON."""
    connection = connect(server)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, JSON | (headers or {}))
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    return answer.status, found


def wait_for(condition: object, *, timeout_s: float = 20) -> None:
    """Until a condition that depends on another process holds."""
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


PROMPT = {"model": "tiny-7", "prompt": "a", "max_tokens": 2}
RESPONSE = {"model": "tiny-7", "input": "a"}
CHAT = {"model": "tiny-7", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("completions", PROMPT | {"temperature": 3}, "temperature", "got 3, expected a number from 0 to 2"),
        ("completions", PROMPT | {"temperature": "hot"}, "temperature", 'got "hot", expected a number from 0 to 2'),
        ("completions", PROMPT | {"max_tokens": 1.5}, "max_tokens", "got 1.5, expected a whole number not below 0"),
        ("completions", PROMPT | {"max_tokens": True}, "max_tokens", "got true, expected a whole number"),
        ("completions", PROMPT | {"n": 65}, "n", "got 65, expected a whole number from 1 to 64"),
        ("completions", PROMPT | {"stop": ["a", ""]}, "stop", 'got "", expected strings of 1 to 1000'),
        ("completions", PROMPT | {"stop": "a", "response_format": {"type": "json_object"}}, "stop", "beside a form"),
        ("completions", PROMPT | {"logit_bias": {"384": 1}}, "logit_bias", "expected a token id below 384"),
        ("completions", PROMPT | {"logit_bias": {"1": 101}}, "logit_bias.1", "expected a number from -100 to 100"),
        ("completions", PROMPT | {"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ("completions", PROMPT | {"prompt": [1, 384]}, "prompt", "got token 384, expected ids below 384"),
        ("completions", PROMPT | {"prompt": []}, "prompt", "expected a string, token ids, or a list of either"),
        ("completions", PROMPT | {"prompt": "\ud800"}, "prompt", "half of a pair, which UTF-8 cannot hold"),
        ("completions", PROMPT | {"max_tokens": 10**30}, "max_tokens", "do not fit the context of 2048"),
        ("completions", PROMPT | {"prompt": [1] * 3000}, "prompt", "prompt: a prompt of 3000 tokens and 2 new ones"),
        ("completions", {"model": "tiny-7", "prompt": [1] * 2040}, "prompt", "2040 tokens and 16 new ones do not fit"),
        ("chat/completions", CHAT | {"max_tokens": 2048}, "max_tokens", "2048 new ones do not fit"),
        (
            "chat/completions",
            CHAT | {"max_completion_tokens": 2048},
            "max_completion_tokens",
            "max_completion_tokens: a prompt of",
        ),
        (
            "chat/completions",
            CHAT | {"max_completion_tokens": -1},
            "max_completion_tokens",
            "got -1, expected a whole number",
        ),
        ("responses", RESPONSE | {"max_output_tokens": 2048}, "max_output_tokens", "max_output_tokens: a prompt of"),
        ("responses", RESPONSE | {"input": [{"role": "king", "content": "a"}]}, "input[0].role", "input[0].role: got"),
        (
            "responses",
            RESPONSE | {"instructions": "a", "input": [{"role": "user", "content": 5}]},
            "input[0].content",
            "input[0].content: got 5",
        ),
        ("responses", RESPONSE | {"text": {"format": {"type": "xml"}}}, "text.format.type", "text.format.type: got"),
        ("responses", RESPONSE | {"input": "a" * 9000}, "input", "input: have"),
        ("completions", PROMPT | {"stream_options": {}}, "stream_options", "only for a request with stream"),
        ("completions", PROMPT | {"best_of": 2, "n": 3}, "best_of", "got 2, expected at least n, which is 3"),
        ("chat/completions", CHAT | {"messages": []}, "messages", "is empty or missing"),
        ("chat/completions", CHAT | {"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "self is set by"),
        (
            "chat/completions",
            CHAT | {"response_format": {"type": "regex", "regex": "\ud800"}},
            "response_format",
            "the regular expression cannot be used",
        ),
        (
            "completions",
            PROMPT | {"response_format": {"type": "regex", "regex": "a" * 16_385}},
            "response_format",
            "the regular expression has 16385 characters, expected at most 16384",
        ),
        (
            "completions",
            PROMPT | {"response_format": {"type": "grammar", "grammar": 'root ::= "' + "a" * 4_096}},
            "response_format",
            "the grammar has 4106 characters, expected at most 4096",
        ),
        (
            "completions",
            PROMPT | {"structured_outputs": {"json": {"const": "a" * 65_536}}},
            "structured_outputs",
            "the schema has 65549 characters, expected at most 65536",
        ),
        ("chat/completions", CHAT | {"messages": [{"role": "king"}]}, "messages[0].role", "expected one of system"),
        (
            "chat/completions",
            CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
            "expected a part of type text",
        ),
        ("chat/completions", CHAT | {"top_logprobs": 2}, "top_logprobs", "only for a request with logprobs"),
        (
            "chat/completions",
            CHAT | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
            "response_format",
            "nonsense",
        ),
        (
            "chat/completions",
            CHAT | {"tools": [{"type": "function"}]},
            "tools[0].function.name",
            "expected up to 64 letters",
        ),
        ("chat/completions", CHAT | {"tool_choice": "required"}, "tool_choice", "only for a request with tools"),
        ("completions", PROMPT | {"response_format": {"type": "regex"}}, "response_format.regex", "expected a string"),
    ],
)
def test_a_field_that_is_wrong_is_named(server: Server, path: str, body: object, param: str, message: str) -> None:
    status, found = post(server, f"/v1/{path}", body)
    error = found["error"]
    assert isinstance(error, dict)
    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert message in error["message"]


def test_a_grammar_that_can_be_read_in_too_many_ways_is_given_up_on(server: Server) -> None:
    form = {"type": "grammar", "grammar": "start: s\ns: s s | s s s | s s s s | /[a-z ]/"}
    status, found = post(
        server, "/v1/completions", PROMPT | {"max_tokens": 1000, "response_format": form, "logit_bias": {"0": -100}}
    )
    assert status == 400 and "too many items" in json.dumps(found).lower()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body: is not JSON"),
        (b"[1]", "got a list, expected an object"),
        (b'{"prompt": "\xff"}', "byte 12 is not UTF-8"),
        (b'{"temperature": NaN}', "NaN is not a number in JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b"", "the body: is not JSON"),
    ],
)
def test_a_body_that_is_no_json_is_told_so(server: Server, body: bytes, message: str) -> None:
    status, found = post(server, "/v1/completions", body)
    assert status == 400 and message in json.dumps(found)


def test_paths_methods_and_kinds_that_are_not_there(server: Server) -> None:
    assert post(server, "/v1/completion", {})[0] == 404
    status, text = get(server, "/v1/completions")
    assert status == 405 and json.loads(text)["error"]["type"] == "invalid_request_error"
    status, found = post(server, "/v1/completions", {}, {"Content-Type": "text/plain"})
    assert status == 415 and "expected application/json" in json.dumps(found)


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(server: Server) -> None:
    connection = connect(server)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413 and "more than 4000000 bytes" in answer.read().decode()
    connection.close()


def test_a_header_beyond_the_limit_is_refused(server: Server) -> None:
    address = urlsplit(server.address)
    with socket.create_connection((address.hostname, address.port), 30) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000 + b"\r\n\r\n")
        head, _, body = raw.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ") and b"application/json" in head
    assert json.loads(body)["error"]["code"] == "head_too_long"
    with socket.create_connection((address.hostname, address.port), 30) as raw:
        raw.sendall(b"what is this\r\n\r\n")
        head, _, body = raw.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and json.loads(body)["error"]["code"] == "bad_http"
    assert get(server, "/health") == (200, '{"status":"ok"}')


def test_a_name_that_anyone_can_define_is_no_way_in(server: Server) -> None:
    status, text = get(server, "/v1/models", {"Host": "evil.example:8000"})
    assert status == 403 and "localhost" in text
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
        assert get(server, "/v1/models", {"Host": host})[0] == 200


def test_tokens_go_there_and_back(server: Server) -> None:
    status, found = post(server, "/tokenize", {"model": "tiny-7", "prompt": "def add(a, b): 日本"})
    assert status == 200
    back = post(server, "/detokenize", {"model": "tiny-7", "tokens": found["tokens"]})
    assert back == (200, {"prompt": "def add(a, b): 日本"})
    chat = post(server, "/tokenize", {"model": "tiny-7", "messages": [{"role": "user", "content": "a"}]})[1]
    expected = post(server, "/tokenize", {"model": "tiny-7", "prompt": "user: a\nassistant:"})[1]
    assert chat == expected
    assert post(server, "/detokenize", {"model": "tiny-7", "tokens": [-1]})[0] == 400


def test_the_page_and_the_metrics_are_there(server: Server) -> None:
    status, text = get(server, "/")
    assert status == 200 and "<title>" in text
    before = metric(server, 'vllm:generation_tokens_total{model_name="tiny-7"}')
    assert post(server, "/v1/completions", PROMPT | {"ignore_eos": True})[0] == 200
    assert metric(server, 'vllm:generation_tokens_total{model_name="tiny-7"}') == before + 2


#: Histograms that vLLM's dashboards and its users' alerts ask for, and how much each grows by three requests: one of 3
#: tokens of prompt and 5 of answer, one of 2 and 3 with two answers, and one of 4 and 7.
HISTOGRAMS: dict[str, tuple[int, int | None]] = {
    "time_to_first_token_seconds": (4, None),
    "inter_token_latency_seconds": (4 + 2 * 2 + 6, None),
    "request_time_per_output_token_seconds": (4, None),
    "request_queue_time_seconds": (4, None),
    "request_prefill_time_seconds": (4, None),
    "request_decode_time_seconds": (4, None),
    "request_inference_time_seconds": (4, None),
    "e2e_request_latency_seconds": (4, None),
    "request_prompt_tokens": (4, 3 + 2 * 2 + 4),
    "request_generation_tokens": (4, 5 + 2 * 3 + 7),
    "request_params_max_tokens": (4, 5 + 2 * 3 + 7),
    "request_params_n": (3, 1 + 2 + 1),
}


def test_histograms_count_what_vllms_do(plain_bundle: Bundle, tmp_path: Path) -> None:
    with running(tmp_path, plain_bundle.path, "--prefix-cache", 0) as server:
        for prompt, n, max_tokens in (([5, 6, 7], 1, 5), ([8, 9], 2, 3), ([5, 9, 8, 7], 1, 7)):
            body = {"prompt": prompt, "n": n, "max_tokens": max_tokens, "ignore_eos": True}
            assert post(server, "/v1/completions", body)[0] == 200
        text = get(server, "/metrics")[1]
        families = {family.name: family for family in text_string_to_metric_families(text)}
        for name, (count, total) in HISTOGRAMS.items():
            family = families[f"vllm:{name}"]
            values = {sample.name: sample.value for sample in family.samples}
            buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
            assert family.type == "histogram" and buckets == sorted(buckets) and buckets[-1] == count, name
            assert values[f"vllm:{name}_count"] == count, name
            assert total is None or values[f"vllm:{name}_sum"] == total, name
        seconds = {
            name: metric(server, f"vllm:request_{name}_time_seconds_sum") for name in ("inference", "prefill", "decode")
        }
        assert seconds["inference"] == pytest.approx(seconds["prefill"] + seconds["decode"], abs=1e-5)
        # Two answers share their prompt, although nothing is kept, and nothing follows a last token.
        assert metric(server, "vllm:iteration_tokens_total_sum") == (3 + 4) + (2 + 2 * 2) + (4 + 6)
        assert metric(server, 'vllm:request_success_total{model_name="tiny-1",finished_reason="length"}') == 4
        assert metric(server, "vllm:prefix_cache_queries_total") == 3 + 2 * 2 + 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_row(server: Server, stream: bool) -> None:
    name = 'vllm:request_success_total{model_name="tiny-7",finished_reason="abort"}'
    before = metric(server, name)
    connection = connect(server)
    body = PROMPT | {"max_tokens": 2000, "ignore_eos": True, "stream": stream, "logprobs": 20}
    connection.request("POST", "/v1/completions", json.dumps(body), JSON)
    wait_for(lambda: metric(server, 'vllm:num_requests_running{model_name="tiny-7"}') >= 1)
    connection.close()
    wait_for(lambda: metric(server, name) == before + 1)
    assert metric(server, 'vllm:num_requests_running{model_name="tiny-7"}') == 0


def test_a_reader_that_does_not_read_stalls_nobody(server: Server) -> None:
    address = urlsplit(server.address)
    body = json.dumps(PROMPT | {"max_tokens": 2000, "ignore_eos": True, "stream": True, "logprobs": 20}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n"
    with socket.create_connection((address.hostname, address.port), 30) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.sendall(head.encode() + b"\r\n" + body)
        assert raw.recv(10)
        assert post(server, "/v1/completions", PROMPT | {"ignore_eos": True})[0] == 200


def test_two_hundred_connections_at_once_all_get_their_answer(server: Server) -> None:
    def ask(number: int) -> str:
        body = PROMPT | {"prompt": f"number {number % 5}", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
        status, found = post(server, "/v1/completions", body)
        assert status == 200, found
        return json.dumps(found["choices"])

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, range(200)))
    assert [answers[number] == answers[number % 5] for number in range(200)] == [True] * 200


def test_random_requests_never_give_a_500(server: Server) -> None:
    rng = random.Random(0)
    values: list[object] = [None, True, -1, 0, 1, 2**70, 1.5, -1e300, "", "a", "\ud800", [], ["a"], [[]], [1], {}]
    values += [{"type": "json_object"}, {"\ud800": 1}, {"1": 5}, "required", [{"type": "function"}], [{"role": "user"}]]
    values += [[{"type": "function", "function": {"name": "f", "parameters": {"type": "\ud800"}}}], [{"type": [1]}]]
    values += [{"format": {"type": "json_schema", "schema": {"$ref": "#"}}}, {"type": "regex", "regex": "(" * 40}]
    names = [
        "temperature", "top_p", "min_p", "top_k", "n", "best_of", "stop", "seed", "echo", "logprobs", "top_logprobs",
        "logit_bias", "max_tokens", "max_completion_tokens", "presence_penalty", "frequency_penalty", "stream_options",
        "response_format", "structured_outputs", "repetition_penalty", "ignore_eos", "prompt", "messages", "tools",
        "chat_template_kwargs", "stream", "model", "user", "metadata", "\ud800", "tool_choice", "input", "text",
    ]  # fmt: skip
    statuses = set()
    for _ in range(400):
        response = {"model": "tiny-7", "input": "a", "max_output_tokens": 2}
        path, body = rng.choice(
            [("completions", dict(PROMPT)), ("chat/completions", dict(CHAT)), ("responses", response)]
        )
        for name in rng.sample(names, rng.randrange(1, 4)):
            body[name] = rng.choice(values)
        connection = connect(server)
        connection.request("POST", f"/v1/{path}", json.dumps(body), JSON)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        assert answer.status in (200, 400, 404), (body, text)
        assert b"Traceback" not in text
        statuses.add(answer.status)
    assert statuses == {200, 400, 404}


def test_a_key_opens_and_keeps_prompts_apart(plain_bundle: Bundle, tmp_path: Path) -> None:
    arguments = (plain_bundle.path, "--api-key", "first", "--api-key", "second", "--rows", 1, "--max-waiting", 1)
    with running(tmp_path, *arguments) as server:
        assert get(server, "/health")[0] == get(server, "/ready")[0] == 200
        assert get(server, "/metrics")[0] == 401
        with pytest.raises(AuthenticationError, match="the API key is missing or wrong"):
            server.client("third").models.list()
        prompt = "a text that is known after it was asked once"

        def cached(key: str) -> int:
            found = server.client(key).completions.create(model="tiny-1", prompt=prompt, max_tokens=1)
            assert found.usage is not None and found.usage.prompt_tokens_details is not None
            return found.usage.prompt_tokens_details.cached_tokens or 0

        assert [cached(key) > 0 for key in ("first", "first", "second", "second")] == [False, True, False, True]

        # One row and one place to wait: of five at once some are turned away.
        def ask(_: int) -> int | None:
            try:
                server.client("first").completions.create(
                    model="tiny-1", prompt="x", max_tokens=200, extra_body={"ignore_eos": True}
                )
            except RateLimitError as error:
                assert error.code == "queue_full"
                return int(error.response.headers["Retry-After"])
            return None

        with ThreadPoolExecutor(8) as pool:
            waits = list(pool.map(ask, range(8)))
        assert None in waits and any(wait is not None and wait >= 1 for wait in waits)
        assert server.end() == 0
        log = server.log.read_text()
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        assert {line["status"] for line in lines} == {200, 401, 429}
        assert {"client", "method", "path", "status", "seconds"} <= lines[0].keys()
        assert "known after" not in log and "first" not in log


def test_what_is_under_way_is_finished_at_the_end(chat_bundle: Bundle, tmp_path: Path) -> None:
    receiver = Receiver()
    with running(tmp_path, chat_bundle.path, "--metrics-to", receiver.address) as server:
        stream = server.client().completions.create(
            model="tiny-7", prompt="a", max_tokens=1500, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        first = next(stream)
        ender = threading.Thread(target=server.end)
        ender.start()
        last = [first, *stream][-1]
        assert last.choices[0].finish_reason == "length"
        ender.join()
        assert server.process.returncode == 0
    # And counted for the owner who asked for it.
    receiver.close()
    assert (total(receiver, "ryot.requests"), total(receiver, "ryot.tokens.generated")) == (1, 1500)


def test_an_answer_that_takes_too_long_is_given_up(chat_bundle: Bundle, tmp_path: Path) -> None:
    with running(tmp_path, chat_bundle.path, "--timeout", 0.1) as server:
        body = PROMPT | {"max_tokens": 2000, "ignore_eos": True}
        status, found = post(server, "/v1/completions", body)
        assert status == 504 and "longer than 0.1 s" in json.dumps(found)
        connection = connect(server)
        connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}), JSON)
        text = connection.getresponse().read().decode()
        assert '"code": "timeout"' in text and "[DONE]" not in text
        wait_for(lambda: metric(server, "vllm:num_requests_running") == 0)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--host", "0.0.0.0"], 2, "which other machines can reach, and no API key"),
        (["--tls-key", __file__], 2, "TLS needs both a certificate and its key"),
        (["--tls-key", __file__, "--tls-certificate", __file__], 2, "are no certificate and key in PEM"),
        (["--kv-memory", "1", "--context", "2048"], 2, "memory for keys and values: got 1.0 MB"),
        (["--context", "9999"], 2, "expected at most the context of 2048 tokens"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    chat_bundle: Bundle, arguments: list[str], code: int, message: str
) -> None:
    start = [
        sys.executable,
        "-c",
        "from ryot.cli.main import run; run()",
        "serve",
        str(chat_bundle.path),
        "--port",
        "0",
    ]
    run = subprocess.run([*start, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == code, run.stderr
    assert message in run.stderr and "Traceback" not in run.stderr


def test_a_killed_server_starts_again_with_what_it_kept(plain_bundle: Bundle, tmp_path: Path) -> None:
    body = {"prompt": "a text that is worth keeping, as it is long", "max_tokens": 3, "temperature": 0}

    def ask(server: Server) -> tuple[object, int]:
        status, found = post(server, "/v1/completions", body)
        assert status == 200, found
        usage = found["usage"]
        assert isinstance(usage, dict)
        return found["choices"], usage["prompt_tokens_details"]["cached_tokens"]

    kept = ("--prefix-folder", tmp_path / "prefixes")
    with running(tmp_path, plain_bundle.path, *kept) as server:
        first, _ = ask(server)
        assert server.end() == 0
    with running(tmp_path, plain_bundle.path, *kept) as server:
        connection = connect(server)
        connection.request(
            "POST", "/v1/completions", json.dumps(body | {"stream": True, "max_tokens": 200, "ignore_eos": True}), JSON
        )
        assert connection.getresponse().read(10)
        server.process.kill()
        server.process.wait(30)
    with running(tmp_path, plain_bundle.path, *kept) as server:
        again, cached = ask(server)
        assert again == first and cached > 10
