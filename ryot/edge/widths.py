"""How many sequences it pays to compute together on this machine: steps of several widths, timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ryot.edge.bundle import Bundle
from ryot.edge.slots import SlotEngine

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
#: Tokens that each sequence has behind it.
DEPTH = 128
ROUNDS = 9
#: A width is chosen when none gives more than this times its tokens per second: each row waits for all others.
ENOUGH = 1.05


@dataclass(frozen=True, slots=True)
class Width:
    """A step of so many rows."""

    rows: int
    step_ms: float
    """Median over the rounds."""
    tok_s: float


def measure_widths(bundle: Bundle, *, threads: int = 1, widths: Sequence[int] = WIDTHS) -> list[Width]:
    """Every width's step, the widest last, in rounds that take each once. Raises like `SlotEngine`."""
    depth = min(DEPTH, bundle.model.context_length - ROUNDS - 2)
    row_bytes = bundle.model.kv_cache_bytes(bundle.model.context_length, 1, np.dtype(bundle.kv_dtype).itemsize)
    engine = SlotEngine(bundle, threads=threads, batch_size=widths[-1], memory_bytes=widths[-1] * row_bytes)
    for row in range(widths[-1]):
        engine.make_room(row + 1, depth + ROUNDS + 2)
        engine.clear_row(row)
        engine.extend([1 + row % 8] * depth if row == 0 else [1], row)
        if row:
            engine.write_values(row, 0, engine.read_values(0, 0, depth))
    times: dict[int, list[float]] = {width: [] for width in widths}
    for number in range(ROUNDS + 1):
        for width in widths:
            for row in range(width):
                engine.truncate(depth, row)
            began = time.perf_counter()
            engine.step_rows(width)
            # The first one prepares buffers.
            if number:
                times[width].append(time.perf_counter() - began)
    medians = {width: statistics.median(found) for width, found in times.items()}
    return [Width(width, 1e3 * step_s, width / step_s) for width, step_s in medians.items()]


def choose_width(widths: Sequence[Width]) -> Width:
    """The narrowest one beyond which hardly more tokens per second come."""
    best = max(width.tok_s for width in widths)
    return next(width for width in widths if width.tok_s * ENOUGH >= best)
