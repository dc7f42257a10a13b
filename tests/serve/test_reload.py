"""A bundle that is replaced while it is served: no request is lost, and a broken one changes nothing."""

from __future__ import annotations

import asyncio
import shutil
import signal
import threading
from pathlib import Path

import pytest

from ryot.edge.bundle import Bundle
from ryot.edge.tokenizer import Tokenizer, load_tokenizer
from ryot.errors import BundleError
from ryot.serve.app import Service
from ryot.serve.model import ModelOptions, ServedModel
from ryot.serve.server import _Reloader
from tests.edge.tiny_bundle import write_bundle, write_manifest
from tests.serve.conftest import TEMPLATE, Server, running
from tests.serve.test_http import post, wait_for

#: Sends the process a SIGHUP when it begins to load what a server needs.
HANGUP_AT_START = """
import os, signal, sys

class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == "uvicorn":
            os.kill(os.getpid(), signal.SIGHUP)

sys.meta_path.insert(0, Sender())
"""
BODY = {"prompt": "a", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


def answer(server: Server) -> str:
    status, found = post(server, "/v1/completions", BODY)
    assert status == 200, found
    choices = found["choices"]
    assert isinstance(choices, list)
    return str(choices[0]["text"])


def replace(path: Path, fresh: Path) -> None:
    """Put another bundle in the folder, as a push to a device does."""
    old = path.with_name("old")
    path.rename(old)
    fresh.rename(path)
    shutil.rmtree(old)


@pytest.mark.parametrize("how", ["signal", "request"])
def test_a_bundle_is_swapped_without_a_lost_request(tmp_path: Path, how: str) -> None:
    served = write_bundle(tmp_path / "served", context=2048, seed=1)
    fresh = write_bundle(tmp_path / "fresh", context=2048, seed=2)
    with running(tmp_path, served) as server:
        before = answer(server)
        # One that lasts beyond the swap.
        found: list[tuple[int, dict[str, object]]] = []
        long = threading.Thread(
            target=lambda: found.append(post(server, "/v1/completions", BODY | {"max_tokens": 1500, "logprobs": 20}))
        )
        long.start()
        stop = threading.Event()
        statuses: list[int] = []

        def ask_on() -> None:
            while not stop.is_set():
                statuses.append(post(server, "/v1/completions", BODY)[0])

        asking = threading.Thread(target=ask_on)
        asking.start()
        replace(served, fresh)
        if how == "signal":
            server.process.send_signal(signal.SIGHUP)
        else:
            status, told = post(server, "/admin/reload", {})
            assert status == 200 and len(told["reloaded"]) == 1  # type: ignore[arg-type]
        wait_for(lambda: answer(server) != before)
        stop.set()
        asking.join()
        long.join()
        assert set(statuses) == {200}
        status, whole = found[0]
        assert status == 200 and whole["usage"]["completion_tokens"] == 1500  # type: ignore[index]
        assert server.end() == 0


def test_a_broken_bundle_changes_nothing(tmp_path: Path, plain_bundle: Bundle) -> None:
    served = tmp_path / "served"
    shutil.copytree(plain_bundle.path, served)
    with running(tmp_path, served, "--api-key", "secret") as server:
        key = {"Authorization": "Bearer secret"}
        (served / "ryot_manifest.json").write_text("{}")
        assert post(server, "/admin/reload", {})[0] == 401
        status, told = post(server, "/admin/reload", {}, key)
        assert status == 409 and "what is served stays" in str(told)
        assert post(server, "/v1/completions", BODY, key)[0] == 200


def test_what_is_served_needs_no_file_of_its_bundle_once_that_is_replaced(tmp_path: Path) -> None:
    served = write_bundle(tmp_path / "served", context=2048, seed=1)
    (served / "chat_template.jinja").write_text(TEMPLATE)
    write_manifest(served)
    with running(tmp_path, served) as server:
        # Between a swap on disk and the reload the folder holds another bundle, or for a moment nothing.
        served.rename(tmp_path / "old")
        tool = {"type": "function", "function": {"name": "clock"}}
        asked = {"messages": [{"role": "user", "content": "a"}], "tools": [tool], "max_tokens": 2}
        status, told = post(server, "/v1/chat/completions", asked)
        assert status == 200, told
        form = {"response_format": {"type": "regex", "regex": "a"}, "prompt": "a"}
        status, told = post(server, "/v1/completions", form)
        assert status == 200, told


def test_a_reload_asked_for_before_anything_is_loaded_ends_nothing(tmp_path: Path, plain_bundle: Bundle) -> None:
    with running(tmp_path, plain_bundle.path, first=HANGUP_AT_START) as server:
        assert server.end() == 0


def test_a_model_is_never_made_of_two_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = write_bundle(tmp_path / "served", context=256, seed=1)
    fresh = write_bundle(tmp_path / "fresh", context=256, seed=2)

    def load_after_swap(bundle: Bundle) -> Tokenizer:
        replace(served, fresh)
        return load_tokenizer(bundle)

    monkeypatch.setattr("ryot.serve.model.load_tokenizer", load_after_swap)
    with pytest.raises(BundleError, match="was replaced by another bundle"):
        ServedModel(served, ModelOptions())


def test_a_reload_asked_for_while_the_models_load_leaves_one_of_each(plain_bundle: Bundle) -> None:
    async def load_and_reload() -> int:
        service = Service()
        reloader = _Reloader(service, [plain_bundle.path], ModelOptions())
        await asyncio.gather(reloader.load(), reloader.reload())
        await asyncio.gather(*reloader._tasks)
        running = sum(thread.name == "ryot-engine" for thread in threading.enumerate())
        for model in service.models.values():
            model.close()
        return running

    assert asyncio.run(load_and_reload()) == 1
