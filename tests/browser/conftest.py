"""A built page with tiny bundles, served, and a Chromium that looks at it; made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.edge.tiny_bundle import write_bundle
from tests.models.sources.conftest import llama_cpp_source as llama_cpp_source

from .chromium import Browser, build_page, bundle_modules, missing, served


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def site(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a built page; tests may put further files beside it."""
    if reason := missing():
        pytest.skip(reason)
    return build_page(tiny_path, tmp_path_factory.mktemp("site") / "page")


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    with served(site) as url:
        yield url


@pytest.fixture(scope="session")
def browser(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for the tests of a session; what it caches of one page the next one finds."""
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


Run = Callable[..., Any]


@pytest.fixture(scope="session")
def run_module(browser: Browser, address: str, site: Path) -> Run:
    """Runs JavaScript with the page's modules, in the browser: `code` sees `modules` and the given values."""
    (site / "empty.html").write_text("<!doctype html><title>empty</title>")
    bundle_modules(Path(__file__).with_name("modules.js"), site / "modules.js")

    def run(code: str, **values: object) -> Any:
        if browser.evaluate("location.href") != f"{address}empty.html":
            browser.open(f"{address}empty.html")
        names, told = ", ".join(values), json.dumps(values)
        load = f"const modules = await import('{address}modules.js')"
        return browser.evaluate(f"(async ({{{names}}}) => {{ {load}; {code} }})({told})")

    return run
