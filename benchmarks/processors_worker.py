"""What one processor answers; run by processors.py. Needs a bundle, and nothing but what its requirements.txt lists.

python processors_worker.py FOLDER NAME       writes FOLDER/NAME.json and FOLDER/NAME.npz
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import numpy as np

#: Tokens of the prompt, and steps behind it; an emulator computes some ten million products a second.
STEPS = 24
TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "can't CAN'T we'Ll 3.14 1234567 \u0663\u0664\u2167\u00bd",
    "Gr\u00fc\u00dfe Gru\u0308\u00dfe \uac00 \u1100\u1161\u11a8",
    "日本語のテスト。\u3000\u0939\u093f\u0928\u094d\u0926\u0940 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "\U0001f642 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u200b\u00a0\u2028",
    "  \t\r\n\n   <|endoftext|>  x",
]


def main() -> None:
    work, name = Path(sys.argv[1]), sys.argv[2]
    bundles = sorted((work / "bundles").iterdir())
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(bundles[0] / "runtime"))
    import onnxruntime
    import tokenizers

    from ryot.edge.bundle import load_bundle
    from ryot.edge.engines import open_engine
    from ryot.edge.generate import check_golden
    from ryot.edge.tokenizer import load_tokenizer
    from ryot.errors import BundleError

    golden: dict[str, dict[str, int | str]] = {}
    logits = {}
    for folder in bundles:
        bundle = load_bundle(folder)
        golden[folder.name] = {}
        for engine in ("python", "capi"):
            opened = open_engine(bundle, engine=engine)
            try:
                golden[folder.name][engine] = check_golden(opened)
            except BundleError as error:
                golden[folder.name][engine] = f"differs ({str(error).rpartition(': ')[2]})"
        ids = bundle.prompts[0]
        opened.prefill([ids[:STEPS]])
        rows = [opened.logits[0].copy()]
        # Fixed tokens, so that one that differs leads nowhere else.
        for token in ids[STEPS : 2 * STEPS]:
            opened.next_token[0] = token
            opened.step()
            rows.append(opened.logits[0].copy())
        logits[folder.name] = np.stack(rows)
    tokenizer = load_tokenizer(load_bundle(bundles[0]))
    np.savez(work / f"{name}.npz", **logits)
    found = {
        "machine": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "golden": golden,
        "ids": {text: tokenizer.encode(text) for text in TEXTS},
    }
    (work / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
