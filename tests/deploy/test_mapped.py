"""Weights in a file: the same values, in memory only while they are read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ryot.deploy.artifact import ExportOptions
from ryot.deploy.export import export_unscored
from ryot.deploy.mapped import MappedArrays, map_weights, put_away, release_behind, stream_decoder
from ryot.deploy.memory import give_back_memory
from ryot.deploy.weights import load_decoder_weights
from ryot.edge.bundle import DATA_NAME
from ryot.models.sources.folder import open_folder
from ryot.train.checkpoint import build_decoder

from .conftest import CONTEXT, VOCAB_SIZE

MB = 1 << 20


def mapped_bytes() -> int:
    """Resident bytes of this process that belong to files."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssFile"))
    return int(line.split()[1]) * 1024


@pytest.fixture
def weights(checkpoint):
    return load_decoder_weights(open_folder(checkpoint))


@pytest.fixture
def bundle(checkpoint, tmp_path):
    prompts = np.zeros((1, CONTEXT), np.int64)
    return export_unscored(open_folder(checkpoint), "fp32", tmp_path / "b", options=ExportOptions(), prompts=prompts)


def test_weights_are_read_from_the_bundle_that_was_made_of_them(weights, bundle):
    mapped = map_weights(weights, bundle / "model.onnx", bundle / DATA_NAME)
    shutil.rmtree(bundle)
    assert list(mapped.arrays) == list(weights.arrays)
    for name, array in weights.arrays.items():
        np.testing.assert_array_equal(mapped[name], array)
        if array.ndim == 2 and name != "positions.weight":  # whose table begins at another row in a graph
            assert mapped[name] is not array, name


def test_what_was_written_wrongly_is_not_read_from_there(weights, bundle):
    name = "layers.1.down.weight"
    data = bundle / DATA_NAME
    content = bytearray(data.read_bytes())
    content[content.index(weights[name].tobytes())] ^= 1
    data.write_bytes(content)
    mapped = map_weights(weights, bundle / "model.onnx", data)
    assert mapped[name] is weights[name]
    np.testing.assert_array_equal(mapped["layers.0.down.weight"], weights["layers.0.down.weight"])


@torch.no_grad()
def test_a_decoder_over_mapped_weights_computes_what_it_did(weights, bundle):
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, CONTEXT)))
    expected = build_decoder(weights.spec, weights.arrays)(ids)
    mapped = map_weights(weights, bundle / "model.onnx", bundle / DATA_NAME)
    released = build_decoder(mapped.spec, mapped.arrays)
    release_behind(released, mapped.arrays)
    for model in (released, stream_decoder(mapped), stream_decoder(weights)):
        for _ in range(2):  # what was let go comes back
            torch.testing.assert_close(model(ids), expected, rtol=0, atol=0)


def test_pages_that_were_read_are_let_go(tmp_path):
    values = np.random.default_rng(0).standard_normal(16 * MB // 4, np.float32)
    (tmp_path / "data").write_bytes(values.tobytes())
    arrays = MappedArrays(tmp_path / "data", {"a": 0}, {"a": values})
    kept = put_away(values, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    before = mapped_bytes()
    for _ in range(2):
        total = arrays["a"].sum() + kept.sum()
        assert total == 2 * values.sum()
        assert mapped_bytes() - before > 30 * MB
        arrays.release("a")
        assert 14 * MB < mapped_bytes() - before < 18 * MB
        give_back_memory()
        assert mapped_bytes() - before < 2 * MB
