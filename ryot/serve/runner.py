"""The thread that a model's scheduler runs in, and the way of its tokens to asyncio."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress

from ryot.edge.memory import trim_heap
from ryot.edge.scheduler import Scheduler
from ryot.edge.sequence import ActiveSequence, Request, TokenEvent
from ryot.errors import BundleError, RyotError
from ryot.serve.errors import ApiError
from ryot.serve.metrics import ModelMetrics, TokenTimes

_log = logging.getLogger(__name__)

#: Tokens that come faster than this are sent together: a write costs a tenth of a small model's step. A first token and
#: a last one wait for nothing, and none waits while a prompt is computed.
FLUSH_S = 0.005
#: Without work for so long, a runner gives back the memory that the last requests needed.
IDLE_S = 1.0


class Answers:
    """The events of requests that were sent together, as they come; leaving it gives up on what has not ended."""

    def __init__(self, runner: Runner, sequences: Sequence[ActiveSequence]):
        self.sequences = sequences
        self._runner = runner
        self.loop = asyncio.get_running_loop()
        self._arrived: list[TokenEvent] = []
        self._waiter: asyncio.Future[None] | None = None
        self._open = set(sequences)

    async def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        """What has come since the last time. Raises the error of the first sequence that failed."""
        while self._open:
            if not self._arrived:
                self._waiter = self.loop.create_future()
                await self._waiter
            arrived, self._arrived = self._arrived, []
            # What was given up on may have said something since.
            events = [event for event in arrived if event.sequence in self._open]
            for event in events:
                if event.ends:
                    self._open.discard(event.sequence)
                if event.error is not None:
                    raise event.error
            if events:
                yield events

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
        """Called in the loop's thread."""
        self._arrived += events
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Runner:
    """Steps a scheduler as long as it has work, in a thread of its own."""

    def __init__(self, scheduler: Scheduler, *, max_waiting: int):
        self.scheduler = scheduler
        self.metrics = ModelMetrics()
        self.max_waiting = max_waiting
        self._inbox: list[ActiveSequence] = []
        self._answers: dict[ActiveSequence, Answers] = {}
        self._times: dict[ActiveSequence, TokenTimes] = {}
        self._held: dict[Answers, list[TokenEvent]] = {}
        self._flushed_s = 0.0
        self._num_expected = 0
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

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing that has not ended, and nothing that comes."""
        return not (self._answers or self._inbox or self._num_expected) and self.scheduler.idle

    @contextmanager
    def expected(self) -> Iterator[None]:
        """While a request is read that may be submitted; for asyncio's thread. Raises `ApiError` 429 like `submit`."""
        self._check_room(self.num_waiting + self._num_expected)
        self._num_expected += 1
        try:
            yield
        finally:
            self._num_expected -= 1

    def build(self, requests: Sequence[Request]) -> list[ActiveSequence]:
        """What `submit` takes, from any thread. Raises like `Scheduler.check`."""
        for request in requests:
            self.scheduler.check(request)
        return [self.scheduler.build(request) for request in requests]

    def submit(self, sequences: Sequence[ActiveSequence], *, num_prompts: int = 1, n: int = 1) -> Answers:
        """Queue sequences for `n` answers to each prompt, from asyncio's thread.

        Raises `ApiError` 429 where too many wait.
        """
        self._check_room(self.num_waiting)
        answers = Answers(self, sequences)
        with self._wakeup:
            for sequence in answers.sequences:
                self._answers[sequence] = answers
            self._inbox += answers.sequences
            self._wakeup.notify()
        for _ in range(num_prompts):
            self.metrics.choices.observe(n)
        return answers

    def _check_room(self, num_waiting: int) -> None:
        if num_waiting >= self.max_waiting:
            raise ApiError(
                429,
                f"{num_waiting} requests wait, which is the limit; try again later",
                kind="rate_limit_error",
                code="queue_full",
                retry_after_s=self._retry_after_s(),
            )

    def _retry_after_s(self) -> int:
        """Time until about half of what waits has had its turn, by how long requests have taken so far."""
        whole = self.metrics.whole_s
        mean_s = whole.total / whole.count if whole.count else 1.0
        return min(max(1, math.ceil(mean_s * self.num_waiting / self.scheduler.engine.batch_size / 2)), 60)

    def _run(self) -> None:
        scheduler = self.scheduler
        while True:
            with self._wakeup:
                rested = False
                while not (self._inbox or self._stopped) and scheduler.idle:
                    if not self._wakeup.wait(None if rested else IDLE_S) and not rested:
                        rested = True
                        self._wakeup.release()
                        trim_heap()
                        self._wakeup.acquire()
                if self._stopped:
                    return
                arrived, self._inbox = self._inbox, []
            for sequence in arrived:
                scheduler.queue(sequence)
            counters = scheduler.counters
            before = counters.step_tokens + counters.prefill_tokens
            try:
                events = scheduler.step()
            except BaseException as error:  # the top of a thread: who waits is told, the next ones have a chance
                _log.exception("a step failed")
                told = error if isinstance(error, RyotError) else BundleError("an error inside the server")
                events = [TokenEvent(sequence, None, error=told) for sequence in scheduler.abandon()]
            if computed := counters.step_tokens + counters.prefill_tokens - before:
                self.metrics.step_tokens.observe(computed)
            self._deliver(events)
            self._forget_cancelled()

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        now_s = time.perf_counter()
        urgent = now_s - self._flushed_s >= FLUSH_S or self.scheduler.has_prompts
        for event in events:
            before = self._times.get(event.sequence)
            if times := self.metrics.observe(event, before, now_s):
                self._times[event.sequence] = times
            urgent = urgent or before is None or event.ends
            if answers := self._answers.get(event.sequence):
                self._held.setdefault(answers, []).append(event)
            if event.ends:
                self._forget(event.sequence)
        if urgent and self._held:
            self._flushed_s = now_s
            self._flush()

    def _flush(self) -> None:
        # Waking a loop costs more than all else that a token needs: once a step for everyone.
        loops: dict[asyncio.AbstractEventLoop, list[tuple[Answers, list[TokenEvent]]]] = {}
        held, self._held = self._held, {}
        for answers, batch in held.items():
            loops.setdefault(answers.loop, []).append((answers, batch))
        for loop, arrived in loops.items():
            with suppress(RuntimeError):  # the server has ended meanwhile
                loop.call_soon_threadsafe(_put_all, arrived)

    def _forget_cancelled(self) -> None:
        now_s = time.perf_counter()
        for sequence in [sequence for sequence in list(self._answers) if sequence.cancelled]:
            self.metrics.end("abort", sequence, self._times.get(sequence), now_s)
            self._forget(sequence)

    def _forget(self, sequence: ActiveSequence) -> None:
        self._answers.pop(sequence, None)
        self._times.pop(sequence, None)


def _put_all(arrived: Sequence[tuple[Answers, Sequence[TokenEvent]]]) -> None:
    for answers, events in arrived:
        answers.put(events)
