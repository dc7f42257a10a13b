"""What `quality_speed.py` measures, as plain data that its processes share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Lengths in tokens; a short job measures the first ones, a long job the last ones."""

    prompt: int = 128
    long_prompt: int = 2048
    depths: tuple[int, int] = (32, 512)
    long_depth: int = 4096
    steps: int = 24
    """Tokens decoded at each depth."""
    warm_steps: int = 4
    cold_steps: int = 32
    """Tokens after the first, over which peak memory is taken."""
    window: int = 512
    """Context of llama-perplexity; half of it is scored."""
    windows: int = 16


#: What `--quick` measures: whether everything works, nothing to be quoted.
QUICK = Lengths(
    prompt=8,
    long_prompt=16,
    depths=(4, 8),
    long_depth=12,
    steps=2,
    warm_steps=1,
    cold_steps=2,
    window=32,
    windows=2,
)


def perplexity_command(plan: Mapping[str, Any], gguf: Path | str, text: Path) -> list[str]:
    """llama-perplexity on the first windows of a text, a window a batch; escapes in the text stay as they are."""
    quality, threads = plan["quality"], str(len(os.sched_getaffinity(0)))
    window = str(quality["context"])
    program = [str(Path(plan["llama_cpp"]) / "llama-perplexity"), "-m", str(gguf), "-f", str(text), "--no-escape"]
    return [*program, "-c", window, "-b", window, "-ub", window, "--chunks", str(quality["chunks"]), "-t", threads]
