"""Memory of an export: what is free goes back to the system, so that a peak is what is needed at one time."""

from __future__ import annotations

import ctypes
import gc

from ryot.deploy.mapped import release_mapped_arrays

#: glibc's number of the setting, and the size from which an allocation is a mapping of its own, which goes when it is
#: freed. By itself glibc raises that size with what it sees, up to 32 MB, and keeps freed arrays of a layer's size.
_M_MMAP_THRESHOLD, _MAPPED_BYTES = -3, 1 << 20


def map_large_arrays() -> None:
    """Have arrays of 1 MiB or more go back to the system as they are freed, in this process from now on."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl and macOS have none
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def give_back_memory() -> None:
    """Return what is free to the system; glibc keeps the pieces of a session that has ended, hundreds of MB of them.

    What weights in a file have brought into memory goes too.
    """
    gc.collect()
    release_mapped_arrays()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
