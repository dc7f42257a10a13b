"""The independent oracle: transformers' own logits, token ids and texts for a checkpoint, in a process of its own.

The parity gate compares graphs with our torch decoder, and both come from one reading of the checkpoint, so a fault in
that reading would pass it. Where transformers is installed it reads the checkpoint by itself.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ryot.errors import OracleError
from ryot.models.sources.checkpoint import Checkpoint
from ryot.models.sources.write_hf import write_hf
from ryot.train.model import Decoder

log = logging.getLogger(__name__)

#: How many times the tolerance of the parity gate: transformers makes its rotary angles in float32, which we do not.
ANGLE_SAFETY = 4
TIMEOUT_S = 1200
#: Differences in texts that are listed; the rest is only counted.
SHOWN_DIFFERENCES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class OracleResult:
    """What the checkpoint was held against, and what was found."""

    oracle: str = ""
    """`transformers 5.1.0`, or empty where there was none."""
    reason: str = ""
    """Why there was none."""
    converted: bool = False
    """Whether it read a Hugging Face folder that was made here of another kind of file."""
    max_difference: float = 0.0
    """Largest difference of a logit."""
    tolerance: float = 0.0
    """What it may be."""
    tokens_compared: int = 0
    """Positions whose most likely token is sure enough that it has to be the same, and is."""
    num_text_differences: int = 0
    """Hard strings whose ids or text are others, and chats that are."""
    text_differences: tuple[str, ...] = ()
    """The first of them, in words."""


NO_ORACLE = OracleResult(reason="not asked")


@dataclass(frozen=True, kw_only=True, slots=True)
class OracleAnswer:
    """What transformers said of a checkpoint, in files of the scratch folder."""

    reason: str = ""
    """Why it said nothing; empty where it did."""
    converted: bool = False
    """Whether it read a Hugging Face folder that was made here of another kind of file."""


def ask_oracle(checkpoint: Checkpoint, ids_BT: NDArray[np.int64], scratch: Path) -> OracleAnswer:
    """Have transformers compute its float32 logits of a checkpoint for these ids, and its texts.

    A transformers that is not installed, or cannot load this checkpoint, is no error: the answer says so.
    """
    if importlib.util.find_spec("transformers") is None:
        return OracleAnswer(reason="transformers is not installed")
    # Where it has to be converted, transformers judges the config, the names and the shapes, not the dequantization.
    # A hub's snapshot is written as a folder too, since only its files were asked for.
    converted = checkpoint.kind != "hf" or not Path(checkpoint.where).is_dir()
    folder = scratch / "oracle" if converted else Path(checkpoint.where)
    if converted:
        write_hf(checkpoint, folder)
    np.save(scratch / "ids.npy", ids_BT)
    command = [sys.executable, "-m", "ryot.deploy.oracle", str(folder.resolve()), str(scratch)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=offline)
    if converted:
        shutil.rmtree(folder)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return OracleAnswer(reason=f"transformers cannot run it: {lines[-1][:200]}")
    return OracleAnswer(converted=converted)


def check_oracle(
    answer: OracleAnswer,
    checkpoint: Checkpoint,
    model: Decoder,
    ids_BT: NDArray[np.int64],
    tolerance: float,
    scratch: Path,
) -> OracleResult:
    """Compare what transformers answered with the logits of `model` for the same ids, and its texts with ours.

    Raises `OracleError` when logits differ by more than a few times `tolerance`; a difference in texts is logged as a
    warning.
    """
    if answer.reason:
        return OracleResult(reason=answer.reason)
    said = json.loads((scratch / "oracle.json").read_text())
    found_BTV = np.load(scratch / "logits.npy")
    with torch.no_grad():
        expected_BTV = model(torch.from_numpy(ids_BT)).numpy()
    tolerance *= ANGLE_SAFETY
    difference = float(np.abs(found_BTV - expected_BTV).max())
    if not difference <= tolerance:
        raise OracleError(
            f"oracle: logits of {checkpoint.where} differ from {said['oracle']} by {difference:.3g}, expected at most "
            f"{tolerance:.3g}",
            hint="this checkpoint is read wrongly here; report it with its config.json",
        )
    best = np.partition(expected_BTV, -2, axis=-1)[..., -2:]
    # Logits as close as this order two tokens further apart in the same way, so the sure ones are equal.
    sure = best[..., 1] - best[..., 0] > 2 * tolerance
    for text in said["texts"][:SHOWN_DIFFERENCES]:
        log.warning("%s: differs from %s: %s", checkpoint.where, said["oracle"], text)
    return OracleResult(
        oracle=said["oracle"],
        converted=answer.converted,
        max_difference=difference,
        tolerance=tolerance,
        tokens_compared=int(sure.sum()),
        num_text_differences=len(said["texts"]),
        text_differences=tuple(said["texts"][:SHOWN_DIFFERENCES]),
    )


def _run(folder: Path, scratch: Path) -> None:
    """Write transformers' logits for `ids.npy` beside it, its version, and the texts that differ from ours."""
    import transformers

    from ryot.deploy.text_check import compare_text

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, use_safetensors=True
    )
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(np.load(scratch / "ids.npy"))).logits
    np.save(scratch / "logits.npy", logits.numpy())
    said = {"oracle": f"transformers {transformers.__version__}", "texts": compare_text(folder)}
    (scratch / "oracle.json").write_text(json.dumps(said))


if __name__ == "__main__":
    _run(Path(sys.argv[1]), Path(sys.argv[2]))
