"""Giving memory back between the stages of an export."""

from __future__ import annotations

import ctypes
import gc


def give_back_memory() -> None:
    """Return what is free to the system; glibc keeps the pieces of a session that has ended, hundreds of MB of them."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # musl and macOS have none
        trim(0)
