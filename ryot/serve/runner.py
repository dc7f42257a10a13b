"""The thread that a model's scheduler runs in, and the way of its tokens to asyncio."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from ryot.edge.scheduler import Scheduler
from ryot.edge.sequence import ActiveSequence, Request, TokenEvent
from ryot.errors import BundleError, RyotError
from ryot.serve.errors import ApiError
from ryot.serve.metrics import ModelMetrics

_log = logging.getLogger(__name__)


class Answers:
    """The events of requests that were sent together, as they come; leaving it gives up on what has not ended."""

    def __init__(self, runner: Runner, sequences: Sequence[ActiveSequence]):
        self.sequences = sequences
        self._runner = runner
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._open = set(sequences)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while self._open:
            event = await self._queue.get()
            if event.sequence not in self._open:
                continue
            if event.ends:
                self._open.discard(event.sequence)
            if event.error is not None:
                raise event.error
            yield event

    def close(self) -> None:
        """Give up on what has not ended."""
        self.give_up(self.sequences)

    def give_up(self, sequences: Sequence[ActiveSequence]) -> None:
        """Give up on those of `sequences` that have not ended."""
        lost = self._open.intersection(sequences)
        for sequence in lost:
            sequence.cancelled = True
        if lost:
            self._runner.wake()
        self._open -= lost

    def put(self, events: Sequence[TokenEvent]) -> None:
        """Called by the runner's thread."""
        with suppress(RuntimeError):  # the server has ended meanwhile
            self._loop.call_soon_threadsafe(self._put, events)

    def _put(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            self._queue.put_nowait(event)


class Runner:
    """Steps a scheduler as long as it has work, in a thread of its own."""

    def __init__(self, scheduler: Scheduler, *, max_waiting: int):
        self.scheduler = scheduler
        self.metrics = ModelMetrics()
        self.max_waiting = max_waiting
        self._inbox: list[ActiveSequence] = []
        self._answers: dict[ActiveSequence, Answers] = {}
        self._last_token_s: dict[ActiveSequence, float] = {}
        self._wakeup = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="ryot-engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step that is under way; what has not ended gets nothing more."""
        with self._wakeup:
            self._stopped = True
            self._wakeup.notify()
        self._thread.join()

    def wake(self) -> None:
        """Have a look at what was cancelled."""
        with self._wakeup:
            self._wakeup.notify()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row."""
        return self.scheduler.num_waiting + len(self._inbox)

    def submit(self, requests: Sequence[Request]) -> Answers:
        """Queue requests, from asyncio's thread. Raises `ApiError` 429 where too many wait, else like `check`."""
        for request in requests:
            self.scheduler.check(request)
        if self.num_waiting >= self.max_waiting:
            raise ApiError(
                429,
                f"{self.num_waiting} requests wait, which is the limit; try again later",
                kind="rate_limit_error",
                code="queue_full",
                retry_after_s=self._retry_after_s(),
            )
        answers = Answers(self, [self.scheduler.build(request) for request in requests])
        with self._wakeup:
            for sequence in answers.sequences:
                self._answers[sequence] = answers
            self._inbox += answers.sequences
            self._wakeup.notify()
        return answers

    def _retry_after_s(self) -> int:
        """Time until about half of what waits has had its turn, by how long requests have taken so far."""
        whole = self.metrics.whole_s
        mean_s = whole.total / whole.count if whole.count else 1.0
        return min(max(1, math.ceil(mean_s * self.num_waiting / self.scheduler.engine.batch_size / 2)), 60)

    def _run(self) -> None:
        scheduler = self.scheduler
        while True:
            with self._wakeup:
                while not (self._inbox or self._stopped) and scheduler.idle:
                    self._wakeup.wait()
                if self._stopped:
                    return
                arrived, self._inbox = self._inbox, []
            for sequence in arrived:
                scheduler.queue(sequence)
            try:
                events = scheduler.step()
            except Exception as error:  # the top of a thread: whoever waits is told, and the next ones have a chance
                _log.exception("a step failed")
                told = error if isinstance(error, RyotError) else BundleError("an error inside the server")
                events = [TokenEvent(sequence, None, error=told) for sequence in scheduler.abandon()]
            self._deliver(events)
            self._forget_cancelled()

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        now_s = time.perf_counter()
        batches: dict[Answers, list[TokenEvent]] = {}
        for event in events:
            self.metrics.observe(event, self._last_token_s.get(event.sequence), now_s)
            self._last_token_s[event.sequence] = now_s
            if answers := self._answers.get(event.sequence):
                batches.setdefault(answers, []).append(event)
            if event.ends:
                self._forget(event.sequence)
        for answers, batch in batches.items():
            answers.put(batch)

    def _forget_cancelled(self) -> None:
        now_s = time.perf_counter()
        for sequence in [sequence for sequence in list(self._answers) if sequence.cancelled]:
            self.metrics.end("abort", sequence.queued_s, sequence.started_s or now_s, now_s)
            self._forget(sequence)

    def _forget(self, sequence: ActiveSequence) -> None:
        self._answers.pop(sequence, None)
        self._last_token_s.pop(sequence, None)
