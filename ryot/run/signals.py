"""Ctrl-C twice: the first signal asks to stop at the next good moment, the second to stop at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from ryot.errors import EXIT_INTERRUPTED

#: What asks a process to end: Ctrl-C, kill and most service managers, a terminal that is closed.
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _minded() -> list[signal.Signals]:
    """The stopping signals that were not ignored when we were started, as `nohup ... &` does: those stay ignored."""
    return [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]


def interrupt_on_signals() -> None:
    """Make every stopping signal raise `KeyboardInterrupt`, so that what cleans up is run; for a main thread."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in _minded():
        signal.signal(number, interrupt)


@contextlib.contextmanager
def hold_signals() -> Iterator[None]:
    """Put stopping signals off until the block has ended: what cleans up is not to be cut short.

    The first that came is then delivered to the handler of before. Outside the main thread nothing is held.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in _minded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


#: What `signal.signal` takes and gives back.
Handler = Callable[[int, FrameType | None], object] | int | None


class StopSignals:
    """Counts stopping signals while it is entered; a third one ends the process on the spot.

    Outside the main thread, where Python delivers no signals, it counts nothing.
    """

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, Handler] = {}

    @property
    def stop(self) -> bool:
        """Whether to finish what is in flight and stop."""
        return self.count >= 1

    @property
    def stop_at_once(self) -> bool:
        """Whether to stop without finishing anything."""
        return self.count >= 2

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 1:
            with contextlib.suppress(OSError):  # a closed terminal takes no words
                os.write(
                    sys.__stderr__.fileno() if sys.__stderr__ else 2,
                    b"\nstopping after the chunk in flight; once more to stop at once\n",
                )
        elif self.count >= 3:
            os._exit(EXIT_INTERRUPTED)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _minded():
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
