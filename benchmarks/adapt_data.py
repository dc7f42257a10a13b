"""The texts of `adapt.py`: a command language that no model has seen, and some of the standard library's source."""

from __future__ import annotations

import random
from pathlib import Path

from ryot.train.corpus import cut_document, load_corpus

_VERBS = ("arm", "bleed", "couple", "dwell", "evict", "flux", "gate", "hoist", "latch", "mesh", "nudge", "purge")
_PARTS = ("vane", "spool", "ferrule", "gimbal", "rotor", "shunt", "baffle", "collet", "drogue", "manifold", "plenum")
_UNITS = {"kPa": (20, 900), "rpm": (100, 9000), "mdeg": (-900, 900), "mA": (1, 400), "ticks": (1, 64)}
_FAULTS = ("E17 stall", "E22 overrun", "E31 no echo", "W04 slack", "W09 drift")


def write_command_language(folder: Path, num_bytes: int, seed: int = 0) -> Path:
    """Sessions of a made-up machine console, one a file: prompts, commands with typed arguments, answers, faults.

    Its rules are fixed (a part's unit, which faults a verb can give, a checksum behind each answer), so that there is
    more to learn than words.
    """
    rng = random.Random(seed)
    rules = random.Random(1)
    unit_of = {part: rules.choice(list(_UNITS)) for part in _PARTS}
    faults_of = {verb: rules.sample(_FAULTS, 2) for verb in _VERBS}
    folder.mkdir(parents=True, exist_ok=True)
    written = number = 0
    while written < num_bytes:
        lines = [f"== session {rng.randrange(10_000):04d} operator {rng.choice('ABCDEFG')}{rng.randrange(10)} =="]
        for _ in range(rng.randrange(12, 40)):
            verb, part = rng.choice(_VERBS), rng.choice(_PARTS)
            index, unit = rng.randrange(1, 9), unit_of[part]
            value = rng.randrange(*_UNITS[unit])
            lines.append(f"{index}> {verb} {part}.{index} /{unit}={value} /hold={rng.randrange(1, 30)}s")
            if rng.random() < 0.2:
                lines.append(f"!! {rng.choice(faults_of[verb])} at {part}.{index}; retry after purge {part}.{index}")
            else:
                check = (value + 7 * index + len(part)) % 97
                lines.append(f"ok {part}.{index} {verb}ed to {value} {unit} #{check:02d}")
        text = "\n".join([*lines, "== end ==", ""])
        (folder / f"session-{number:05d}.log").write_text(text)
        written += len(text)
        number += 1
    return folder


def write_library_part(folder: Path, num_bytes: int) -> Path:
    """Blocks of the standard library's files, evenly spread over it, of about so many bytes: each split has some."""
    blocks = [block for document in load_corpus().documents for block in cut_document(document)]
    step = max(1, round(sum(len(b.text) for b in blocks) / num_bytes))
    folder.mkdir(parents=True, exist_ok=True)
    for block in blocks[::step]:
        (folder / block.name.replace("/", "-")).write_text(block.text)
    return folder
