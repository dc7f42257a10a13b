"""The parent's end of a `peer_worker.py` process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peer_worker import SPAWNED_VARIABLE

HERE = Path(__file__).parent
#: Libraries must not start threads of their own beside those that work.
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}


class WorkerError(Exception):
    """An engine that cannot be had, or failed."""


class Worker:
    """A process that holds one engine, pinned to its cores."""

    def __init__(self, *cores: int):
        environment = os.environ | ONE_THREAD | {SPAWNED_VARIABLE: repr(time.monotonic())}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "peer_worker.py"), ",".join(map(str, cores))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises `WorkerError` when there is none."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"its process ended with code {self._process.wait()}")
        answer = json.loads(line)
        if reason := answer.get("missing") or answer.get("error"):
            raise WorkerError(reason)
        return answer

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


def turn(prompts: Sequence[Sequence[int]], steps: int) -> dict[str, Any]:
    """The request to answer prompts, one per row, and to decode `steps` tokens behind them."""
    return {"do": "turn", "prompts": prompts, "steps": steps}
