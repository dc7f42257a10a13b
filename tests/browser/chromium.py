"""A real Chromium for tests and benchmarks: `driver.mjs` leads it, this leads `driver.mjs`."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "deploy" / "browser"
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
NODE = shutil.which("node")
#: What runs the page's own modules and the driver.
NODE_MIN = 20


def missing() -> str | None:
    """What keeps a page from being built and opened here; None when all is there."""
    if CHROMIUM is None:
        return "no Chromium here (Debian package: chromium)"
    if NODE is None:
        return f"no node here (version {NODE_MIN} or later; Debian packages: nodejs, npm)"
    version = subprocess.run([NODE, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.strip().removeprefix("v").split(".")[0]) < NODE_MIN:
        return f"node is {version.strip()}, the page's build needs {NODE_MIN} or later"
    if not (PAGE / "node_modules" / "onnxruntime-web").is_dir():
        return "the page's npm packages are not installed: run 'npm ci' in deploy/browser"
    return None


def build_page(bundle: Path, folder: Path) -> Path:
    """The page of a bundle, built as its README says."""
    assert NODE
    done = subprocess.run([NODE, PAGE / "build.mjs", bundle, "-o", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def bundle_modules(entry: Path, out: Path) -> None:
    """A script with the modules of the page that it imports, as one file of a site."""
    esbuild = PAGE / "node_modules" / ".bin" / "esbuild"
    command = [esbuild, entry, "--bundle", "--format=esm", f"--outfile={out}", "--log-level=error"]
    subprocess.run(command, check=True, cwd=PAGE)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which `deploy/browser/serve.py` serves a folder."""
    spec = importlib.util.spec_from_file_location("serve", PAGE / "serve.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.build_server(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


class Browser:
    """A headless Chromium with a profile of its own; one page at a time."""

    def __init__(self, profile: Path, *, webgpu: bool = False):
        """With `webgpu` there is one, computed in software."""
        assert NODE and CHROMIUM
        command = [NODE, Path(__file__).with_name("driver.mjs"), profile, CHROMIUM, *(["webgpu"] if webgpu else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        assert self._process.stdin
        self._process.stdin.write('{"do": "close"}\n')
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def open(self, url: str, *, width: int = 1100, height: int = 760) -> None:
        self._ask("open", url=url, width=width, height=height)

    def evaluate(self, code: str) -> Any:
        return self._ask("evaluate", code=code)

    def wait(self, code: str, timeout_s: float = 120) -> None:
        self._ask("wait", code=code, timeout_s=timeout_s)

    def type(self, text: str) -> None:
        """Write into the page's field and send it."""
        self._ask("type", text=text)

    def click(self, selector: str) -> None:
        self._ask("click", selector=selector)

    def offline(self, on: bool) -> None:
        self._ask("offline", on=on)

    def screenshot(self, path: Path) -> None:
        self._ask("screenshot", path=str(path))

    def log(self) -> list[str]:
        """What pages have written to the console since the last call."""
        return list(self._ask("log"))

    def peak_rss_bytes(self) -> int:
        """The largest resident memory that any of the pages' processes has had (Linux)."""
        mine, found = {self._process.pid}, [0]
        for path in sorted(Path("/proc").glob("[0-9]*/status"), key=lambda p: int(p.parent.name)):
            try:
                fields = dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
                command = (path.parent / "cmdline").read_bytes()
            except OSError:  # it has ended
                continue
            if int(fields["PPid"]) in mine:
                mine.add(int(path.parent.name))
                if b"--type=renderer" in command:
                    found.append(int(fields["VmHWM"].split()[0]) * 1024)
        return max(found)

    def _ask(self, command: str, **values: object) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"do": command, **values}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the browser's driver has ended"
        answer = json.loads(line)
        assert "error" not in answer, f"{command} {values}: {answer['error']}\n{answer.get('log')}"
        return answer["value"]
