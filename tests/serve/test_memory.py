"""What a server takes for keys and values by itself."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from ryot.edge.limits import open_memory_cgroup

LIMIT = 400_000_000
CODE = "from ryot.serve.model import _free_bytes; print(_free_bytes())"


def test_a_container_has_no_more_than_its_limit(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cgroup = open_memory_cgroup(LIMIT)
    if cgroup is None:
        pytest.skip(caplog.messages[-1])
    with cgroup:
        done = subprocess.run(cgroup.wrap([sys.executable, "-c", CODE]), capture_output=True, text=True, check=True)
    # Python, numpy and onnxruntime have some of it.
    assert LIMIT / 2 < int(done.stdout) < LIMIT - 10_000_000
