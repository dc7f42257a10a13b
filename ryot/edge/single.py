"""One prompt through the scheduler, for what only that can do: drafts that are checked several tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ryot.edge.bundle import Bundle
from ryot.edge.generate import encode_prompt
from ryot.edge.sampling_params import SamplingParams
from ryot.edge.scheduler import Scheduler
from ryot.edge.sequence import Request
from ryot.edge.slots import SlotEngine
from ryot.edge.tokenizer import Tokenizer


def stream_text(
    bundle: Bundle,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    threads: int,
    max_new_tokens: int,
    sampling: SamplingParams,
    stop: Sequence[str],
    ignore_eos: bool,
) -> Iterator[str]:
    """The continuation of a text as it comes, by as many tokens as fit at most. Raises like `Scheduler.check`."""
    context_bytes = bundle.model.kv_cache_bytes(bundle.model.context_length, 1, np.dtype(bundle.kv_dtype).itemsize)
    engine = SlotEngine(bundle, threads=threads, memory_bytes=context_bytes)
    engine.open_checker()
    ids = encode_prompt(bundle, tokenizer, prompt)
    room = engine.max_len - len(ids)
    scheduler = Scheduler(engine, tokenizer)
    scheduler.add(
        Request(
            prompt_ids=ids,
            max_tokens=max(1, min(max_new_tokens, room)),
            sampling=sampling,
            stop=tuple(stop),
            ignore_eos=ignore_eos,
        )
    )
    while not scheduler.idle:
        for event in scheduler.step():
            if event.error is not None:
                raise event.error
            yield event.text
