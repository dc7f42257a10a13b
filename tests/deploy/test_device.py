"""A bundle on a machine that has what its requirements.txt lists, and nothing of this project."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from ryot.deploy.artifact import ExportOptions
from ryot.deploy.export import export_unscored
from ryot.edge.bundle import load_bundle
from ryot.models.sources.folder import open_folder
from tests.conftest import build_environment

from .conftest import CONTEXT


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def device_python(tmp_path_factory):
    """Python of a new environment with the packages of a bundle's requirements.txt alone."""
    folder = tmp_path_factory.mktemp("device")
    (folder / "requirements.txt").write_text("onnxruntime>=1.24,<2\nnumpy>=2.0,<3\ntokenizers>=0.21,<1\n")
    return build_environment(folder / "venv", "-r", folder / "requirements.txt")


def test_a_bundle_verifies_and_generates_there(checkpoint, device_python, tmp_path):
    prompts = np.random.default_rng(0).integers(0, 384, (4, CONTEXT))
    bundle = export_unscored(
        open_folder(checkpoint), "int8-dyn+int4", tmp_path / "bundle", options=ExportOptions(), prompts=prompts
    )
    wanted = (device_python.parents[2] / "requirements.txt").read_text()
    assert (bundle / "requirements.txt").read_text() == wanted
    absent = "import importlib.util as u; assert not [m for m in ('torch', 'onnx', 'ray', 'ryot') if u.find_spec(m)]"
    assert run(device_python, "-c", absent, cwd=tmp_path).returncode == 0
    verified = run(device_python, bundle / "run.py", "--verify", cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr
    assert f"{len(load_bundle(bundle).files)} files" in verified.stdout
    generated = run(device_python, bundle / "run.py", "--prompt", "def ", "--max-new-tokens", "8", cwd=tmp_path)
    assert generated.returncode == 0, generated.stderr


def test_changed_weights_are_refused_there(checkpoint, device_python, tmp_path):
    prompts = np.zeros((1, CONTEXT), np.int64)
    bundle = export_unscored(
        open_folder(checkpoint), "int8", tmp_path / "bundle", options=ExportOptions(), prompts=prompts
    )
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (bundle / "model.onnx.data").write_bytes(data)
    refused = run(device_python, bundle / "run.py", "--prompt", "def ", cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr.startswith("Error: bundle manifest: sha256 of model.onnx.data is ")
