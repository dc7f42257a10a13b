"""What glibc's allocator keeps goes back to the system: in an export, and where a server has nothing to do."""

from __future__ import annotations

import ctypes

#: glibc's number of the setting, and the size from which an allocation is a mapping of its own, which goes when it is
#: freed. By itself glibc raises that size with what it sees, up to 32 MB, and keeps freed arrays of a layer's size.
_M_MMAP_THRESHOLD, _MAPPED_BYTES = -3, 1 << 20


def map_large_arrays() -> None:
    """Have arrays of 1 MiB or more go back to the system as they are freed, in this process from now on."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl and macOS have none
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def trim_heap() -> None:
    """Return what the allocator has free, without a look at what Python could free; other threads run meanwhile."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
