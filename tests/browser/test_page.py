"""The page in a real Chromium: the tokens that Python gives, files that differ refused, work without a server."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from ryot.edge.bundle import load_bundle
from ryot.edge.chat import Chat, load_chat_template
from ryot.edge.generate import generate
from ryot.edge.session import OnnxruntimeEngine
from ryot.edge.tokenizer import Tokenizer
from tests.edge.tiny_bundle import golden_prompt, write_bundle, write_manifest

from .chromium import NODE, PAGE, Browser, missing
from .test_modules import CHATML

READY = "Boolean(window.ryot?.model || document.querySelector('.error'))"
DONE = "Boolean(ryot.last || document.querySelector('.error'))"

#: Bundles by what their graphs do otherwise.
KINDS = {
    "one graph": {},
    "positions, two graphs": {"position_ids": True, "two_sessions": True, "seed": 3},
    "int8 cache": {"kv_dtype": "int8", "seed": 4},
    "int8 cache, rounded behind the prompt": {"kv_dtype": "int8", "two_sessions": True, "seed": 5},
    "a long context": {"context": 700, "seed": 6},
}
Show = Callable[..., str]


@pytest.fixture
def show(browser: Browser, address: str) -> Show:
    """Opens the page and waits until it is ready; returns what it says went wrong, if anything."""

    def open_page(**options: object) -> str:
        browser.open(address + "?" + "&".join(f"{name}={value}" for name, value in options.items()))
        browser.wait(READY)
        return str(browser.evaluate("document.querySelector('.error')?.textContent ?? ''"))

    return open_page


def verdict(browser: Browser) -> str:
    browser.click("#settings")
    browser.click("#verify")
    browser.wait("!['', 'Comparing…'].includes(document.querySelector('#verdict').textContent)")
    return str(browser.evaluate("document.querySelector('#verdict').textContent"))


@pytest.mark.parametrize("kind", KINDS)
def test_golden_tokens_are_equal(kind: str, browser: Browser, site: Path, show: Show) -> None:
    folder = site / f"bundle-{list(KINDS).index(kind)}"
    write_bundle(folder, **KINDS[kind])
    if "context" in KINDS[kind]:
        # Goes through the graph in two pieces and makes the buffers grow twice.
        ids = np.random.default_rng(0).integers(1, 300, 400)
        write_manifest(folder, golden=[golden_prompt(load_bundle(folder), ids, 150)])
    expected = sum(
        next((i for i, margin in enumerate(g.margins) if margin < 1e-3), len(g.margins))
        for g in load_bundle(folder).golden
    )
    assert show(bundle=f"{folder.name}/") == ""
    assert f"{expected} golden tokens equal" in verdict(browser)
    # From the memory that the build has left of a started runtime.
    [image] = (site / "vendor").glob("started-*.bin")
    used = browser.evaluate("performance.getEntriesByName('ryot-ready')[0].detail.imageBytes")
    assert used == image.stat().st_size < 8_000_000


def test_threads_give_the_same_tokens(browser: Browser, show: Show) -> None:
    assert show(threads=2) == ""
    assert browser.evaluate("crossOriginIsolated") and browser.evaluate("ryot.model.threads") == 2
    assert "golden tokens equal" in verdict(browser)


@pytest.mark.slow
def test_webgpu_gives_the_same_tokens(site: Path, address: str, tmp_path: Path) -> None:
    write_bundle(site / "opt", position_ids=True, seed=3)

    def answers(browser: Browser, kind: str, device: str, count: int) -> list[list[int]]:
        browser.open(f"{address}?bundle={kind}/&device={device}")
        browser.wait(READY)
        browser.evaluate("document.querySelector('#tokens').value = 4")
        found = []
        for _ in range(count):
            browser.type("def add")
            browser.wait(DONE)
            found.append(browser.evaluate("ryot.last.tokens"))
        return found

    with Browser(tmp_path, webgpu=True) as browser:
        for kind in ("bundle", "opt"):
            tokens = answers(browser, kind, "webgpu", 2)
            if "offers no WebGPU" in (browser.evaluate("ryot.model.gpuProblem") or ""):
                pytest.skip("this Chromium has no WebGPU, not even in software")
            assert browser.evaluate("ryot.model.gpuProblem ?? ryot.model.device") == "WebGPU"
            assert "golden tokens equal" in verdict(browser)
            assert tokens == answers(browser, kind, "cpu", 1) * 2
            assert browser.evaluate("ryot.model.device") == "WebAssembly"


def test_other_tokens_than_the_golden_ones_are_reported(browser: Browser, site: Path, show: Show) -> None:
    folder = write_bundle(site / "wrong")
    golden = json.loads((folder / "ryot_manifest.json").read_text())["golden"]
    golden[1]["tokens"][2] += 1
    write_manifest(folder, golden=golden)
    assert show(bundle="wrong/") == ""
    assert "golden prompt 2: token 3 is" in verdict(browser)


def test_text_is_pythons(browser: Browser, tiny_path: Path, show: Show) -> None:
    engine, tokenizer = OnnxruntimeEngine(load_bundle(tiny_path)), Tokenizer(tiny_path / "tokenizer.json")
    generation = generate(engine, tokenizer, "def add(a, b):", max_new_tokens=30)
    text = "".join(generation)
    show()
    browser.evaluate("document.querySelector('#tokens').value = 30")
    browser.type("def add(a, b):")
    browser.wait(DONE)
    assert browser.evaluate("ryot.last.tokens") == generation.completion.tokens
    assert browser.evaluate("document.querySelector('.completion').textContent") == "def add(a, b):" + text
    figures = browser.evaluate("document.querySelector('.measured').textContent")
    assert "first after" in figures and "tok/s" in figures
    assert "MB" in browser.evaluate("document.querySelector('#figures').textContent")
    # A prompt that begins like what is held is computed from where it differs, to the same tokens.
    browser.type("def add(a, b):")
    browser.wait(DONE)
    assert browser.evaluate("ryot.last.tokens") == generation.completion.tokens
    assert browser.evaluate("ryot.last.sharedTokens") == browser.evaluate("ryot.last.promptTokens") - 1


def test_a_chat_is_pythons(browser: Browser, site: Path, show: Show) -> None:
    folder = write_bundle(site / "chat", context=256, seed=2)
    (folder / "chat_template.jinja").write_text(CHATML)
    write_manifest(folder)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    chat = Chat(OnnxruntimeEngine(load_bundle(folder)), tokenizer, load_chat_template(folder, {}))
    assert show(bundle="chat/") == ""
    browser.evaluate("document.querySelector('#tokens').value = 9")
    before = 0
    for turn, message in enumerate(("Hello", "Again", "A longer message, so that the first one is forgotten " * 2)):
        answer = chat.answer(message, max_new_tokens=9)
        list(answer)
        browser.type(message)
        browser.wait(DONE)
        assert browser.evaluate("document.querySelector('.error')?.textContent ?? ''") == ""
        assert browser.evaluate("ryot.last.tokens") == answer.completion.tokens
        assert browser.evaluate("ryot.last.promptTokens") == len(answer.completion.prompt_ids)
        if turn == 1:  # all of the turn before is kept
            assert browser.evaluate("ryot.last.sharedTokens") >= before
        before = len(answer.completion.prompt_ids)
    assert chat.num_forgotten and browser.evaluate("ryot.last.forgotten") == chat.num_forgotten


def test_generation_can_be_stopped(browser: Browser, site: Path, show: Show) -> None:
    write_bundle(site / "endless", context=16_384)
    (manifest := site / "endless" / "ryot_manifest.json").write_text(
        json.dumps(json.loads(manifest.read_text()) | {"eos_token_ids": []})
    )
    show(bundle="endless/")
    browser.evaluate("document.querySelector('#tokens').value = 16000")
    browser.type("x")
    browser.wait("performance.getEntriesByName('ryot-first-token').length > 0")
    browser.click("#send")
    browser.wait(DONE)
    assert browser.evaluate("ryot.last.finishReason") == "stopped"
    assert browser.evaluate("document.querySelector('#send').textContent") == "Send"


@pytest.mark.parametrize("name", ["fast.onnx", "model.onnx.data", "tokenizer.json", "chat_template.jinja"])
def test_a_flipped_bit_is_refused(name: str, browser: Browser, site: Path, tiny_path: Path, show: Show) -> None:
    folder = Path(shutil.copytree(tiny_path, site / f"flipped-{name}"))
    (folder / "chat_template.jinja").write_text(CHATML)
    write_manifest(folder)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    message = show(bundle=f"{folder.name}/")
    assert f"sha256 of {name} is" in message
    assert browser.evaluate("document.querySelector('#send').disabled")
    # Nothing of it is kept for a later visit.
    kept = "caches.open('ryot-bundle').then(c => c.keys()).then(keys => keys.map(request => request.url))"
    assert not [url for url in browser.evaluate(kept) if f"{folder.name}/{name}" in url]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"schema": 2}, "schema 2 is newer than 1"),
        (lambda m: m | {"onnxruntime_min": "99.1"}, "is too old for this bundle, which needs 99.1"),
        (lambda m: m | {"files": m["files"] | {"../x.data": {"sha256": "", "bytes": 1}}}, "not a path inside"),
        (lambda m: {k: v for k, v in m.items() if k != "schema"}, "no schema number"),
        (lambda m: m | {"graphs": m["graphs"] | {"decode": "gone.onnx"}}, "gone.onnx is not among files"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused(
    change: Callable[[dict[str, object]], dict[str, object]], message: str, site: Path, tiny_path: Path, show: Show
) -> None:
    folder = Path(shutil.copytree(tiny_path, site / "manifest", dirs_exist_ok=True))
    path = folder / "ryot_manifest.json"
    path.write_text(json.dumps(change(json.loads((tiny_path / "ryot_manifest.json").read_text()))))
    assert message in show(bundle="manifest/")


def test_cut_long_and_missing_files_are_refused(site: Path, tiny_path: Path, show: Show) -> None:
    folder = Path(shutil.copytree(tiny_path, site / "lengths"))
    data = (folder / "model.onnx.data").read_bytes()
    for content, message in (
        (data[:-1], "cut short"),
        (data + b"x", "more than the"),
        (None, "the server answered 404"),
    ):
        (folder / "model.onnx.data").unlink()
        if content is not None:
            (folder / "model.onnx.data").write_bytes(content)
        assert message in show(bundle="lengths/")


def test_a_damaged_cache_is_fetched_anew(browser: Browser, site: Path, show: Show) -> None:
    write_bundle(site / "cached", seed=7)
    assert show(bundle="cached/") == ""
    assert show(bundle="cached/") == ""
    assert browser.evaluate("ryot.model.fetchedBytes") == 0
    browser.evaluate(
        """(async () => {
            const cache = await caches.open('ryot-bundle');
            const request = (await cache.keys()).find(({url}) => url.includes('cached/model.onnx.data'));
            const bytes = new Uint8Array(await (await cache.match(request)).arrayBuffer());
            bytes[1000] ^= 4;
            await cache.put(request, new Response(bytes));
        })()"""
    )
    assert show(bundle="cached/") == ""
    assert browser.evaluate("ryot.model.fetchedBytes") == (site / "cached" / "model.onnx.data").stat().st_size
    assert "golden tokens equal" in verdict(browser)


def test_without_a_server_the_page_works(browser: Browser, site: Path) -> None:
    """A plain server sets no headers: the service worker isolates the page, from the second visit on."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    browser.open(url)
    browser.wait(READY)
    assert not browser.evaluate("crossOriginIsolated")
    browser.wait("navigator.serviceWorker.ready.then(({active}) => active.state === 'activated')")
    server.shutdown()
    server.server_close()
    browser.open(f"{url}?prompt=def")
    browser.wait(READY)
    browser.wait(DONE)
    assert browser.evaluate("crossOriginIsolated")
    assert browser.evaluate("ryot.last.tokens.length") > 0
    assert "golden tokens equal" in verdict(browser)


