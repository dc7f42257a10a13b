"""Moves memory that is in use to huge pages, which saves a tenth of a step where the weights are large.

A step reads every weight once. 33 MB of them lie in 8,000 pages of 4 KB, of which a processor remembers the addresses
of one or two thousand; for the others it walks through tables. Linux copies what is in use to pages of 2 MB when it is
asked to (MADV_COLLAPSE, since 6.1, where transparent huge pages are not switched off). Elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

#: Below this the processor's own table holds all addresses: nothing to gain.
MIN_WEIGHT_BYTES = 8_000_000
#: Finding room for a huge page takes long when memory is in pieces; the rest is then left as it is.
BUDGET_S = 0.5
#: Share of a huge page that must be in use already: what is not would take memory that nobody needs.
MIN_RESIDENT = 0.9
HUGE_PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
MADV_COLLAPSE = 25
PRESENT_BIT = 63


def move_to_huge_pages() -> int:
    """Move this process's anonymous memory, one huge page after the other; returns the bytes moved.

    It takes some 1 to 2 ms a MB, in which other threads may have to wait for new memory, and one huge page of memory
    more than before while a page is copied.
    """
    try:
        huge = int(HUGE_PAGE_SIZE.read_text())
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    except (OSError, ValueError):  # another system, a kernel without huge pages, or no /proc
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved, deadline = 0, time.monotonic() + BUDGET_S
    try:
        for start, end in _anonymous_ranges():
            for address in range(-(-start // huge) * huge, end - huge + 1, huge):
                if not _is_resident(pagemap, address, huge):
                    continue
                if madvise(address, huge, MADV_COLLAPSE) == 0:
                    moved += huge
                elif ctypes.get_errno() == errno.EINVAL and not moved:
                    return 0  # not known here, or switched off
                if time.monotonic() > deadline:
                    return moved
    finally:
        os.close(pagemap)
    return moved


def _anonymous_ranges() -> Iterator[tuple[int, int]]:
    """Private, writable memory without a file behind it: first address and the one behind the last."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if fields[1].startswith("rw") and fields[1][3] == "p" and fields[5:] in ([], ["[heap]"]):
            start, _, end = fields[0].partition("-")
            yield int(start, 16), int(end, 16)


def _is_resident(pagemap: int, address: int, size: int) -> bool:
    """Whether most pages in these bytes are in memory; see Documentation/admin-guide/mm/pagemap.rst of Linux."""
    page = os.sysconf("SC_PAGE_SIZE")
    entries = memoryview(os.pread(pagemap, size // page * 8, address // page * 8)).cast("Q")
    return sum(entry >> PRESENT_BIT for entry in entries) >= MIN_RESIDENT * (size // page)
