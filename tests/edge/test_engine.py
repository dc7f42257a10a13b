"""Which engine runs, what it needs, and what happens where the C library does not fit."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from ryot.edge.bundle import Bundle, load_bundle
from ryot.edge.capi import CapiDecoder, open_library
from ryot.edge.engine import EngineUnavailable
from ryot.edge.engines import open_decoder
from ryot.edge.measure import build_spec, measure_once
from ryot.edge.session import Decoder
from ryot.errors import BundleError, ConfigError

from .test_cli import RUN
from .tiny_bundle import write_manifest

PACKAGE = Path(onnxruntime.__file__).parent
pytestmark = pytest.mark.skipif(
    not list((PACKAGE / "capi").glob("libonnxruntime.so.*")), reason="this onnxruntime package has no C library"
)


def link_package(folder: Path, *, without: str) -> Path:
    """An onnxruntime package that is the installed one, linked file by file, without the files of a pattern."""
    package = folder / "onnxruntime"
    for file in PACKAGE.rglob("*"):
        place = package / file.relative_to(PACKAGE)
        if file.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif not file.match(without) and "__pycache__" not in file.parts:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(file)
    return package


def run_with(path: list[Path], *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, Path(__file__).parents[2]]))}
    command = [sys.executable, "-c", before + RUN, *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)


def test_the_c_library_is_taken_where_it_fits(bundle: Bundle) -> None:
    assert type(open_decoder(bundle)) is CapiDecoder
    assert type(open_decoder(bundle, engine="python")) is Decoder
    with pytest.raises(ConfigError, match="engine: got 'rust', expected one of auto, capi, python"):
        open_decoder(bundle, engine="rust")


def test_greedy_text_needs_neither_numpy_nor_the_binding(llama_path: Path) -> None:
    arguments = [str(llama_path), "--prompt", "def ", "--max-new-tokens", "9"]
    bare = run_with([], *arguments, before="import sys; sys.modules['numpy'] = None\n")
    assert (bare.returncode, bare.stderr) == (0, "")
    assert bare.stdout == run_with([], *arguments, "--engine", "python").stdout


def test_both_engines_draw_the_same_samples(llama_path: Path) -> None:
    arguments = [str(llama_path), "--prompt", "def ", "--temperature", "1.3", "--ignore-eos"]
    texts = [run_with([], *arguments, "--engine", engine).stdout for engine in ("capi", "python")]
    assert texts[0] == texts[1] != ""


def test_a_package_without_the_library_falls_back_and_says_so(llama_path: Path, tmp_path: Path) -> None:
    link_package(tmp_path, without="libonnxruntime.so.*")
    arguments = [str(llama_path), "--prompt", "def ", "--max-new-tokens", "5"]
    run = run_with([tmp_path], *arguments)
    assert run.returncode == 0
    assert run.stdout == run_with([], *arguments).stdout
    assert "the onnxruntime package has no C library; going on with onnxruntime's Python binding" in run.stderr
    run = run_with([tmp_path], *arguments, "--engine", "capi")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"Error: {tmp_path / 'onnxruntime' / 'capi'}: the onnxruntime package has no C library\n"


def test_a_library_of_another_version_than_the_package_is_not_used(tmp_path: Path) -> None:
    package = link_package(tmp_path, without="onnxruntime/__init__.py")
    (package / "__init__.py").write_text("__version__ = '1.2.3'\n")
    with pytest.raises(EngineUnavailable, match=r"is onnxruntime [\d.]+, the installed package is 1\.2\.3"):
        open_library(package)


def test_a_library_that_is_none_is_not_used(tmp_path: Path) -> None:
    package = link_package(tmp_path, without="libonnxruntime.so.*")
    (package / "capi" / "libonnxruntime.so.1.99.0").write_bytes(b"\x7fELF and nothing more")
    with pytest.raises(EngineUnavailable, match=r"libonnxruntime.so.1.99.0: cannot be used"):
        open_library(package)


def test_the_measurement_names_the_engine(llama_path: Path) -> None:
    bundle = load_bundle(llama_path)
    results = {
        engine: measure_once(build_spec(bundle, engine=engine, min_runs=1, min_time_s=0.0, end_to_end=False))
        for engine in ("capi", "python")
    }
    assert [r.engine for r in results.values()] == ["capi", "python"]
    assert "numpy" not in results["capi"].versions
    assert results["capi"].versions["onnxruntime"] == results["python"].versions["onnxruntime"]


def test_a_graph_with_other_inputs_than_the_manifest_says_is_refused(llama_path: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(llama_path, tmp_path / "copy"))
    shutil.copyfile(copy / "model.onnx", copy / "fast.onnx")
    write_manifest(copy)
    with pytest.raises(BundleError, match=r"fast.onnx: SessionGetInputCount gives 6, the manifest makes it 7"):
        CapiDecoder(load_bundle(copy))


def test_decoders_give_their_memory_back(llama_path: Path) -> None:
    bundle = load_bundle(llama_path)

    def resident_kb() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4

    def use_one() -> None:
        decoder = CapiDecoder(bundle, batch_size=8)
        for length in range(1, 30):
            decoder.prefill([[1] * length] * 8)

    for _ in range(3):
        use_one()
    gc.collect()
    before = resident_kb()
    for _ in range(20):
        use_one()
    gc.collect()
    # A decoder of this size holds about 1.5 MB; twenty of them kept would be 30 MB.
    assert resident_kb() - before < 6_000
