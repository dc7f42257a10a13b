"""The model card of a bundle, its README.md: written for who finds the folder on a device."""

from __future__ import annotations

from ryot.mapping import Unchecked

_CARD = """# {name}

A decoder language model of {num_parameters:,} parameters. It needs `onnxruntime`, `numpy` and `tokenizers`, no more.

    python -m venv .venv && .venv/bin/pip install -r requirements.txt
    .venv/bin/python run.py --prompt "def "
{chat}    .venv/bin/python run.py --verify

| | |
|---|---|
| variant, seed | {variant}, {seed} |
| precision | {precision} |
| architecture | {architecture}: {num_layers} layers, width {dim}, {num_heads} query, {num_kv_heads} key-value heads |
| vocabulary, context | {vocab_size} tokens, {context_length} tokens |
{quality}| checkpoint | sha256 {checkpoint_sha256:.16} |
| corpus | sha256 {corpus_sha256:.16} |

{files}
Greedy tokens are the same on every CPU up to the first one that the model is not sure of: `ryot_manifest.json` has
golden prompts with a margin for each token, and `run.py --verify` checks them together with every file's hash.

## Limits

{origin} What it writes may be wrong. Prompt and answer together hold {context_length} tokens.

## Privacy

`run.py` opens no connection and leaves no file behind. onnxruntime by itself sends usage data to its maker; `run.py`
switches that off (`ORT_DISABLE_TELEMETRY=1`) unless that variable is set already. A program of your own that loads
onnxruntime before this code has to set it itself.
"""

_CHAT = """    .venv/bin/python run.py --chat      # needs jinja2
"""
_TRAINED = """It was trained on one corpus and continues text of that kind; it was not taught to follow instructions."""
_IMPORTED = """It was exported from an existing model, whose own card says what it was trained on and its terms of use;
the corpus above is what its quality was measured on."""
_ONE_SESSION = """`fast.onnx` is the graph that `run.py` runs (the next token comes out); `model.onnx` is the same model
with the inputs and outputs that onnxruntime-genai expects. Both read their weights from `model.onnx.data`.
"""
_TWO_SESSIONS = """`prefill.onnx` runs the prompt and `decode.onnx` each further token; `model.onnx` is the same model
with the inputs and outputs that onnxruntime-genai expects. All read their weights from `model.onnx.data`.
"""


def render_card(manifest: Unchecked) -> str:
    """README.md from the manifest's values (its list of files is not needed)."""
    quality = manifest["quality"]
    rows = ""
    if quality:
        rows = (
            f"| held-out text | {quality['bpb']:.4f} bits per byte, {quality['bpb_ratio']:.4f} of fp32's "
            f"({quality['tokens']:,} tokens) |\n"
            f"| against fp32 | KL {quality['kl']:.5f} nats per token, same best token at {quality['top1']:.2%} |\n"
        )
    graphs = manifest["graphs"]
    return _CARD.format(
        **manifest["model"],
        name=manifest["name"],
        variant=manifest["variant"] or "unnamed",
        seed=manifest["seed"],
        precision=manifest["precision"],
        chat=_CHAT if manifest["chat_template"] else "",
        quality=rows,
        # Only what a recipe trained has one.
        origin=_TRAINED if manifest["config"] else _IMPORTED,
        checkpoint_sha256=manifest["provenance"]["checkpoint_sha256"],
        corpus_sha256=manifest["provenance"]["corpus_sha256"] or "unknown",
        files=_ONE_SESSION if graphs["prefill"] == graphs["decode"] else _TWO_SESSIONS,
    )
