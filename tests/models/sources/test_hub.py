"""The hub's real client against a server of this machine that speaks the few endpoints it needs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_thisIsASecretThatNoLogMayHold"


class Hub(ThreadingHTTPServer):
    """Holds `tiny/llama`, closes `tiny/gated`, and has pickles alone in `tiny/pickle`; remembers what was asked."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.files |= {"pytorch_model.bin": b"pickle", "consolidated.safetensors": b"x", "onnx/model.onnx": b"onnx"}
        self.requests: list[tuple[str, str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path, dict(self.headers)))
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            self._answer_api(path.removeprefix("/api/models/").split("/"))
        elif path.startswith(f"/tiny/llama/resolve/{COMMIT}/"):
            self._answer_file(path.removeprefix(f"/tiny/llama/resolve/{COMMIT}/"))
        else:
            self._answer(404, {}, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def _answer_api(self, parts: list[str]) -> None:
        name, rest = "/".join(parts[:2]), parts[2:]
        if name == "tiny/gated":
            self._answer(403, {}, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif name == "tiny/broken":
            self._answer(400, {}, {})
        elif name not in ("tiny/llama", "tiny/pickle", "tiny/gguf"):
            self._answer(401, {}, {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        else:
            other = {"tiny/pickle": {"pytorch_model.bin": b"x"}, "tiny/gguf": {"model-Q4_0.gguf": b"x"}}
            files = other.get(name, self.server.files)
            if rest[:1] == ["tree"]:
                entries = [{"type": "file", "path": p, "size": len(d), "oid": oid(d)} for p, d in files.items()]
                self._answer(200, entries, {})
            else:
                siblings = [{"rfilename": path, "size": len(data), "blobId": oid(data)} for path, data in files.items()]
                self._answer(200, {"id": name, "sha": COMMIT, "siblings": siblings}, {})

    def _answer_file(self, name: str) -> None:
        data = self.server.files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{oid(data)}"', "Content-Type": "application/octet-stream"}
        self._send(200, data, headers)

    def _answer(self, status: int, body: object, headers: dict[str, str]) -> None:
        self._send(status, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def hub(family_folder: Callable[[str], Path]) -> Iterator[Hub]:
    server = Hub(family_folder("llama"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


_PROGRAM = """
import json, logging, os, sys
logging.basicConfig(level=logging.DEBUG)
from ryot.models.sources.opening import open_checkpoint
from ryot.errors import RyotError
try:
    checkpoint = open_checkpoint(sys.argv[1])
    norm = float(abs(checkpoint.load("model.norm.weight")).sum())
    print(json.dumps({"revision": checkpoint.revision, "sha256": checkpoint.sha256, "where": checkpoint.where,
                      "names": len(checkpoint.names()), "norm": norm,
                      "telemetry": os.environ["HF_HUB_DISABLE_TELEMETRY"]}))
except RyotError as error:
    print(json.dumps({"error": str(error), "hint": error.hint}))
"""


def ask(source: str, cache: Path, hub_url: str, **environment: str) -> tuple[dict[str, Any], str]:
    """What a process of its own gets for a source, since the client reads its settings once; and all it logged."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub_url, "HF_HOME": str(cache), "HF_TOKEN": TOKEN, **environment}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, source],
        capture_output=True,
        text=True,
        env=inherited | settings,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout), done.stderr


def test_a_model_is_downloaded_once_and_without_what_is_not_needed(
    hub: Hub, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from ryot.models.sources.opening import open_checkpoint

    hub.requests.clear()
    got, _ = ask("tiny/llama@main", tmp_path, hub.url)
    local = open_checkpoint(str(family_folder("llama")))
    assert got["revision"] == COMMIT
    assert got["where"] == "tiny/llama@main"
    assert got["sha256"] == local.sha256
    assert got["names"] == len(local.names())
    assert got["telemetry"] == "1"
    fetched = {path.rsplit("/", 1)[-1] for command, path, _ in hub.requests if "/resolve/" in path and command == "GET"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not fetched & {"pytorch_model.bin", "consolidated.safetensors", "model.onnx"}
    assert any(headers.get("authorization") == f"Bearer {TOKEN}" for _, _, headers in lowered(hub.requests))

    hub.requests.clear()
    again, _ = ask("tiny/llama@main", tmp_path, hub.url)
    assert again == got
    assert not [path for command, path, _ in hub.requests if "/resolve/" in path and command == "GET"]

    offline, log = ask("tiny/llama", tmp_path, hub.url, HF_HUB_OFFLINE="1")
    assert offline["sha256"] == got["sha256"]
    assert "cached commit" in log
    unreachable, log = ask("tiny/llama", tmp_path, "http://127.0.0.1:9")
    assert unreachable["sha256"] == got["sha256"]
    assert "cannot be reached" in log


def lowered(
    requests: list[tuple[str, str, dict[str, str]]],
) -> list[tuple[str, str, dict[str, str]]]:
    return [(command, path, {k.lower(): v for k, v in headers.items()}) for command, path, headers in requests]


@pytest.mark.parametrize(
    ("source", "environment", "message", "hint"),
    [
        ("tiny/none", {}, "not found on the hub", "hf auth login"),
        ("tiny/gated", {}, "is gated", "accept its terms"),
        ("tiny/llama@v9", {}, "has no revision v9", None),
        ("tiny/pickle", {}, "has no model.safetensors, and pickles are refused", "safetensors"),
        ("tiny/gguf", {}, "holds only GGUF files", "model-Q4_0.gguf"),
        ("tiny/broken", {}, "answered with status 400", "try again"),
        ("tiny/llama", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
        ("tiny/llama", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached", "check the network"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line(
    source: str, environment: dict[str, str], message: str, hint: str | None, hub: Hub, tmp_path: Path
) -> None:
    got, _ = ask(source, tmp_path, hub.url, **environment)
    assert message in got["error"]
    assert "\n" not in got["error"] and "http" not in got["error"]
    assert hint is None or hint in got["hint"]
