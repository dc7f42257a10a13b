"""report.html in a real browser: no console error, no request beyond the page, nothing blank, no sideways page."""

from __future__ import annotations

import dataclasses
import html.parser
import http.server
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ryot.report.html import POLICY, render_html
from ryot.report.rows import AblationRow, Report, VariantRow
from ryot.report.targets import load_target

from .synthetic import make_artifacts, make_report

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian package: chromium)")
LIGHT, DARK = "1", "0"


def full_report() -> Report:
    """A report with every plot: two targets and an ablation."""
    report = make_report(targets=[load_target("phase1"), load_target("pi-zero-2w")])
    bars = [("baseline", 129.0, 3.93), ("baseline+tied", 110.0, 3.96), ("baseline+rates", 60.0, 3.90)]
    return dataclasses.replace(
        report,
        ablation=tuple(
            AblationRow(name=n, train_wall_s=(s, s + 2), val_loss=(loss, loss + 0.02)) for n, s, loss in bars
        ),
    )


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(full_report())


class Site:
    """A real web server for a folder that remembers what it was asked for."""

    def __init__(self, folder: Path):
        self.folder, self.requests = folder, []
        site = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args: object):
                super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

            def log_request(self, *_: object) -> None:
                site.requests.append(self.path)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/{name}"


@pytest.fixture
def site(tmp_path: Path, page: str) -> Iterator[Site]:
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    site = Site(tmp_path)
    yield site
    site.server.shutdown()
    site.server.server_close()


def browse(url: str, folder: Path, *options: str) -> tuple[str, list[str]]:
    """What a fresh browser printed for `url`, and the lines its pages wrote to the console."""
    profile = folder / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
         f"--user-data-dir={profile}", "--enable-logging=stderr", "--hide-scrollbars", *options, url],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def screenshot(url: str, folder: Path, scheme: str, size: str = "1200,2600") -> tuple[np.ndarray, list[str]]:
    """The page as pixels [H, W, 3]."""
    png = folder / "page.png"
    _, console = browse(
        url, folder, f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={size}", f"--screenshot={png}"
    )
    return np.asarray(Image.open(png).convert("RGB")).astype(int), console


def has_colour(pixels: np.ndarray, colour: str) -> bool:
    wanted = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    return bool((np.abs(pixels - wanted).max(axis=2) <= 3).sum() > 50)


@needs_chromium
@pytest.mark.parametrize(
    ("scheme", "paper", "blue"), [(LIGHT, "#ffffff", "#0072b2"), (DARK, "#14171c", "#56b4e9")], ids=["light", "dark"]
)
def test_the_page_is_drawn_in_its_own_colours_without_a_console_message(site, tmp_path, scheme, paper, blue):
    pixels, console = screenshot(site.url("report.html"), tmp_path, scheme)
    assert console == []
    assert has_colour(pixels, paper) and has_colour(pixels, blue)
    background = np.array([int(paper[k : k + 2], 16) for k in (1, 3, 5)])
    drawn = np.abs(pixels - background).max(axis=2) > 40
    # Text and plots reach down the whole page: no tenth of it is blank.
    assert all(band.mean() > 0.005 for band in np.array_split(drawn[:2400], 10))


@needs_chromium
def test_nothing_but_the_page_itself_is_asked_for(site, tmp_path):
    text, console = browse(site.url("report.html"), tmp_path, "--dump-dom")
    assert site.requests == ["/report.html"]
    assert console == []
    assert "Size, speed, quality" in text and "</html>" in text


@needs_chromium
def test_the_pages_policy_stops_what_would_ask_for_more(site, tmp_path, page):
    # The check itself is checked: with a picture and a script put in, both are refused and the console says so.
    port = site.server.server_port
    more = f'<img src="http://127.0.0.1:{port}/spy.png"><script>fetch("/spy")</script></body>'
    (tmp_path / "spied.html").write_text(page.replace("</body>", more), encoding="utf-8")
    _, console = browse(site.url("spied.html"), tmp_path, "--dump-dom")
    assert site.requests == ["/spied.html"]
    assert sum("Content Security Policy" in line for line in console) == 2


@needs_chromium
def test_a_phone_never_scrolls_the_page_sideways(site, tmp_path):
    frame = (
        '<!doctype html><iframe id="f" src="report.html" style="width:360px;height:800px;border:0"></iframe><script>'
        'f.onload = () => { const d = f.contentDocument.documentElement; document.title = "width " + d.scrollWidth; }'
        "</script>"
    )
    (tmp_path / "phone.html").write_text(frame)
    text, _ = browse(site.url("phone.html"), tmp_path, "--dump-dom", "--virtual-time-budget=5000")
    assert re.search(r"<title>width 360</title>", text), text[:300]


class Outline(html.parser.HTMLParser):
    """What a reader without eyes for the plots gets: ids, tables in figures, links to anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.figures = self.figure_tables = self.figure_drawings = 0
        self.inside = False
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action") and v]
        self.addresses += re.findall(r"url\(([^)]*)\)", values.get("style") or "")
        if tag == "figure":
            self.figures += 1
            self.inside = True
        self.figure_tables += self.inside and tag == "table"
        self.figure_drawings += self.inside and tag == "svg"

    def handle_endtag(self, tag: str) -> None:
        if tag == "figure":
            self.inside = False


def test_every_plot_has_its_numbers_as_a_table(page):
    outline = Outline()
    outline.feed(page)
    assert outline.figures == outline.figure_tables == outline.figure_drawings == 7


def test_the_page_points_nowhere_outside_and_ids_are_unique(page):
    outline = Outline()
    outline.feed(page)
    assert len(outline.ids) == len(set(outline.ids))
    assert all(a.startswith("#") or a == "data:," for a in outline.addresses)
    assert {a[1:] for a in outline.addresses if a.startswith("#")} <= set(outline.ids)
    assert POLICY.startswith("default-src 'none'") and POLICY in page
    assert "@import" not in page and "<script" not in page
    left = set(re.findall(r"https?://[^\s\"'<)]+", page))
    assert all("www.w3.org" in address for address in left), left


def test_no_stand_in_colour_is_left_in_the_drawings(page):
    assert re.findall(r"#0[1-4]0[0-9a-f]{3}\b", page.split("</style>", 1)[1]) == []


def test_the_same_report_gives_the_same_page(page):
    assert render_html(full_report()) == page


def test_names_from_outside_cannot_become_markup():
    variant = VariantRow(name="<img src=x>", seed=0, params=1, tokens=1, curve=((0.0, 0.0, 7.0), (1.0, 1.0, 4.0)))
    page = render_html(make_report(variants=[variant], command="x <script>alert(1)</script>"))
    assert "<img" not in page and "<script" not in page


def test_a_report_in_which_nothing_was_measured_still_has_a_page():
    page = render_html(
        make_report(results={}, variants=[], artifacts=make_artifacts(passed=False, reason="logits differ"))
    )
    assert "logits differ" in page and "<figure" not in page and "GATE" in page


@pytest.mark.parametrize("seeds", [1, 3])
def test_seeds_share_one_legend_entry(seeds):
    variants = [
        VariantRow(name="baseline", seed=k, params=1, tokens=1, curve=((0.0, 0.0, 7.0), (1e3, 1.0, 4.0 + k / 10)))
        for k in range(seeds)
    ]
    page = render_html(make_report(variants=variants, results={}))
    drawing = page[page.index('<figure id="loss-tokens"') : page.index("<details>", page.index('id="loss-tokens"'))]
    assert len(re.findall(r">baseline</text>", drawing)) == 1
