"""Runs this bundle with onnxruntime, numpy and tokenizers alone; `runtime/` holds the code that does it."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    sys.path.insert(0, str(HERE / "runtime"))
    from ryot.edge.bundle import load_bundle

    load_bundle(HERE)
