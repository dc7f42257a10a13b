"""The writing side of a bundle: everything in the folder but the graphs, and its appearance in one piece.

Built twice from the same inputs the folder is byte-identical: no clock time, no absolute path and no random number
goes into any file but `record.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ryot.atomic import atomic_folder, open_to_all
from ryot.deploy.precisions import STANDARD_GRAPH, graph_files
from ryot.edge import bundle as edge_bundle
from ryot.edge.bundle import TOKENIZER_NAME
from ryot.edge.chat import has_chat_template
from ryot.edge.tokenizer_config import read_tokenizer_config
from ryot.edge.trust import UNLISTED
from ryot.errors import ExportError
from ryot.models.sources.checkpoint import Checkpoint
from ryot.models.spec import DecoderSpec
from ryot.models.token_ids import TokenIds

#: What a checkpoint and a bundle have in common; the first is required.
CHECKPOINT_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends well, and vanishes otherwise.

    A folder that is already at `target` is replaced if it is a bundle; anything else raises `ExportError`.
    """
    _check_replaceable(target)
    try:
        with atomic_folder(target, replace=True) as partial:
            yield partial
            open_to_all(partial)
            _check_replaceable(target)  # again: making it may have taken minutes
    except OSError as error:
        raise ExportError(f"{target}: cannot be written ({error.strerror or error})") from error


def _check_replaceable(target: Path) -> None:
    is_bundle = (target / edge_bundle.MANIFEST_NAME).is_file()
    if target.exists() and not is_bundle and (target.is_file() or any(target.iterdir())):
        raise ExportError(f"{target}: exists and is no bundle; it is left alone", hint="give an empty or new folder")


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Sorted, indented JSON with a newline at the end."""
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def write_checkpoint_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint's configs and its tokenizer's files. Raises `ExportError` when it has no tokenizer."""
    if TOKENIZER_NAME not in checkpoint.files:
        raise ExportError(f"checkpoint {checkpoint.where}: {TOKENIZER_NAME} is missing")
    write_json(folder / "config.json", checkpoint.config)
    if checkpoint.generation_config:
        write_json(folder / "generation_config.json", checkpoint.generation_config)
    for name, content in checkpoint.files.items():
        (folder / name).write_bytes(content)


def write_requirements(folder: Path, onnxruntime_min: str) -> None:
    """`requirements.txt`: all that a device needs, and as a comment what a chat needs where there is a template."""
    lines = [f"onnxruntime>={onnxruntime_min},<2", "numpy>=2.0,<3", "tokenizers>=0.21,<1"]
    if has_chat_template(folder, read_tokenizer_config(folder)):
        lines.append("# for run.py --chat: jinja2>=3.1.6,<4")
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_genai_config(folder: Path, spec: DecoderSpec, token_ids: TokenIds, *, shared_buffer: bool) -> None:
    """`genai_config.json`, with which onnxruntime-genai runs the standard graph.

    Its type `llama` feeds no positions, `decoder` feeds what the graph has: learned positions.
    """
    inputs = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    if spec.learned_positions:
        inputs["position_ids"] = "position_ids"
    decoder = {
        "filename": STANDARD_GRAPH,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "head_size": spec.head_dim,
        "hidden_size": spec.dim,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "num_hidden_layers": spec.num_layers,
        "inputs": inputs,
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": "decoder" if spec.learned_positions else "llama",
        "context_length": spec.max_seq_len,
        "vocab_size": spec.vocab_size,
        "decoder": decoder,
        **_genai_token_ids(token_ids),
    }
    search = {"max_length": spec.max_seq_len, "do_sample": False, "past_present_share_buffer": shared_buffer}
    write_json(folder / "genai_config.json", {"model": model, "search": search})


def _genai_token_ids(ids: TokenIds) -> dict[str, object]:
    """The ids as onnxruntime-genai wants them: it needs a pad id, for which an end of text serves."""
    named: dict[str, object] = {} if ids.bos is None else {"bos_token_id": ids.bos}
    if ids.eos:
        named["eos_token_id"] = ids.eos[0] if len(ids.eos) == 1 else list(ids.eos)
    pad = ids.pad if ids.pad is not None else next(iter(ids.eos), ids.bos)
    return named if pad is None else named | {"pad_token_id": pad}


def write_manifest(folder: Path, values: Mapping[str, object]) -> None:
    """`ryot_manifest.json` with the size and sha256 of every other file of the folder. Written last."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": edge_bundle.hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in UNLISTED
    }
    write_json(folder / edge_bundle.MANIFEST_NAME, {**values, "schema": edge_bundle.SCHEMA, "files": files})


def graph_entries(
    spec: DecoderSpec, precision: str, kv_dtype: str, *, prompt_by_row: bool = False
) -> dict[str, object]:
    """What the manifest says about the model and how its graphs are fed."""
    model = {
        "architecture": spec.family,
        "vocab_size": spec.vocab_size,
        "dim": spec.dim,
        "num_layers": spec.num_layers,
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "ff_dim": spec.ff_dim,
        "context_length": spec.max_seq_len,
        "num_parameters": spec.num_parameters,
        "tie_embeddings": spec.tie_embeddings,
    }
    return {
        "model": model,
        "precision": precision,
        "graphs": graph_files(precision),
        "position_ids": spec.learned_positions,
        "kv_dtype": kv_dtype,
        "prompt_by_row": prompt_by_row,
        "shared_scale": False,
        "prefill_takes_past": True,
    }


def finish_bundle(artifact: Path, target: Path, record: Mapping[str, object]) -> Path:
    """Copy an artifact to `target` as the final bundle, with `record.json` beside its files.

    Raises `BundleError` when the artifact's files are not those of its manifest.
    """
    edge_bundle.load_bundle(artifact)
    with staged_folder(target) as stage:
        shutil.copytree(artifact, stage, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        write_json(stage / edge_bundle.RECORD_NAME, record)
    return target
