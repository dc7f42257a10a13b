"""Fixtures of the edge tests: two tiny bundles, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from ryot.edge.bundle import Bundle, load_bundle
from ryot.edge.capi import CApiEngine
from ryot.edge.engine import Engine
from ryot.edge.session import OnnxruntimeEngine

from .tiny_bundle import write_bundle


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "llama")


@pytest.fixture(scope="session")
def opt_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "opt", position_ids=True, two_sessions=True, seed=3)


@pytest.fixture(scope="session", params=["llama", "opt"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """A one-session llama-shaped bundle, and a two-session one with learned positions."""
    return load_bundle(request.getfixturevalue(f"{request.param}_path"))


@pytest.fixture(params=[OnnxruntimeEngine, CApiEngine])
def make_engine(request: pytest.FixtureRequest) -> type[Engine]:
    """Each engine in turn."""
    return request.param
