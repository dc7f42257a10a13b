"""Widths of a step are timed on a real bundle, and the narrowest that is fast enough is chosen."""

from __future__ import annotations

from pathlib import Path

from ryot.edge.bundle import load_bundle
from ryot.edge.widths import WIDTHS, Width, choose_width, measure_widths
from tests.edge.tiny_bundle import write_bundle


def test_every_width_is_timed(tmp_path: Path) -> None:
    found = measure_widths(load_bundle(write_bundle(tmp_path / "b", context=256)))
    assert tuple(width.rows for width in found) == WIDTHS
    for width in found:
        assert width.step_ms > 0 and abs(width.tok_s * width.step_ms - 1000 * width.rows) < 1e-6 * 1000 * width.rows


def test_the_narrowest_width_that_is_about_as_fast_is_chosen() -> None:
    widths = [Width(1, 1.0, 1000), Width(2, 1.1, 1800), Width(4, 2.0, 2000), Width(8, 4.0, 2050)]
    assert choose_width(widths).rows == 4
    assert choose_width(widths[:1]).rows == 1
