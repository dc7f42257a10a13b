"""The independent oracle: transformers' own logits for a checkpoint, computed in a process of its own.

The parity gate compares graphs with our torch decoder, and both come from one reading of the checkpoint, so a fault in
that reading would pass it. Where transformers is installed it reads the same folder by itself.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ryot.errors import QualityError
from ryot.models.tensors import FloatArray

#: How many times the tolerance of the parity gate: transformers makes its rotary angles in float32, which we do not.
ANGLE_SAFETY = 4
TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class OracleResult:
    """What the checkpoint was held against, and what was found."""

    oracle: str
    """`transformers 5.1.0`, or empty where there was none."""
    reason: str = ""
    """Why there was none."""
    max_difference: float = 0.0
    """Largest difference of a logit."""
    tolerance: float = 0.0
    """What it may be."""
    tokens_compared: int = 0
    """Positions whose most likely token is sure enough that it has to be the same, and is."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_transformers(
    folder: Path, ids_BT: NDArray[np.int64], expected_BTV: FloatArray, tolerance: float, scratch: Path
) -> OracleResult:
    """Compare transformers' float32 logits of the checkpoint in `folder` with ours.

    Raises `QualityError` when they differ by more than a few times `tolerance`. A transformers that is not installed,
    or cannot load this checkpoint, is no error: the result says so.
    """
    if importlib.util.find_spec("transformers") is None:
        return OracleResult(oracle="", reason="transformers is not installed")
    np.save(scratch / "ids.npy", ids_BT)
    command = [sys.executable, "-m", "ryot.deploy.oracle", str(folder.resolve()), str(scratch)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=offline)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return OracleResult(oracle="", reason=f"transformers cannot run it: {lines[-1][:200]}")
    name = json.loads((scratch / "oracle.json").read_text())["oracle"]
    found_BTV = np.load(scratch / "logits.npy", mmap_mode="r")
    tolerance *= ANGLE_SAFETY
    difference = float(np.abs(found_BTV - expected_BTV).max())
    if not difference <= tolerance:
        raise QualityError(
            f"oracle: logits of {folder} differ from {name} by {difference:.3g}, expected at most {tolerance:.3g}",
            hint="this checkpoint is read wrongly here; report it with its config.json",
        )
    best = np.partition(expected_BTV, -2, axis=-1)[..., -2:]
    sure = best[..., 1] - best[..., 0] > 2 * tolerance
    # Logits as close as this order two tokens further apart in the same way, so the sure ones are equal.
    return OracleResult(oracle=name, max_difference=difference, tolerance=tolerance, tokens_compared=int(sure.sum()))


def _run(folder: Path, scratch: Path) -> None:
    """Write transformers' logits for `ids.npy` beside it, and its version."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, use_safetensors=True
    )
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(np.load(scratch / "ids.npy"))).logits
    np.save(scratch / "logits.npy", logits.numpy())
    (scratch / "oracle.json").write_text(json.dumps({"oracle": f"transformers {transformers.__version__}"}))


if __name__ == "__main__":
    _run(Path(sys.argv[1]), Path(sys.argv[2]))
