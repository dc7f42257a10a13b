"""The built-in page in a real browser: a message is sent, the answer streams, and its figures are shown."""

from __future__ import annotations

import base64
import http.client
import json
import os
import secrets
import shutil
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ryot.edge.bundle import Bundle
from tests.serve.conftest import running
from tests.serve.test_http import wait_for

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--window-size=900,700",
)
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")]


class Tab:
    """A page of the browser, through its DevTools protocol: JSON over a WebSocket (RFC 6455), text frames alone."""

    def __init__(self, port: int, address: str):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("PUT", f"/json/new?{address}")
        path = json.loads(connection.getresponse().read())["webSocketDebuggerUrl"].partition(str(port))[2]
        self._socket = socket.create_connection(("127.0.0.1", port), 30)
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        self._socket.sendall(f"{head}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        self._file = self._socket.makefile("rb")
        assert b"101" in self._file.readline()
        while self._file.readline().strip():
            pass
        self._number = 0

    def call(self, method: str, **params: object) -> dict[str, Any]:
        self._number += 1
        data = json.dumps({"id": self._number, "method": method, "params": params}).encode()
        mask = secrets.token_bytes(4)
        size = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + struct.pack(">H", len(data))
        self._socket.sendall(b"\x81" + size + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data)))
        while True:
            _, length = self._file.read(2)
            if length == 126:
                (length,) = struct.unpack(">H", self._file.read(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", self._file.read(8))
            answer = json.loads(self._file.read(length))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def run(self, script: str) -> Any:
        """The value of a script."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")


def test_a_message_gets_its_answer_and_figures(chat_bundle: Bundle, tmp_path: Path) -> None:
    profile = tmp_path / "profile"
    with running(tmp_path, chat_bundle.path, "--speculate") as server:
        log = (tmp_path / "browser.log").open("wb")
        browser = subprocess.Popen([str(BROWSER), *FLAGS, f"--user-data-dir={profile}"], stdout=log, stderr=log)
        try:
            wait_for((profile / "DevToolsActivePort").exists, timeout_s=60)
            wait_for(lambda: (profile / "DevToolsActivePort").read_text().strip())
            port = int((profile / "DevToolsActivePort").read_text().splitlines()[0])
            tab = Tab(port, server.address)
            wait_for(lambda: tab.run("typeof models === 'undefined' ? 0 : models.length") == 1, timeout_s=60)
            assert tab.run("document.getElementById('model').value") == "tiny-7"
            for turn in range(2):
                tab.run("$('tokens').value = 24; $('temperature').value = 0; $('text').value = 'def add(a, b): is it?'")
                tab.run("$('form').requestSubmit()")
                wait_for(
                    lambda turn=turn: tab.run("document.querySelectorAll('.figures').length") == turn + 1, timeout_s=60
                )
            figures = tab.run("[...document.querySelectorAll('.figures')].map(e => e.textContent)")
            assert "first token after" in figures[0] and "tokens" in figures[0]
            assert "0 of" in figures[0]
            # The second turn begins with the first one, which was computed.
            known = int(figures[1].split(" of ")[0].split()[-1])
            assert known > 10
            assert tab.run("document.querySelectorAll('.user').length") == 2
            assert tab.run("document.querySelectorAll('.error').length") == 0
            if target := os.environ.get("RYOT_SCREENSHOT"):
                Path(target).write_bytes(base64.b64decode(tab.call("Page.captureScreenshot")["data"]))
        finally:
            browser.terminate()
            browser.wait(30)
            log.close()
