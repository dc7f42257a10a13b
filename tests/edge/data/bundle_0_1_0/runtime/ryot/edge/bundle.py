"""The bundle on disk, as typed data: its manifest, and the check that its files are the ones it was built with.

A bundle is a folder. `ryot_manifest.json` names every other file with its size and sha256, describes the model and
its graphs, and carries golden prompts that say what the model must answer. `record.json`, where present, holds
what was measured; it is the one file that the manifest does not name. The writing side is `ryot/deploy/bundle.py`.

A device starts cold with this module, so it imports little: a `dataclass` would bring in `inspect` and what that needs,
a third of the time until the first token of a small model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ryot.errors import BundleError

#: The newest manifest layout that this code reads, and the one that is written.
SCHEMA = 1
MANIFEST_NAME = "ryot_manifest.json"
RECORD_NAME = "record.json"
#: One external data file holds the weights of all graphs.
DATA_NAME = "model.onnx.data"
TOKENIZER_NAME = "tokenizer.json"
#: Roles in the manifest's `graphs`; `prefill` and `decode` name the same file when one session does both.
GRAPH_ROLES = ("standard", "prefill", "decode")
KV_DTYPES = ("float32", "int8")
#: Up to here hashing with Python's own slower sha256 costs less than loading OpenSSL: 5 MB and some 5 ms.
SMALL_FILE_BYTES = 4_000_000
REBUILD_HINT = "export it again with 'ryot-deploy export', or copy it to the device again"


class ModelShape(NamedTuple):
    """The decoder's sizes, as the manifest's `model` table has them."""

    architecture: str
    """`opt` or `llama`."""
    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ff_dim: int
    context_length: int
    """Tokens that prompt and answer may have together."""
    num_parameters: int
    tie_embeddings: bool

    def kv_cache_bytes(self, length: int, batch_size: int = 1, value_bytes: int = 4) -> int:
        """Bytes of the key and value buffers of `batch_size` sequences of `length` tokens."""
        return 2 * self.num_layers * batch_size * self.num_kv_heads * length * self.head_dim * value_bytes


class FileEntry(NamedTuple):
    """What the manifest says about one file."""

    sha256: str
    bytes: int


class GoldenPrompt(NamedTuple):
    """A prompt with the greedy tokens of the reference and, for each, the margin between its two best logits."""

    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    margins: tuple[float, ...]


class Bundle(NamedTuple):
    """A bundle whose manifest was read; `verified` says whether every file was hashed."""

    path: Path
    name: str
    variant: str
    seed: int
    precision: str
    model: ModelShape
    graphs: Mapping[str, str]
    """File of each role in `GRAPH_ROLES`."""
    position_ids: bool
    """Whether the graphs take `position_ids`."""
    kv_dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int
    onnxruntime_min: str
    files: Mapping[str, FileEntry]
    golden: tuple[GoldenPrompt, ...]
    tolerance: float
    """Margin below which the reference's own choice of token may differ on another CPU."""
    prompts: tuple[tuple[int, ...], ...]
    """Held-out prompts of the context's length, for measuring."""
    manifest: Mapping[str, Any]
    """The whole manifest: quantization, quality, provenance, config, opset."""
    verified: bool

    @property
    def size_bytes(self) -> int:
        """Bytes of all files that the manifest names."""
        return sum(entry.bytes for entry in self.files.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that the graphs read."""
        return sum(entry.bytes for name, entry in self.files.items() if name.endswith(".data"))

    @property
    def one_session(self) -> bool:
        """Whether prefill and decode are the same graph."""
        return self.graphs["prefill"] == self.graphs["decode"]

    def check_graph_files(self, *roles: str) -> None:
        """Hash the graphs of `roles` and the weights they read, unless all files were hashed when loading.

        Raises `BundleError` for a file that differs from the manifest.
        """
        if self.verified:
            return
        names = {self.graphs[role] for role in roles} | {name for name in self.files if name.endswith(".data")}
        for name in sorted(names):
            _check_hash(self.path, name, self.files[name])


def load_bundle(path: str | Path, *, verify: bool = True) -> Bundle:
    """The bundle in the folder `path`; with `verify` every file is hashed, else only its presence and size are checked.

    Raises `BundleError` for a missing, truncated or changed file, a malformed manifest or a newer schema.
    """
    root = Path(path)
    manifest = _read_manifest(root)
    try:
        bundle = _build(root, manifest, verified=verify)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"bundle manifest {root / MANIFEST_NAME}: {reason}", hint=REBUILD_HINT) from error
    for name, entry in bundle.files.items():
        _check_size(root, name, entry)
        if verify:
            _check_hash(root, name, entry)
    return bundle


def check_onnxruntime(installed: str, required: str) -> None:
    """Raise `BundleError` when onnxruntime `installed` is older than `required`; versions are compared by number."""
    if _version_tuple(installed) < _version_tuple(required):
        raise BundleError(
            f"onnxruntime {installed} is too old for this bundle, which needs {required} or later",
            hint="install what the bundle's requirements.txt lists",
        )


def hash_file(path: Path) -> str:
    """sha256 of the file's bytes, in hex."""
    if path.stat().st_size <= SMALL_FILE_BYTES and (sha256 := _builtin_sha256()):
        return str(sha256(path.read_bytes()).hexdigest())
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _builtin_sha256() -> Any:
    """Python's own implementation, None where it was built without; `hashlib` would load OpenSSL."""
    for name in ("_sha2", "_sha256"):  # since 3.12, and before
        try:
            return __import__(name).sha256
        except ImportError:
            continue
    return None


def _version_tuple(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"{root}: not a bundle, it has no {MANIFEST_NAME}") from error
    except NotADirectoryError as error:
        raise BundleError(f"{root}: not a bundle, it is a file; give the folder that holds {MANIFEST_NAME}") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise BundleError(f"{path}: not valid JSON, perhaps cut short ({error})", hint=REBUILD_HINT) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema"), int):
        raise BundleError(f"{path}: has no schema number", hint=REBUILD_HINT)
    if manifest["schema"] > SCHEMA:
        raise BundleError(
            f"{path}: schema {manifest['schema']} is newer than {SCHEMA}, the newest that this ryot reads",
            hint="use the bundle's own run.py, or a newer ryot",
        )
    return manifest


def _build(root: Path, manifest: Mapping[str, Any], *, verified: bool) -> Bundle:
    shape = manifest["model"]
    kinds = dict.fromkeys(ModelShape._fields, "int") | {"architecture": "str", "tie_embeddings": "bool"}
    model = ModelShape(**{name: _typed(shape[name], kind, f"model.{name}") for name, kind in kinds.items()})
    files = {
        name: FileEntry(sha256=_typed(f["sha256"], "str", name), bytes=_typed(f["bytes"], "int", name))
        for name, f in manifest["files"].items()
    }
    for name in files:
        # A name that climbs out of the folder would make the check read, and a copy write, somewhere else.
        if name.startswith("/") or ".." in Path(name).parts:
            raise ValueError(f"files: {name!r} is not a path inside the bundle")
    graphs = {role: manifest["graphs"][role] for role in GRAPH_ROLES}
    for role, name in graphs.items():
        if name not in files:
            raise ValueError(f"graphs.{role}: {name!r} is not among files")
    if manifest["kv_dtype"] not in KV_DTYPES:
        raise ValueError(f"kv_dtype: got {manifest['kv_dtype']!r}, expected one of {', '.join(KV_DTYPES)}")
    return Bundle(
        path=root,
        name=_typed(manifest["name"], "str", "name"),
        variant=_typed(manifest["variant"], "str", "variant"),
        seed=_typed(manifest["seed"], "int", "seed"),
        precision=_typed(manifest["precision"], "str", "precision"),
        model=model,
        graphs=graphs,
        position_ids=_typed(manifest["position_ids"], "bool", "position_ids"),
        kv_dtype=manifest["kv_dtype"],
        eos_token_ids=_ids(manifest["eos_token_ids"]),
        bos_token_id=_typed(manifest["bos_token_id"], "int", "bos_token_id"),
        onnxruntime_min=_typed(manifest["onnxruntime_min"], "str", "onnxruntime_min"),
        files=files,
        golden=tuple(
            GoldenPrompt(ids=_ids(g["ids"]), tokens=_ids(g["tokens"]), margins=tuple(float(m) for m in g["margins"]))
            for g in manifest["golden"]
        ),
        tolerance=float(manifest["tolerance"]),
        prompts=tuple(_ids(p) for p in manifest["prompts"]),
        manifest=manifest,
        verified=verified,
    )


def _typed(value: Any, kind: str, where: str) -> Any:
    expected = {"int": int, "str": str, "bool": bool}[kind]
    if type(value) is not expected:
        raise ValueError(f"{where}: got {value!r}, expected {kind}")
    return value


def _ids(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


def _check_size(root: Path, name: str, entry: FileEntry) -> None:
    try:
        size = (root / name).stat().st_size
    except OSError as error:
        raise BundleError(f"bundle {root}: {name} is missing", hint=REBUILD_HINT) from error
    if size != entry.bytes:
        word = "cut short" if size < entry.bytes else "changed"
        raise BundleError(
            f"bundle {root}: {name} is {word}: it has {size} bytes, the manifest says {entry.bytes}", hint=REBUILD_HINT
        )


def _check_hash(root: Path, name: str, entry: FileEntry) -> None:
    try:
        found = hash_file(root / name)
    except OSError as error:
        raise BundleError(f"bundle {root}: {name} cannot be read ({error.strerror})") from error
    if found != entry.sha256:
        raise BundleError(
            f"bundle manifest: sha256 of {name} is {found[:12]}…, expected {entry.sha256[:12]}…", hint=REBUILD_HINT
        )
