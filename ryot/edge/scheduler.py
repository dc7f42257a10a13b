"""Many sequences over one engine: they join and leave between two steps, and each gets the tokens it gets alone.

`step` computes one token of every running sequence, and then a piece of a prompt that waits, as long as running streams
can do without. Rows of the engine are packed: running sequences first, then at most one whose prompt is on its way.
Whoever leaves gives its row to the last one. Where memory is full the youngest sequence goes back to the queue with the
tokens it has, and is computed again when there is room.

Everything here belongs to one thread, but `ActiveSequence.cancelled`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ryot.edge.engine import PIECE_TOKENS
from ryot.edge.pieces import PieceCosts
from ryot.edge.prefix_cache import BLOCK_TOKENS, PrefixCache
from ryot.edge.sampling import draw_uncut
from ryot.edge.sequence import ActiveSequence, Drawn, Request, TokenEvent
from ryot.edge.slots import SlotEngine
from ryot.edge.speculation import DraftCosts, Drafter
from ryot.edge.tokenizer import Tokenizer
from ryot.errors import ConfigError, ContextError

#: Time that a prompt may take between two steps of running sequences, in steps. Where several wait each has as much,
#: since steps of few rows waste the machine, but together they take `PROMPTS_S` at most.
PROMPT_STEPS = 1.25
PROMPTS_S = 0.1
#: Weight of the newest measurement of how long a step takes.
SMOOTHING = 0.2


@dataclass(slots=True)
class Counters:
    """What a scheduler has done since it was made."""

    steps: int = 0
    step_tokens: int = 0
    """Tokens that steps computed, those of prompts whose probabilities were asked for included."""
    prefill_tokens: int = 0
    """Tokens of prompts that were computed, and of sequences computed again."""
    prompt_tokens: int = 0
    """Tokens of prompts, computed or known."""
    cached_tokens: int = 0
    """Of these, those that were known."""
    preemptions: int = 0
    """Sequences that lost their row for want of memory."""
    drafts: int = 0
    """Calls that checked a draft."""
    draft_tokens: int = 0
    """Tokens of drafts."""
    accepted_tokens: int = 0
    """Of these, those that were right."""


class _Prompt(NamedTuple):
    """A prompt that was computed to its end."""

    sequence: ActiveSequence
    """The last one that begins with it."""
    ids: list[int]
    logits_V: np.ndarray
    """After its last token."""
    greedy: int


class Scheduler:
    """Runs requests on an engine's rows.

    With `even_pieces` how long a step takes has no say in how prompts are cut and when they join, so that the bits that
    come out depend on the requests alone; for work that nobody waits for token by token.
    """

    def __init__(
        self, engine: SlotEngine, tokenizer: Tokenizer, *, prefix_cache_bytes: int = 0, even_pieces: bool = False
    ):
        self.engine = engine
        self._even_pieces = even_pieces
        self.cache = PrefixCache(prefix_cache_bytes if engine.bundle.prefill_takes_past else 0)
        self.counters = Counters()
        self._tokenizer = tokenizer
        self._waiting: deque[ActiveSequence] = deque()
        #: By row.
        self._running: list[ActiveSequence] = []
        #: The sequence whose prompt is on its way, in the row behind the running ones.
        self._prefilling: ActiveSequence | None = None
        self._step_s, self._piece_costs = 0.0, PieceCosts()
        #: The prompt computed last, and what follows it: candidates to one prompt come one after the other.
        self._last_prompt: _Prompt | None = None
        #: Sequences whose prompts were computed to the end in the last step, and how long these are.
        self._unremembered: list[tuple[ActiveSequence, int]] = []
        self._draft_costs = DraftCosts()
        self._drafters: dict[ActiveSequence, Drafter] = {}

    @property
    def num_running(self) -> int:
        """Sequences that have a row."""
        return len(self._running) + (self._prefilling is not None)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a row."""
        return len(self._waiting)

    @property
    def has_prompts(self) -> bool:
        """Whether a prompt waits or is on its way, so that the next step takes longer."""
        return bool(self._waiting) or self._prefilling is not None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self.num_running)

    def check(self, request: Request) -> None:
        """Raise `ContextError` or `ConfigError` for a request that can never run. Any thread may ask."""
        engine, size = self.engine, len(request.prompt_ids)
        if not size:
            raise ConfigError("prompt: is empty, expected at least one token")
        if size + request.max_tokens > engine.max_len:
            raise ContextError(
                f"a prompt of {size} tokens and {request.max_tokens} new ones do not fit the context of "
                f"{engine.max_len} tokens",
                hint=f"ask for at most {engine.max_len - size} new tokens"
                if size < engine.max_len
                else "shorten the prompt",
            )
        vocab_size = engine.bundle.model.vocab_size
        named = [*request.prompt_ids, *(token for token, _ in request.sampling.logit_bias)]
        if wrong := [token for token in named if not 0 <= token < vocab_size]:
            raise ConfigError(f"token ids: got {wrong[0]}, expected a number from 0 to {vocab_size - 1}")

    def build(self, request: Request) -> ActiveSequence:
        """A sequence to `queue`, of a request that was checked. Any thread may ask."""
        return ActiveSequence(request, self._tokenizer, self.engine.bundle.eos_token_ids)

    def queue(self, sequence: ActiveSequence) -> None:
        """Have a sequence wait for a row."""
        self._waiting.append(sequence)

    def add(self, request: Request) -> ActiveSequence:
        """Queue a request. Raises like `check`."""
        self.check(request)
        sequence = self.build(request)
        self.queue(sequence)
        return sequence

    def step(self) -> list[TokenEvent]:
        """Do a bounded piece of work; returns what came of it, in the order it came.

        Raises `BundleError` where the engine fails; `abandon` then tells whose work is lost.
        """
        for sequence, length in self._unremembered:
            if sequence in self._running:
                self._remember(sequence, self._running.index(sequence), length)
        self._unremembered.clear()
        self._drop_cancelled()
        events: list[TokenEvent] = []
        if self._running:
            events += self._decode()
        self._drop_cancelled()
        events += self._prefill()
        return events

    def abandon(self) -> list[ActiveSequence]:
        """Forget all sequences and return them; the engine is as new then."""
        lost = [*self._running, *([self._prefilling] if self._prefilling else []), *self._waiting]
        self._running.clear()
        self._waiting.clear()
        self._prefilling = None
        self._unremembered.clear()
        self._drafters.clear()
        self.engine.release()
        return lost

    def reset(self) -> None:
        """Forget what was counted and remembered."""
        assert self.idle
        self.counters = Counters()
        self.cache = PrefixCache(self.cache.max_bytes)
        self._last_prompt = None
        self._step_s, self._piece_costs = 0.0, PieceCosts()

    def _decode(self) -> list[TokenEvent]:
        """One token for every running sequence; several where a draft of a single one is right."""
        engine = self.engine
        alone = self.num_running == 1 and not self._waiting
        if alone and engine.can_check and self._step_s and (events := self._check_draft(self._running[0])):
            return events
        while not engine.make_room(self.num_running, engine.longest(len(self._running)) + 1):
            self._preempt()
        count = len(self._running)
        began = time.perf_counter()
        engine.step_rows(count)
        self._step_s = _smooth(self._step_s, time.perf_counter() - began)
        self.counters.steps += 1
        self.counters.step_tokens += count
        events = []
        drawn = self._draw_uncut()
        for row in reversed(range(count)):
            event = self._take(row, drawn.get(row))
            if event is not None:
                events.append(event)
                if event.ends:
                    self._leave(row)
        events.reverse()
        return events

    def _draw_uncut(self) -> dict[int, Drawn]:
        """The next tokens of the rows that draw among all tokens, drawn together."""
        samplers = [(row, sequence.uncut) for row, sequence in enumerate(self._running) if sequence.uncut is not None]
        if not samplers:
            return {}
        rows = [row for row, _ in samplers]
        # All of them as a rule, which copies nothing.
        logits_RV = self.engine.logits[: len(rows)] if rows[-1] == len(rows) - 1 else self.engine.logits[rows]
        if np.isnan(logits_RV.max()):
            return {}  # each by itself says which one is damaged
        temperatures = np.array([sampler.params.temperature for _, sampler in samplers])
        uniforms = np.array([sampler.draw() for _, sampler in samplers])
        ids_R, logprobs_R = draw_uncut(logits_RV, temperatures, uniforms)
        return {row: Drawn(*found) for row, *found in zip(rows, ids_R.tolist(), logprobs_R.tolist())}

    def _check_draft(self, sequence: ActiveSequence) -> list[TokenEvent]:
        """What a draft of the only running sequence comes to; nothing where none is made."""
        engine = self.engine
        length = engine.lengths[0]
        most = min(sequence.request.max_tokens - sequence.completion_tokens, engine.max_len - length) - 1
        drafter = self._drafters.setdefault(sequence, Drafter(self._draft_costs))
        told = not (sequence.scores_prompt or sequence.request.whole)
        draft = drafter.draft(sequence.ids, most) if told else []
        if not draft or not engine.make_room(1, length + 1 + len(draft)):
            return []
        began = time.perf_counter()
        logits_SV = engine.check_tokens([int(engine.next_token[0]), *draft], 0)
        greedy = logits_SV.argmax(axis=1)
        self._draft_costs.observe(len(draft), (time.perf_counter() - began) / self._step_s)
        if self._draft_costs.never_pay:
            engine.close_checker()
        events: list[TokenEvent] = []
        for position in range(len(draft) + 1):
            event = sequence.take(logits_SV[position], int(greedy[position]))
            assert not isinstance(event, int)
            events.append(event)
            if event.ends or position == len(draft) or event.token != draft[position]:
                break
        accepted = len(events) - 1
        drafter.learn(len(draft), accepted)
        sequence.draft_tokens += len(draft)
        sequence.accepted_tokens += accepted
        counters = self.counters
        counters.steps += 1
        counters.step_tokens += len(draft) + 1
        counters.drafts += 1
        counters.draft_tokens += len(draft)
        counters.accepted_tokens += accepted
        engine.truncate(length + 1 + accepted)
        if (token := events[-1].token) is not None:
            engine.next_token[0] = token
        if events[-1].ends:
            self._leave(0)
        return events

    def _prefill(self) -> list[TokenEvent]:
        """Pieces of waiting prompts, for as long as the running sequences can do without a step."""
        if self._prefilling is None and not self._waiting:
            return []
        events = []
        budget = self._piece_tokens()
        while budget > 0 and (self._prefilling is not None or self._admit()):
            done, event = self._prefill_piece(budget)
            budget -= done
            if event is not None:
                events.append(event)
            # With nothing running before there is no one to wait for a step but the one that has just begun.
            if self._running and not self._step_s:
                break
        return events

    def _piece_tokens(self) -> int:
        if self._even_pieces or not self._running or not self._piece_costs.known:
            return PIECE_TOKENS
        one_s = PROMPT_STEPS * self._step_s
        free_rows = self.engine.batch_size - len(self._running)
        prompts = max(1, min(len(self._waiting) + (self._prefilling is not None), free_rows))
        return self._piece_costs.fitting(max(one_s, min(prompts * one_s, PROMPTS_S)), self._step_s)

    def _prefill_piece(self, budget: int) -> tuple[int, TokenEvent | None]:
        """Compute up to `budget` tokens of the prompt on its way: how many it was, and what came of the last one."""
        sequence, engine, row = self._prefilling, self.engine, len(self._running)
        assert sequence is not None
        ids = sequence.prefill_ids
        start = engine.row_length(row)
        size = min(budget, len(ids) - start) if engine.bundle.prefill_takes_past else len(ids) - start
        began = time.perf_counter()
        if size:
            engine.extend(ids[start : start + size], row)
            self.counters.prefill_tokens += size
            self._piece_costs.observe(size, time.perf_counter() - began)
        # Bit by bit, so that no step waits for the copy of a whole prompt.
        if start + size < len(ids):
            self._remember(sequence, row, (start + size) // BLOCK_TOKENS * BLOCK_TOKENS)
            return size, None
        if self._waiting:
            self._remember(sequence, row, len(ids))
        else:
            # Nobody can begin with it before the next step, and a first token is not to wait for the copy.
            self._unremembered.append((sequence, len(ids)))
        self._prefilling = None
        self._running.append(sequence)
        if size:
            self._last_prompt = _Prompt(sequence, ids, engine.logits[row].copy(), int(engine.next_token[row]))
        event = self._take(row)
        if event is not None and event.ends:
            if self._unremembered and sequence.request.whole:
                self._remember(sequence, row, len(ids))
            self._leave(row)
        return size, event

    def _admit(self) -> bool:
        """Give the first waiting sequence the next row, with what is known of its beginning."""
        row = len(self._running)
        if not self._waiting or row >= self.engine.batch_size:
            return False
        sequence = self._waiting[0]
        ids = sequence.prefill_ids
        if not self.engine.make_room(row + 1, min(len(ids) + 1, self.engine.max_len)):
            return False
        self._waiting.popleft()
        self._prefilling = sequence
        self.engine.clear_row(row)
        known = 0
        if not sequence.request.prompt_logprobs:
            last = self._last_prompt
            same = last is not None and (last.sequence.request.owner, last.ids) == (sequence.request.owner, ids)
            # The last token of another prompt is computed in any case, for its logits.
            for values in self.cache.match(sequence.request.owner, ids if same else ids[:-1]):
                self.engine.write_values(row, known, values)
                known += values.shape[2]
            if last is not None and same and known < len(ids) and last.sequence in self._running:
                # What the cache has no room for, or is not there, is still in the row of who has the same prompt.
                known = len(ids)
                self.engine.write_values(row, 0, self.engine.read_values(self._running.index(last.sequence), 0, known))
            if last is not None and known == len(ids):
                self.engine.set_logits(row, last.logits_V, last.greedy)
                self._last_prompt = last._replace(sequence=sequence)
        if sequence.started_s is None:
            sequence.started_s = time.perf_counter()
            sequence.cached_tokens = known
            self.counters.prompt_tokens += len(sequence.request.prompt_ids)
            self.counters.cached_tokens += known
        return True

    def _take(self, row: int, drawn: Drawn | None = None) -> TokenEvent | None:
        """Choose a row's next token, which the next step feeds; None for one that nothing is told of."""
        taken = self._running[row].take(self.engine.logits[row], self.engine.next_token[row], drawn)
        if isinstance(taken, int):
            self.engine.next_token[row] = taken
            return None
        if taken.token is not None:
            self.engine.next_token[row] = taken.token
        return taken

    def _preempt(self) -> None:
        """Send the youngest sequence back to the head of the queue."""
        self.counters.preemptions += 1
        if (sequence := self._prefilling) is not None:
            self.engine.clear_row(len(self._running))
            self._prefilling = None
        else:
            # Rows are in no order of age, but any choice ends: the first row always stays.
            assert len(self._running) > 1, "one sequence of max_len tokens fits"
            sequence = self._running.pop()
            self.engine.clear_row(len(self._running))
        self._waiting.appendleft(sequence)

    def _leave(self, row: int) -> None:
        """Remember what a row holds, and give it to the last running sequence."""
        sequence, engine, last = self._running[row], self.engine, len(self._running) - 1
        self._drafters.pop(sequence, None)
        if not (sequence.cancelled or sequence.request.whole):
            self._remember(sequence, row, engine.row_length(row))
        self._running[row] = self._running[last]
        self._running.pop()
        if row != last:
            engine.move_row(last, row)
        engine.clear_row(last)
        if self._prefilling is not None:
            engine.move_row(last + 1, last)

    def _remember(self, sequence: ActiveSequence, row: int, length: int) -> None:
        """Keep what was computed for the first `length` tokens of a row, for those that begin alike."""
        if not sequence.request.prompt_logprobs:
            ids, read = sequence.ids[:length], self.engine.read_values
            self.cache.insert(sequence.request.owner, ids, lambda start, stop: read(row, start, stop))

    def _drop_cancelled(self) -> None:
        for row in reversed(range(len(self._running))):
            if self._running[row].cancelled:
                self._leave(row)
        if self._prefilling is not None and self._prefilling.cancelled:
            self.engine.clear_row(len(self._running))
            self._prefilling = None
        if any(sequence.cancelled for sequence in self._waiting):
            self._waiting = deque(sequence for sequence in self._waiting if not sequence.cancelled)


def run_all(scheduler: Scheduler, requests: Sequence[Request]) -> list[list[TokenEvent]]:
    """The events of each request, run together to their ends. Raises the first error of any."""
    sequences = [scheduler.add(request) for request in requests]
    events: dict[ActiveSequence, list[TokenEvent]] = {sequence: [] for sequence in sequences}
    while not scheduler.idle:
        for event in scheduler.step():
            if event.error is not None:
                raise event.error
            events[event.sequence].append(event)
    return [events[sequence] for sequence in sequences]


def _smooth(before: float, now: float) -> float:
    return now if not before else before + SMOOTHING * (now - before)
