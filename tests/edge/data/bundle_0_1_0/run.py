"""Runs this bundle with onnxruntime, numpy and tokenizers alone; the code is in `runtime/`. See `run.py -h`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    # The bundle's own copy comes before any ryot that may be installed, and leaves no files in the bundle.
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(HERE / "runtime"))
    from ryot.edge.cli import run

    sys.exit(run(HERE))
