"""Beginnings that outlive the server that computed them."""

from __future__ import annotations

import stat
from pathlib import Path

from openai.types import Completion

from ryot.edge.bundle import Bundle
from tests.serve.conftest import Server, running

PROMPT = "a text that is known after it was asked once, even by the server before this one"


def ask(server: Server, key: str) -> Completion:
    return server.client(key).completions.create(
        model="tiny-1", prompt=PROMPT, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )


def cached(answer: Completion) -> int:
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0


def test_a_server_knows_what_the_one_before_it_was_asked(plain_bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "prefixes"
    arguments = (plain_bundle.path, "--prefix-folder", folder)
    with running(tmp_path, *arguments, "--api-key", "one", "--api-key", "two") as server:
        first = ask(server, "one")
        assert cached(first) == 0
        assert server.end() == 0
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"one" not in path.read_bytes()[:4000].split(b"\n")[0]
    # In another order, and the prompt is still the first key's.
    with running(tmp_path, *arguments, "--api-key", "two", "--api-key", "one") as server:
        assert cached(ask(server, "two")) == 0
        again = ask(server, "one")
        assert again.usage is not None and cached(again) == again.usage.prompt_tokens - 1
        assert again.choices[0].text == first.choices[0].text
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with running(tmp_path, *arguments, "--api-key", "one") as server:
        assert "is passed over" in server.log.read_text()
        assert cached(ask(server, "one")) == 0
