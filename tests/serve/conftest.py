"""A real server in a process of its own, over two tiny bundles: one with a chat template, one without."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from openai import OpenAI

from ryot.edge.bundle import Bundle, load_bundle
from tests.edge.tiny_bundle import write_bundle, write_manifest

CONTEXT = 2048
TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }};{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Server(NamedTuple):
    """A server that is ready, and what it runs."""

    address: str
    process: subprocess.Popen[str]
    log: Path
    """Its stderr."""

    def client(self, api_key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.address}/v1", api_key=api_key, max_retries=0, timeout=30)

    def end(self) -> int:
        """Ask it to end; its exit code."""
        self.process.terminate()
        return self.process.wait(30)


@contextmanager
def running(folder: Path, *arguments: object, first: str = "") -> Iterator[Server]:
    """`ryot-deploy serve` on a free port, until the block ends; `first` is run before it in its process."""
    log = folder / "server.log"
    code = f"{first}\nfrom ryot.cli.main import run; run()"
    command = [sys.executable, "-c", code, "serve", *map(str, arguments), "--port", "0"]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stderr=stderr, text=True)
    try:
        yield Server(wait_until_ready(process, log), process, log)
    finally:
        process.kill()
        process.wait(30)


def wait_until_ready(process: subprocess.Popen[str], log: Path) -> str:
    """The address that the server announces."""
    while process.poll() is None:
        if found := re.search(r"ready: .* at (http\S+)/v1", log.read_text()):
            return found[1]
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError(log.read_text())


@pytest.fixture(scope="session")
def chat_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = write_bundle(tmp_path_factory.mktemp("served") / "chat", context=CONTEXT, seed=7)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    write_manifest(path)
    return load_bundle(path)


@pytest.fixture(scope="session")
def plain_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(write_bundle(tmp_path_factory.mktemp("served") / "plain", context=256, seed=1))


@pytest.fixture(scope="session")
def server(chat_bundle: Bundle, plain_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Both bundles; `tiny-7` chats, `tiny-1` does not."""
    with running(tmp_path_factory.mktemp("server"), chat_bundle.path, plain_bundle.path, "--rows", 8) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Server) -> OpenAI:
    return server.client()


def connect(server: Server) -> http.client.HTTPConnection:
    address = urlsplit(server.address)
    assert address.hostname is not None
    return http.client.HTTPConnection(address.hostname, address.port, timeout=30)


def get(server: Server, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    connection = connect(server)
    connection.request("GET", path, headers=headers or {})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def metric(server: Server, name: str) -> float:
    """The value of a line of `/metrics`, of the first model where the name has no labels."""
    lines = get(server, "/metrics")[1].splitlines()
    return float(next(line for line in lines if line.startswith(name)).rpartition(" ")[2])
