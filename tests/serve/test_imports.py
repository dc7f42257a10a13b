"""A server is small: what it loads has no part of training in it."""

from __future__ import annotations

import json
import subprocess
import sys


def test_serving_loads_neither_torch_nor_ray() -> None:
    script = (
        "import importlib, json, pkgutil, sys, ryot.serve\n"
        "for m in pkgutil.iter_modules(ryot.serve.__path__): importlib.import_module(f'ryot.serve.{m.name}')\n"
        "import ryot.cli.serve, ryot.cli.batch\n"
        "print(json.dumps([name.split('.')[0] for name in sys.modules]))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(run.stdout))
    assert {"starlette", "uvicorn", "onnxruntime"} <= loaded
    assert not {"torch", "ray", "onnx", "transformers"} & loaded
