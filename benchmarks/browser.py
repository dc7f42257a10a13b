"""How fast is the page of `deploy/browser` beside transformers.js, on the same weights in the same browser?

    python benchmarks/browser.py BUNDLE... [--rounds N] [--turns N] [--tokens N] [--prompt N] [--threads N]
        [--stored] [--peer DIR]

Each bundle is loaded by the page's own modules and, as its standard graph with the same data file, by transformers.js;
both in a worker of one thread unless told otherwise, with the same prompts of ids. Every visit is a fresh page of one
Chromium whose caches are warm; visits of all cases take turns, in an order drawn anew each round. `start` is from
navigation to the first token of a short text. Ratios are paired by round, with their 98 % interval.

Then the page itself is opened, each time in a Chromium that was started for it over the profile that the visits before
have filled: from navigation to the first token, where that time goes, and whether the golden tokens are equal.

About 5 minutes with two bundles and the defaults, nothing else running.

transformers.js and its onnxruntime-web come from npm, by name, into --peer once.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import onnx
from record import RESULTS, describe_setting, write_result

from ryot.edge.bundle import Bundle, load_bundle
from ryot.report.stats import ratio_interval

sys.path.insert(0, str(Path(__file__).parents[1]))  # the browser's leader is the tests'
from tests.browser.chromium import CHROMIUM, Browser, build_page, bundle_modules, missing, served

PEER = "@huggingface/transformers@4.3.1"
PEER_FILES = ("ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
ENGINES = ("ryot", "transformers.js")
#: The page's engine on quantized matrices as they are stored, which `expand.js` otherwise unpacks.
STORED = "ryot-stored"
SOURCES = Path(__file__).with_name("browser")
MB = 1e6


def main() -> None:
    options = _parse()
    if reason := missing():
        sys.exit(f"Error: {reason}")
    peer = _fetch_peer(options.peer)
    with tempfile.TemporaryDirectory() as scratch:
        site = build_page(options.bundles[0], Path(scratch) / "site")
        names = [_add_case(site, load_bundle(path), options) for path in options.bundles]
        for source in ("bench.html", "bench_page.js"):
            shutil.copy(SOURCES / source, site)
        bundle_modules(SOURCES / "bench_worker.js", site / "bench_worker.js")
        shutil.copytree(peer, site / "peer")
        visits = _measure(site, names, Path(scratch) / "profile", options)
        starts = _measure_starts(site, names, Path(scratch) / "page", options)
    values = {**describe_setting(), "browser": _browser_version(), "peer": PEER, "visits": visits, "starts": starts}
    values["settings"] = {k: v for k, v in vars(options).items() if isinstance(v, int)}
    print(write_result("browser", values, render(values), options.output).read_text())


def _measure(site: Path, names: list[str], profile: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    engines = (*ENGINES, STORED) if options.stored else ENGINES
    cases = [(name, engine) for name in names for engine in engines]
    visits = []
    with served(site) as url, Browser(profile) as browser:
        for number in range(-1, options.rounds):  # the first one fills the caches
            random.Random(number).shuffle(cases)
            for name, engine in cases:
                query = f"engine={engine}&model={name}&threads={options.threads}&count={options.tokens}"
                browser.open(f"{url}bench.html?{query}&turns={options.turns if number >= 0 else 1}")
                browser.wait("Boolean(globalThis.result)", timeout_s=3600)
                found = browser.evaluate("globalThis.result")
                if "error" in found:
                    sys.exit(f"Error: {engine} on {name}: {found['error']}")
                visit = {
                    "round": number,
                    "bundle": name,
                    "engine": engine,
                    "peak_bytes": browser.peak_rss_bytes(),
                    **found,
                }
                visits.append(visit)
                sys.stderr.write(
                    f"{number} {name} {engine}: {found['startMs']:.0f} ms, {found['tokenMs'][0]:.2f} ms per token\n"
                )
    return [visit for visit in visits if visit["round"] >= 0]


def _measure_starts(site: Path, names: list[str], folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts of the page itself, each in a new Chromium over a profile that knows the page; the first two fill it."""
    starts = []
    with served(site) as url:
        for number in range(-2, options.rounds):
            for name in names:
                with Browser(folder / name) as browser:
                    browser.open(f"{url}?bundle={name}/&threads={options.threads}&prompt=def ")
                    browser.wait("performance.getEntriesByName('ryot-first-token').length > 0")
                    browser.wait("navigator.serviceWorker.ready.then(() => true)")
                    found = browser.evaluate(_READ_START)
                    browser.click("#settings")
                    browser.click("#verify")
                    browser.wait("!['', 'Comparing…'].includes(document.querySelector('#verdict').textContent)")
                    found["verdict"] = browser.evaluate("document.querySelector('#verdict').textContent")
                if number >= 0:
                    starts.append({"round": number, "bundle": name, **found})
                sys.stderr.write(f"{number} page {name}: {found['first_ms']:.0f} ms, {found['verdict']}\n")
    return starts


#: What the page and its worker marked on the way to the first token.
_READ_START = """(() => {
  const mark = name => performance.getEntriesByName(name)[0];
  const { readMs, runtimeMs, openMs, fetchedBytes } = mark('ryot-ready').detail;
  return {
    compiled_ms: mark('ryot-compiled').startTime, ready_ms: mark('ryot-ready').startTime,
    first_ms: mark('ryot-first-token').startTime, read_ms: readMs, text_ms: runtimeMs, open_ms: openMs,
    fetched_bytes: fetchedBytes,
  };
})()"""


