"""A bundle of a checkpoint that has a chat template, asked through its own `run.py`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from ryot.deploy.artifact import ExportOptions
from ryot.deploy.export import export_unscored
from ryot.edge.bundle import load_bundle
from ryot.edge.generate import generate
from ryot.edge.session import OnnxruntimeEngine
from ryot.edge.tokenizer import load_tokenizer
from ryot.models.sources.folder import open_folder

from .conftest import CONTEXT

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def test_the_template_goes_with_the_bundle_and_is_used(checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    prompts = np.zeros((1, CONTEXT), np.int64)
    path = export_unscored(open_folder(source), "fp32", tmp_path / "bundle", options=ExportOptions(), prompts=prompts)
    assert (path / "requirements.txt").read_text().splitlines()[-1] == "# for run.py --chat: jinja2>=3.1.6,<4"
    flags = ["--chat", "--prompt", "hi", "--max-new-tokens", "4", "--ignore-eos"]
    run = subprocess.run([sys.executable, path / "run.py", *flags], capture_output=True, encoding="utf-8", check=False)
    bundle = load_bundle(path)
    ids = load_tokenizer(bundle).encode("user: hi\n")
    text = "".join(generate(OnnxruntimeEngine(bundle), load_tokenizer(bundle), ids, max_new_tokens=4, ignore_eos=True))
    assert (run.returncode, run.stdout) == (0, text + "\n")
