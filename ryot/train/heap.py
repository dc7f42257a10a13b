"""Python's collector, kept off what is there already."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Spare the collector the objects that are there already, the modules' half a million above all.

    Each full collection walks them for 80 to 200 ms. Autograd's objects bring one about every few steps, and an export
    asks for one wherever it gives memory back.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
