"""How a batch uses its machine where nobody says: all cores, and as many rows as were measured to pay."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ryot.decisions import recall
from ryot.edge.bundle import MANIFEST_NAME, Bundle, hash_file
from ryot.edge.cores import count_usable_cores
from ryot.edge.engine import FIRST_CAPACITY
from ryot.edge.machine import describe_cpu
from ryot.edge.widths import WIDTHS, Width, choose_width, measure_widths

#: Without a measurement.
DEFAULT_ROWS = 32
#: Requests from which a measurement, which takes about as long as some hundred steps, is worth its time.
MEASURED_FROM = 200
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Widths:
    """What steps of several widths took."""

    widths: tuple[Width, ...]

    @property
    def rows(self) -> int:
        """The width to take."""
        return choose_width(self.widths).rows


class Size(NamedTuple):
    """Threads and rows, and where they come from."""

    threads: int
    rows: int
    why: str


def recall_widths(bundle: Bundle, cache: Path, *, threads: int, kv_bytes: int, again: bool = False) -> Widths:
    """The widths of this bundle on this CPU that were measured before, or are now, as far as `kv_bytes` hold them."""
    path = _decision_path(bundle, cache, threads)
    if again:
        path.unlink(missing_ok=True)
    row_bytes = bundle.model.kv_cache_bytes(FIRST_CAPACITY, 1, np.dtype(bundle.kv_dtype).itemsize)
    fitting = tuple(width for width in WIDTHS if width * row_bytes <= kv_bytes) or WIDTHS[:1]
    found, _ = recall(path, Widths, lambda: Widths(tuple(measure_widths(bundle, threads=threads, widths=fitting))))
    return Widths(tuple(width for width in found.widths if width.rows <= fitting[-1]))


def choose_size(
    bundle: Bundle, cache: Path, *, threads: int | None, rows: int | None, num_requests: int, kv_bytes: int
) -> Size:
    """What was asked for, and for the rest what this machine can do."""
    used = count_usable_cores() if threads is None else threads
    why = "as asked" if threads is not None else "the cores it may use"
    if rows is not None:
        return Size(used, rows, f"{used} threads ({why}), {rows} rows (as asked)")
    if num_requests < MEASURED_FROM and not _decision_path(bundle, cache, used).exists():
        told = f"not measured for fewer than {MEASURED_FROM} requests"
        return Size(used, DEFAULT_ROWS, f"{used} threads ({why}), {DEFAULT_ROWS} rows ({told})")
    found = recall_widths(bundle, cache, threads=used, kv_bytes=kv_bytes)
    told = f"measured here: {next(width.tok_s for width in found.widths if width.rows == found.rows):.0f} tok/s"
    return Size(used, found.rows, f"{used} threads ({why}), {found.rows} rows ({told}; wider steps bring hardly more)")


def _decision_path(bundle: Bundle, cache: Path, threads: int) -> Path:
    cpu = describe_cpu()
    told = (SCHEMA, hash_file(bundle.path / MANIFEST_NAME), cpu["model"], cpu["isa"], threads)
    return cache / "widths" / f"{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}.json"
