"""Memory of an export: what is free goes back to the system, so that a peak is what is needed at one time."""

from __future__ import annotations

import gc

from ryot.deploy.mapped import release_mapped_arrays
from ryot.edge.memory import trim_heap


def give_back_memory() -> None:
    """Return what is free to the system; glibc keeps the pieces of a session that has ended, hundreds of MB of them.

    What weights in a file have brought into memory goes too.
    """
    gc.collect()
    release_mapped_arrays()
    trim_heap()
