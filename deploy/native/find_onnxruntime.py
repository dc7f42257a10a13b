"""Print the path of the installed onnxruntime's shared library, without importing it; nothing where there is none."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

spec = importlib.util.find_spec("onnxruntime")
for folder in spec.submodule_search_locations or [] if spec else []:
    found = sorted([*Path(folder).glob("capi/libonnxruntime.so.*"), *Path(folder).glob("capi/libonnxruntime.*.dylib")])
    if found:
        sys.stdout.write(f"{found[-1]}\n")
        break
