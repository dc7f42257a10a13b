"""Answers sampled from the policy by the edge engine: all prompts' samples as one continuous batch.

A fleet is whatever samples: one engine in this process here, several as Ray actors in `ryot.cluster.rollout_fleet`.
What is sampled depends on the weights and the seeds alone, not on who samples it; probabilities may differ by what
rounding does in batches of another width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ryot.adaptation import RolloutPrecision
from ryot.edge.sampling_params import SamplingParams
from ryot.edge.scheduler import Scheduler, run_all
from ryot.edge.sequence import ActiveSequence, Request
from ryot.edge.slots import SlotEngine
from ryot.edge.tokenizer import load_tokenizer
from ryot.models.spec import DecoderSpec
from ryot.models.tensors import FloatArray
from ryot.reinforce.live_bundle import LiveBundle
from ryot.scratch import scratch_folder

#: Memory for keys and values, and for the prompts that the samples of a group share.
KV_BYTES, PREFIX_BYTES = 2_000_000_000, 64_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What is needed to run a model, but for its weights."""

    spec: DecoderSpec
    text_files: Mapping[str, bytes]
    """The tokenizer's, by name."""
    eos: tuple[int, ...]
    bos: int | None


class Group(NamedTuple):
    """A prompt that is to be answered several times."""

    prompt_ids: tuple[int, ...]
    num_samples: int
    max_tokens: int
    seed: int
    """Sample i draws from stream (seed, i)."""


class Sample(NamedTuple):
    """An answer."""

    tokens: tuple[int, ...]
    """The end of the text included, where it ended by itself."""
    logprobs: tuple[float, ...]
    """Natural logarithms of the probabilities that they were drawn with."""
    text: str
    ended: bool
    """False where it was cut off."""


class Fleet(Protocol):
    """Samples answers."""

    def update(self, arrays: Mapping[str, FloatArray]) -> None:
        """Use these weights, under the names of `Decoder.state_dict()`, from now on."""

    def sample(self, groups: Sequence[Group]) -> list[list[Sample]]:
        """The samples of each group."""

    def close(self) -> None:
        """Give everything back."""


class LocalFleet:
    """One engine in this process."""

    def __init__(self, policy: Policy, *, rows: int, threads: int = 1, precision: RolloutPrecision = "fp32"):
        self._policy, self._rows, self._threads = policy, rows, threads
        self._stack = ExitStack()
        folder = self._stack.enter_context(scratch_folder("policy"))
        self._live = LiveBundle(folder, policy.spec, policy.text_files, policy.eos, policy.bos, precision)
        self._scheduler: Scheduler | None = None

    def update(self, arrays: Mapping[str, FloatArray]) -> None:
        bundle = self._live.update(arrays)
        if self._scheduler is None:
            engine = SlotEngine(bundle, threads=self._threads, batch_size=self._rows, memory_bytes=KV_BYTES)
            tokenizer = load_tokenizer(bundle)
            self._scheduler = Scheduler(engine, tokenizer, prefix_cache_bytes=PREFIX_BYTES, even_pieces=True)
        else:
            self._scheduler.engine.reload()

    def sample(self, groups: Sequence[Group]) -> list[list[Sample]]:
        scheduler = self._scheduler
        assert scheduler is not None, "weights come first"
        # A prompt that is known from before would be computed in other pieces, and so rounded in another way.
        scheduler.reset()
        requests = [
            Request(
                prompt_ids=group.prompt_ids,
                max_tokens=group.max_tokens,
                sampling=SamplingParams(temperature=1.0, seed=group.seed),
                choice=choice,
                top_logprobs=0,
                whole=True,
            )
            for group in groups
            for choice in range(group.num_samples)
        ]
        answers = iter(run_all(scheduler, requests))
        return [[_sample(next(answers)[-1].sequence) for _ in range(group.num_samples)] for group in groups]

    def close(self) -> None:
        self._scheduler = None
        self._live.close()
        self._stack.close()


def _sample(sequence: ActiveSequence) -> Sample:
    answer = sequence.completion
    return Sample(
        tokens=tuple(answer.tokens),
        logprobs=tuple(sequence.logprobs),
        text=answer.text,
        ended=answer.finish_reason == "eos",
    )
