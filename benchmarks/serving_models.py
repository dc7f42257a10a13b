"""Makes what `serving.py` compares: for each model our bundles and llama.cpp's files, from the same weights.

    python benchmarks/serving_models.py FOLDER M|SmolLM2 LLAMA_CPP_DIR [SOURCE.gguf]

M has 33.6 M random parameters and a tokenizer trained on the standard library's source: random weights have the speed
of trained ones and none of their quality. What is there is not made again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from peer_models import SIZES, draw_state

from ryot.deploy.export import FLOAT_CACHE, ExportOptions, export_unscored
from ryot.deploy.precisions import STANDARD_GRAPH
from ryot.deploy.quantize import CacheFormat, observe_kv_scales
from ryot.deploy.settings import ExportSettings
from ryot.deploy.standard import StandardGraph
from ryot.edge.bundle import MANIFEST_NAME
from ryot.models.sources.folder import open_folder
from ryot.train.checkpoint import save_checkpoint
from ryot.train.corpus import load_corpus
from ryot.train.tokenizer import train_tokenizer

#: Tokens of a prompt and its answer: a prompt of 2,000 fits, with room.
CONTEXT = 4096
#: The first one stands for ours where only our server is looked at.
BUNDLES = {
    "M": (("int8", "int8"), ("int8-dyn", "int8"), ("int8-dyn", "float32"), ("int4", "float32"), ("int4", "int8")),
    "SmolLM2": (("int8-dyn", "float32"), ("int8-dyn", "int8"), ("int8", "float32"), ("int4", "float32")),
}
#: The bundle that onnxruntime-genai runs too.
GENAI_PRECISION = "int4"
LLAMA_TYPES = ("Q8_0", "Q4_0")
#: Text that BPE is learned from; 8192 tokens need no more.
TOKENIZER_TEXTS = 400
#: Blocks for M, what `tune` chooses where the figures come from; those of SmolLM2 are what its export chooses.
M_SETTINGS = ExportSettings(int8_block_size=128, int4_block_size=128)
RYOT = [sys.executable, "-c", "from ryot.cli.main import run; run()"]


def main() -> None:
    folder, name, llama = Path(sys.argv[1]) / sys.argv[2], sys.argv[2], Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(sys.argv[4]) if name == "SmolLM2" else _write_m(folder / "checkpoint")
    bundles = {_title(p, kv): folder / "bundles" / _title(p, kv).replace(" ", "-") for p, kv in BUNDLES[name]}
    missing = [(p, kv) for p, kv in BUNDLES[name] if not (bundles[_title(p, kv)] / MANIFEST_NAME).exists()]
    for precision, kv in missing:
        target = bundles[_title(precision, kv)]
        if name == "M":
            _export_m(source, folder, precision, kv, target)
            continue
        partial = folder / "partial-bundles"
        shutil.rmtree(partial, ignore_errors=True)
        command = [*RYOT, "export", str(source), "--precisions", precision, "--kv-cache", kv]
        subprocess.run([*command, "--context", str(CONTEXT), "-o", str(partial)], check=True)
        target.parent.mkdir(exist_ok=True)
        (partial / precision).replace(target)
    f16 = folder / "F16.gguf"
    if not f16.exists():
        subprocess.run([*RYOT, "export", str(source), "--to", "gguf", "-o", str(f16)], check=True)
    for kind in LLAMA_TYPES:
        target = folder / f"{kind}.gguf"
        if not target.exists():
            partial = folder / f"partial-{kind}.gguf"
            subprocess.run([llama / "llama-quantize", f16, partial, kind], check=True, stdout=subprocess.DEVNULL)
            partial.replace(target)
    made = {
        "bundles": {title: str(path) for title, path in bundles.items()},
        "genai_of": GENAI_PRECISION,
        "gguf": {kind: str(folder / f"{kind}.gguf") for kind in LLAMA_TYPES},
    }
    (folder / "models.json").write_text(json.dumps(made, indent=1) + "\n")


def _title(precision: str, kv: str) -> str:
    return f"{precision} kv8" if kv == "int8" else precision


def _export_m(source: Path, folder: Path, precision: str, kv: str, target: Path) -> None:
    """A bundle without scores: random weights have none."""
    prompts = np.random.default_rng(7).integers(1, SIZES["M"].vocab_size, (4, 512))
    settings, cache = M_SETTINGS, FLOAT_CACHE
    if kv == "int8":
        settings = dataclasses.replace(M_SETTINGS, kv_dtype="int8")
        if not (fp32 := folder / "fp32").exists():
            options = ExportOptions(settings=M_SETTINGS)
            export_unscored(open_folder(source), "fp32", fp32, options=options, prompts=prompts[:1, :128])
        scales = observe_kv_scales(StandardGraph(fp32 / STANDARD_GRAPH), prompts)
        cache = CacheFormat(scales=scales.per_tensor(), record={"method": "per-tensor"})
    options = ExportOptions(settings=settings)
    export_unscored(open_folder(source), precision, target, options=options, prompts=prompts[:1, :128], cache=cache)


def _write_m(checkpoint: Path) -> Path:
    """The checkpoint of M: `peer_models.py`'s weights with a longer context and a tokenizer that reads text."""
    if checkpoint.exists():
        return checkpoint
    torch.set_num_threads(1)
    spec = dataclasses.replace(SIZES["M"], max_seq_len=CONTEXT)
    tokenizer = train_tokenizer(load_corpus().texts("train")[:TOKENIZER_TEXTS], spec.vocab_size)
    partial = checkpoint.with_name(f"partial-{os.getpid()}")
    save_checkpoint(partial, spec=spec, state=draw_state(spec), tokenizer_json=tokenizer.to_str().encode())
    partial.replace(checkpoint)
    return checkpoint


if __name__ == "__main__":
    main()
