"""Which pages a process keeps in memory, and how large they are. On Linux; elsewhere nothing happens.

`release_code` gives back the part of onnxruntime's code that only loading needed: pages that the system could take back
by itself, but counts as the process's until it does. `move_to_huge_pages` shortens steps over large weights: a step
reads every weight once, and 33 MB of them lie in 8,000 pages of 4 KB, of which a processor remembers the addresses of
one or two thousand; for the others it walks through tables. Linux copies what is in use to pages of 2 MB when asked
(MADV_COLLAPSE, since 6.1, where transparent huge pages are not switched off).
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: Below this the processor's own table holds all addresses: nothing to gain from huge pages.
MIN_WEIGHT_BYTES = 8_000_000
#: Where pages of 16 or 64 KB make a huge page of 32 MB and more, the table reaches further and copying takes much room.
MAX_HUGE_PAGE = 4 << 20
#: Finding room for a huge page takes long when memory is in pieces; the rest is then left as it is.
BUDGET_S = 0.5
#: Share of a huge page that must be in use already: what is not would take memory that nobody needs.
MIN_RESIDENT = 0.9
MAPS, PAGEMAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
HUGE_PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
MADV_DONTNEED, MADV_COLLAPSE = 4, 25
#: Bits of a pagemap entry, see Documentation/admin-guide/mm/pagemap.rst of Linux.
PRESENT, SWAPPED, FROM_FILE, OURS_ALONE = 1 << 63, 1 << 62, 1 << 61, 1 << 56


def release_code() -> int:
    """Give back the pages of onnxruntime's code, 16 MB once a session is loaded; returns their bytes.

    They stay in the system's file cache, and what runs next comes back from there, some 9 MB, in a fraction of a
    millisecond; what ends the process is some 4 MB more. Code that someone has written into, as a debugger does, stays.
    """
    released = 0
    for code in _mappings():
        if code.kind != "r-xp" or "onnxruntime" not in code.name.rpartition("/")[2]:
            continue
        entries = _pages(code.start, code.end)
        present = sum(entry & PRESENT != 0 for entry in entries)
        as_it_was = all(entry & FROM_FILE if entry & PRESENT else not entry & SWAPPED for entry in entries)
        if present and as_it_was and _advise(code.start, code.end, MADV_DONTNEED):
            released += (code.end - code.start) // len(entries) * present
    return released


def move_to_huge_pages() -> int:
    """Move this process's anonymous memory, one huge page after the other; returns the bytes that lie there then.

    Memory that a forked process still shares stays where it is: to move it is to have it twice. The call takes up to
    4 ms a MB, at most about `BUDGET_S`, in which other threads may have to wait for new memory, and one huge page of
    memory more than before while a page is copied.
    """
    try:
        huge = int(HUGE_PAGE_SIZE.read_text())
    except (OSError, ValueError):  # another system, or a kernel without huge pages
        return 0
    if huge > MAX_HUGE_PAGE:
        return 0
    moved, in_use, deadline = 0, PRESENT | OURS_ALONE, time.monotonic() + BUDGET_S
    for memory in _mappings():
        if memory.kind != "rw-p" or memory.name not in ("", "[heap]"):
            continue
        for start in range(-(-memory.start // huge) * huge, memory.end - huge + 1, huge):
            entries = _pages(start, start + huge)
            if not entries or time.monotonic() > deadline:
                return moved
            if sum(entry & in_use == in_use for entry in entries) < MIN_RESIDENT * len(entries):
                continue
            if _advise(start, start + huge, MADV_COLLAPSE):
                moved += huge
            elif ctypes.get_errno() == errno.EINVAL and not moved:
                return 0  # not known here, or switched off
    return moved


class _Mapping(NamedTuple):
    start: int
    """First address."""
    end: int
    """The address behind the last."""
    kind: str
    """What may be done there: `rw-p` is private memory, `r-xp` private code."""
    name: str
    """The file; empty for anonymous memory."""


def _mappings() -> Iterator[_Mapping]:
    """What this process has in its address space; nothing on a system that does not tell."""
    try:
        lines = MAPS.read_bytes().split(b"\n")
    except OSError:
        return
    # The system writes a file's name as it is, but for its line ends.
    for line in filter(None, lines):
        addresses, kind, *rest = line.decode(errors="replace").split(maxsplit=5)
        start, _, end = addresses.partition("-")
        yield _Mapping(int(start, 16), int(end, 16), kind, rest[3] if len(rest) > 3 else "")


def _pages(start: int, end: int) -> memoryview:
    """An entry for each page of these addresses; none where the system does not tell."""
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        with PAGEMAP.open("rb", buffering=0) as file:
            file.seek(start // page * 8)
            return memoryview(file.read((end - start) // page * 8)).cast("Q")
    except OSError:  # not there, refused when opened, or no file can be opened any more
        return memoryview(b"").cast("Q")


def _advise(start: int, end: int, advice: int) -> bool:
    """Whether the system did it; if not, `ctypes.get_errno` says why."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(madvise(start, end - start, advice) == 0)