def _add_case(site: Path, bundle: Bundle, options: argparse.Namespace) -> str:
    """Put a bundle into the site twice: as it is, and laid out as transformers.js wants it. Returns its name there."""
    name = f"{bundle.name}-{bundle.precision}".replace("+", "-")
    shutil.copytree(bundle.path, site / name)
    prompts = [prompt[: options.prompt] for prompt in bundle.prompts]
    (site / name / "prompts.json").write_text(json.dumps(prompts))
    folder = site / "models" / name
    (folder / "onnx").mkdir(parents=True)
    for file in ("config.json", "generation_config.json"):
        values = json.loads((bundle.path / file).read_text())
        # Both engines write as many tokens as they are told.
        (folder / file).write_text(json.dumps({k: v for k, v in values.items() if k != "eos_token_id"}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundle.path / file, folder)
    graph = onnx.load(bundle.path / bundle.graphs["standard"], load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "model.onnx_data"
    for value in graph.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "batch":  # the name by which transformers.js knows the dimension
                dim.dim_param = "batch_size"
    onnx.save(graph, folder / "onnx" / "model.onnx")
    shutil.copy(bundle.path / "model.onnx.data", folder / "onnx" / "model.onnx_data")
    return name


def _fetch_peer(folder: Path) -> Path:
    """transformers.js's own file for browsers and the onnxruntime-web that it names."""
    if (folder / PEER_FILES[-1]).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        package = _npm_pack(PEER, Path(scratch) / "peer")
        shutil.copy(package / "dist" / "transformers.min.js", folder)
        version = json.loads((package / "package.json").read_text())["dependencies"]["onnxruntime-web"]
        runtime = _npm_pack(f"onnxruntime-web@{version}", Path(scratch) / "runtime")
        for name in PEER_FILES:
            shutil.copy(runtime / "dist" / name, folder)
    return folder


def _npm_pack(package: str, folder: Path) -> Path:
    folder.mkdir()
    subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def _browser_version() -> str:
    assert CHROMIUM
    return subprocess.run([CHROMIUM, "--version"], capture_output=True, text=True, check=False).stdout.strip()


def render(values: dict[str, Any]) -> str:
    """The result for people."""
    settings = values["settings"]
    lines = [
        f"# The page beside transformers.js, {values['environment']['cpu']['model']}, commit {values['commit']}",
        "",
        "| bundle | engine | start, ms | TTFT, ms | tok/s | peak, MB | tok/s ratio | TTFT ratio | same tokens |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    by_case: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for visit in values["visits"]:
        by_case.setdefault((visit["bundle"], visit["engine"]), []).append(visit)
    for (name, engine), visits in sorted(by_case.items()):
        peers = by_case[name, "transformers.js"]
        start, peak = (statistics.median(v[key] for v in visits) for key in ("startMs", "peak_bytes"))
        ttft, token = (statistics.median(x for v in visits for x in v[key]) for key in ("ttftMs", "tokenMs"))
        row = [name, engine, f"{start:.0f}", f"{ttft:.1f}", f"{1000 / token:.1f}", f"{peak / MB:.0f}"]
        if engine != "transformers.js":
            row += [_ratio(peers, visits, "tokenMs"), _ratio(visits, peers, "ttftMs"), _agreement(visits[0], peers[0])]
        else:
            row += ["1", "1", ""]
        lines.append("| " + " | ".join(row) + " |")
    lines += [
        "",
        "The page itself, from navigation in a Chromium just started, its own caches warm, to the first token:",
        "",
        "| bundle | first token, ms | code compiled at | files read in | tokenizer in | opened in | ready | golden |",
        "|:--|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for name in sorted({start["bundle"] for start in values["starts"]}):
        starts = [start for start in values["starts"] if start["bundle"] == name]
        middles = [statistics.median(s[key] for s in starts) for key in _START_KEYS]
        spread = (
            f"{middles[0]:.0f} ({min(s['first_ms'] for s in starts):.0f} to {max(s['first_ms'] for s in starts):.0f})"
        )
        cells = [name, spread, *(f"{value:.0f}" for value in middles[1:]), "; ".join({s["verdict"] for s in starts})]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"`{values['command']}`, {values['browser']}, {values['peer']}; prompts of {settings['prompt']} tokens, "
        f"{settings['tokens']} tokens each, {settings['turns']} prompts a visit, {settings['rounds']} rounds, "
        f"{settings['threads']} thread(s), caches warm. Medians; ratios paired by round with their 98 % interval. "
        "`peak` is the largest resident memory of a process of the page, the browser's own parts in it included.",
    ]
    return "\n".join(lines)


_START_KEYS = ("first_ms", "compiled_ms", "read_ms", "text_ms", "open_ms", "ready_ms")


def _ratio(a: list[dict[str, Any]], b: list[dict[str, Any]], key: str) -> str:
    found = ratio_interval([v[key] for v in a], [v[key] for v in b])
    if found is None:
        return "one round"
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _agreement(a: dict[str, Any], b: dict[str, Any]) -> str:
    """How many tokens are equal before the first that differs, of all."""
    equal = total = 0
    for ours, theirs in zip(a["tokens"], b["tokens"]):
        total += len(ours)
        equal += next((i for i, (x, y) in enumerate(zip(ours, theirs)) if x != y), len(ours))
    return f"{equal} of {total}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--turns", type=int, default=5, help="prompts a visit")
    parser.add_argument("--tokens", type=int, default=48, help="tokens per prompt")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stored", action="store_true", help="also without unpacking quantized matrices")
    parser.add_argument("--peer", type=Path, default=Path("~/.cache/ryot/transformers-js").expanduser())
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
