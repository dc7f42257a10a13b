"""A bundle that is being served: its tokenizer, its chat template, and the scheduler that runs it."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ryot.edge.bundle import Bundle, load_bundle
from ryot.edge.chat import ChatTemplate, has_chat_template, load_chat_template
from ryot.edge.limits import read_group_room
from ryot.edge.scheduler import Scheduler, run_all
from ryot.edge.sequence import Request
from ryot.edge.slots import SlotEngine
from ryot.edge.tokenizer import load_tokenizer
from ryot.edge.tokenizer_config import read_json
from ryot.edge.verifiers import Rights
from ryot.errors import BundleError, ConfigError
from ryot.serve.constraints import Grammars
from ryot.serve.prefix_file import load_prefixes, prefix_path, save_prefixes
from ryot.serve.runner import Runner

_log = logging.getLogger(__name__)

#: What is taken for keys and values at most without being told: a share of the memory that is free.
KV_SHARE = 0.4
FREE_MEMORY = Path("/proc/meminfo")
#: Where free memory cannot be read.
SOME_BYTES = 2_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """How a bundle is run."""

    threads: int = 1
    rows: int = 16
    """Sequences that are computed together at most."""
    kv_bytes: int | None = None
    """Memory for their keys and values; by default what they need, or a share of the free memory where that is less."""
    prefix_cache_bytes: int = 256_000_000
    """Memory for beginnings of prompts; 0 keeps none."""
    context: int | None = None
    """Tokens that a prompt and its answer may have; by default what the bundle has."""
    prefix_folder: Path | None = None
    """Where these beginnings are kept when the server ends; by default they are forgotten."""
    max_waiting: int = 256
    """Requests that may wait for a row; the next one is turned away."""
    allowed_verifiers: frozenset[str] = frozenset()
    """Of the verifiers that run programs, those that requests may name."""
    speculate: bool = False
    """Whether a text that repeats itself may come several tokens at a time.

    That takes the weights once more, and tokens may be others than one by one where two are nearly as likely: with
    activations rounded to int8, log probabilities of SmolLM2 differ by up to 0.15 (int8) and 0.23 (int4).
    """


class ServedModel:
    """One bundle, ready to answer."""

    def __init__(self, path: Path, options: ModelOptions):
        """Load it and compute a token. Raises `BundleError` or `ConfigError`."""
        self.bundle = load_bundle(path)
        self.created_s = int(time.time())
        #: What requests may have run.
        self.rights = Rights(options.allowed_verifiers, trusted=False)
        self.tokenizer = load_tokenizer(self.bundle)
        self.engine = SlotEngine(
            self.bundle,
            threads=options.threads,
            batch_size=options.rows,
            memory_bytes=choose_kv_bytes(self.bundle, options) if options.kv_bytes is None else options.kv_bytes,
            max_len=options.context,
        )
        self.scheduler = Scheduler(self.engine, self.tokenizer, prefix_cache_bytes=options.prefix_cache_bytes)
        self.generation_config = read_json(path / "generation_config.json")
        self.template: ChatTemplate | None = None
        #: For a chat with tools, which some models have beside the other.
        self.tool_template: ChatTemplate | None = None
        if has_chat_template(path, self.tokenizer.config):
            # Both now: when a request comes the folder may hold another bundle.
            self.template = load_chat_template(path, self.tokenizer.config)
            self.tool_template = load_chat_template(path, self.tokenizer.config, tools=True)
        self.bundle.check_in_place()
        self._warm_up()
        self._prefix_path = None if options.prefix_folder is None else prefix_path(options.prefix_folder, self.bundle)
        if self._prefix_path is not None:
            shape = self.bundle.model
            load_prefixes(
                self.scheduler.cache,
                self._prefix_path,
                (2 * shape.num_layers, shape.num_kv_heads, shape.head_dim),
                np.dtype(self.bundle.kv_dtype),
            )
        if self.bundle.shared_scale:
            _log.warning(
                "%s: rounds all tokens of a step by one scale, so an answer may depend on its neighbours; a bundle "
                "exported anew does not",
                path,
            )
        self.runner = Runner(self.scheduler, max_waiting=options.max_waiting)
        self._grammars: Grammars | None = None
        self._grammars_lock = threading.Lock()
        self._speculate = options.speculate

    @property
    def name(self) -> str:
        """What requests call it."""
        return self.bundle.name

    def start(self) -> None:
        """Begin to answer."""
        self.runner.start()
        if self._speculate:
            # Nobody waits for it: until it is there, tokens come one by one.
            threading.Thread(target=self._open_checker, name="ryot-checker", daemon=True).start()

    def close(self) -> None:
        """End the runner and keep what is to be kept. Raises `ConfigError` where it cannot be written."""
        self.runner.stop()
        if self._prefix_path is not None:
            save_prefixes(self.scheduler.cache, self._prefix_path)

    @property
    def grammars(self) -> Grammars:
        """Forms that answers may have; raises `ConfigError` where there are none."""
        with self._grammars_lock:
            if self._grammars is None:
                self._grammars = Grammars(self.bundle, self.tokenizer)
            return self._grammars

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; those of an empty one are what begins a text. Raises `ConfigError` where there is none."""
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if ids:
            return ids
        if self.bundle.bos_token_id is None:
            raise ConfigError("is empty, and this model has no token that begins a text")
        return [self.bundle.bos_token_id]

    def token_text(self, token: int) -> str:
        """A token by itself, as logprobs show it."""
        data = self.tokenizer.token_bytes(token)
        return data.decode("utf-8", "replace") if data else self.tokenizer.token_name(token) or ""

    def _open_checker(self) -> None:
        try:
            self.engine.open_checker()
        except BundleError as error:
            _log.warning("tokens come one by one: %s", error)

    def _warm_up(self) -> None:
        # Two, since an engine prepares for the long run at its second prompt.
        for _ in range(2):
            run_all(self.scheduler, [Request(prompt_ids=[0], max_tokens=min(2, self.engine.max_len - 1))])
        self.scheduler.reset()


def choose_kv_bytes(bundle: Bundle, options: ModelOptions) -> int:
    """What all rows need at the whole context, or a share of the free memory; at least what one row needs."""
    value_bytes = np.dtype(bundle.kv_dtype).itemsize
    one = bundle.model.kv_cache_bytes(options.context or bundle.model.context_length, 1, value_bytes)
    return max(one, min(one * options.rows, int(KV_SHARE * _free_bytes())))


def _free_bytes() -> int:
    """What the machine has free, and what a container or a unit leaves of it."""
    room = read_group_room()
    try:
        lines = FREE_MEMORY.read_text().splitlines()
    except OSError:
        lines = []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), SOME_BYTES)
    return free if room is None else min(free, room)
