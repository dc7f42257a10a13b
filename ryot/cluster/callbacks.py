"""A thread that works through results one by one, so that the scheduler never waits for an export."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_NAME = "on-done"
T = TypeVar("T")


def is_busy() -> bool:
    """Whether a callback that nobody waits for is at work: Python, ending around native code in it, would abort."""
    return any(thread.name == _NAME for thread in threading.enumerate())


class CallbackThread(Generic[T]):
    """Calls `function` for each thing put in, in order; keeps the first exception for `finish`."""

    def __init__(self, function: Callable[[T], None]):
        self._function = function
        self._queue: queue.SimpleQueue[tuple[T] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._left = False
        # A daemon, so that a second Ctrl-C does not wait for the export in flight.
        self._thread = threading.Thread(target=self._work, name=_NAME, daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Queue one call."""
        self._queue.put((item,))

    def finish(self, abandon: Callable[[], bool]) -> None:
        """Wait until all is done, or `abandon()` is true; raises what the function raised first."""
        self._wait(abandon)
        if self._error:
            raise self._error

    def leave(self, abandon: Callable[[], bool]) -> None:
        """Begin nothing more, and wait until the call in flight has ended or `abandon()` is true."""
        self._left = True
        self._wait(abandon)

    def _wait(self, abandon: Callable[[], bool]) -> None:
        self._queue.put(None)
        while self._thread.is_alive() and not abandon():
            self._thread.join(timeout=0.2)

    def _work(self) -> None:
        while (entry := self._queue.get()) is not None:
            if self._error is None and not self._left:
                try:
                    self._function(*entry)
                except BaseException as error:  # handed to the thread that waits in `finish`
                    self._error = error
