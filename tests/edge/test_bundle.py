"""Reading bundles, and every way in which a bundle can be damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ryot.edge.bundle import check_onnxruntime, load_bundle
from ryot.edge.session import OnnxruntimeEngine
from ryot.errors import BundleError

from .tiny_bundle import write_manifest


@pytest.fixture
def copy(llama_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_path, tmp_path / "copy"))


def change_manifest(path: Path, **fields: object) -> None:
    file = path / "ryot_manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_whole_bundle_is_read(llama_path: Path) -> None:
    bundle = load_bundle(llama_path)
    assert bundle.model.context_length == 64
    assert bundle.one_session
    assert bundle.size_bytes == sum(f.stat().st_size for f in llama_path.iterdir() if f.name != "ryot_manifest.json")
    assert bundle.model.kv_cache_bytes(64) == 2 * 2 * 2 * 64 * 32 * 4


def test_tampered_weights_are_refused(copy: Path) -> None:
    flip_a_byte(copy / "model.onnx.data")
    with pytest.raises(BundleError, match=r"sha256 of model.onnx.data is [0-9a-f]{12}…, expected [0-9a-f]{12}…"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["model.onnx.data", "fast.onnx"])
def test_a_graph_never_runs_with_changed_files_even_where_loading_did_not_hash(copy: Path, name: str) -> None:
    bundle = load_bundle(copy, verify=False)
    flip_a_byte(copy / name)
    with pytest.raises(BundleError, match=f"sha256 of {name}"):
        OnnxruntimeEngine(bundle)


def test_a_file_cut_short_is_named(copy: Path) -> None:
    file = copy / "model.onnx.data"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(BundleError, match=f"model.onnx.data is cut short: it has {size - 10} bytes"):
        load_bundle(copy, verify=False)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer.json is missing"):
        load_bundle(copy, verify=False)


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"not a bundle, it has no ryot_manifest.json"):
        load_bundle(tmp_path)
    with pytest.raises(BundleError, match=r"not a bundle, it has no ryot_manifest.json"):
        load_bundle(tmp_path / "nowhere")


def test_a_manifest_cut_short_is_refused(copy: Path) -> None:
    file = copy / "ryot_manifest.json"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(BundleError, match="not valid JSON, perhaps cut short"):
        load_bundle(copy)


def test_a_newer_schema_is_refused(copy: Path) -> None:
    change_manifest(copy, schema=2)
    with pytest.raises(BundleError, match="schema 2 is newer than 1"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"graphs": {"standard": "a.onnx", "prefill": "a.onnx", "decode": "a.onnx"}}, "'a.onnx' is not among files"),
        ({"graphs": {"standard": "model.onnx"}}, "'prefill' is missing"),
        ({"kv_dtype": "int3"}, "kv_dtype: got 'int3'"),
        ({"seed": "x"}, "seed: got 'x', expected int"),
        ({"files": {"../x": {"sha256": "", "bytes": 0}}}, "not a path inside the bundle"),
        ({"model": {}}, "'architecture' is missing"),
        ({"golden": [3]}, "not subscriptable"),
    ],
)
def test_a_malformed_manifest_is_refused(copy: Path, fields: dict[str, object], message: str) -> None:
    change_manifest(copy, **fields)
    with pytest.raises(BundleError, match=message):
        load_bundle(copy)


def test_an_onnxruntime_too_old_is_refused(copy: Path) -> None:
    write_manifest(copy, onnxruntime_min="99.1")
    with pytest.raises(BundleError, match=r"too old for this bundle, which needs 99.1"):
        OnnxruntimeEngine(load_bundle(copy))


@pytest.mark.parametrize(("installed", "required"), [("1.9.0", "1.10"), ("1.24.1", "1.25"), ("1.32.0", "1.32.1")])
def test_versions_are_compared_by_number(installed: str, required: str) -> None:
    check_onnxruntime(required, installed)
    with pytest.raises(BundleError):
        check_onnxruntime(installed, required)


def test_weights_that_onnxruntime_cannot_load_are_one_line(copy: Path) -> None:
    (copy / "fast.onnx").write_bytes(b"not a graph")
    write_manifest(copy)
    with pytest.raises(BundleError, match=r"fast.onnx: onnxruntime .* cannot load it") as caught:
        OnnxruntimeEngine(load_bundle(copy))
    assert "\n" not in str(caught.value)


def test_a_bundle_of_before_says_by_its_cache_whether_a_prompt_comes_in_pieces(opt_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(opt_path, tmp_path / "copy"))
    assert load_bundle(copy).prefill_takes_past
    change_manifest(copy, kv_dtype="int8")
    assert not load_bundle(copy).prefill_takes_past
    change_manifest(copy, prefill_takes_past=True)
    assert load_bundle(copy).prefill_takes_past
    change_manifest(copy, prefill_takes_past="yes")
    with pytest.raises(BundleError, match="prefill_takes_past: got 'yes', expected bool"):
        load_bundle(copy)