def test_it_fits_a_phone(browser: Browser, address: str) -> None:
    browser.log()
    browser.open(f"{address}?prompt=a_word_that_is_longer_than_the_screen_{'x' * 60}", width=320, height=568)
    browser.wait(READY)
    browser.wait(DONE)
    browser.click("#settings")
    assert browser.evaluate("document.documentElement.scrollWidth") == 320
    bottom = "document.querySelector('#send').getBoundingClientRect().bottom"
    assert browser.evaluate(bottom) <= 568
    assert browser.log() == []


def test_the_pages_own_files_name_no_other_host(site: Path) -> None:
    ours = [site / name for name in ("index.html", "page.js", "worker.js", "sw.js", "style.css", "app.webmanifest")]
    for path in ours:
        assert "http://" not in path.read_text() and "https://" not in path.read_text(), path


@pytest.mark.slow
def test_types_hold() -> None:
    """TypeScript's own checker over the JSDoc types."""
    if reason := missing():
        pytest.skip(reason)
    done = subprocess.run(
        [PAGE / "node_modules/.bin/tsc", "-p", "jsconfig.json"], cwd=PAGE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_a_bundle_that_differs_is_not_built(tiny_path: Path, tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    folder = Path(shutil.copytree(tiny_path, tmp_path / "bundle"))
    (folder / "tokenizer.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for arguments, message in (
        ([folder, "-o", tmp_path / "new"], "tokenizer.json: its sha256 is"),
        ([tmp_path, "-o", tmp_path / "new"], "not a bundle"),
        ([tiny_path, "-o", tmp_path / "mine"], "holds something else than a page"),
        ([], "expected one bundle"),
    ):
        done = subprocess.run([str(NODE), PAGE / "build.mjs", *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("Error: ") and message in done.stderr
    assert (tmp_path / "mine" / "thesis.txt").exists()
