"""Packaged recipes at a size of a user's own that trains in a second, as options of `cluster-run`."""

from __future__ import annotations

from pathlib import Path

from ryot.config import find_named
from tests.conftest import CONTEXT, VOCAB_SIZE

#: Without a word on what only recipes decide.
PRESET = f"""
summary = "as small as the fused kernels take at half its width"
[model]
vocab_size = {VOCAB_SIZE}
dim = 128
num_layers = 2
num_heads = 4
ff_dim = 128
max_seq_len = {CONTEXT}
[train]
batch_size = 4
tokens = 7680
warmup_fraction = 0.1
"""
#: The preset's budget, of which a quick run trains for a twentieth.
QUICK = ("--quick", "--tokens", str(7680 * 20))


def tiny_recipes(folder: Path, *names: str) -> list[str]:
    """Options for the preset and these recipes, written to `folder`."""
    (folder / "tiny.toml").write_text(PRESET)
    for name in names:
        # The recipe's own budget and batch are for the reference size; the preset's are taken instead.
        lines = find_named("variants", name).read_text().splitlines()
        drop = ("tokens =", "batch_size =", "warmup_fraction =", "tune =")
        (folder / f"{name}.toml").write_text("\n".join(line for line in lines if not line.startswith(drop)) + "\n")
    variants = ",".join(str(folder / f"{name}.toml") for name in names)
    return ["--preset", str(folder / "tiny.toml"), "--variants", variants]
