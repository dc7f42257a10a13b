"""Fixtures of the report tests."""

from __future__ import annotations

import pytest

from ryot.report.rows import Report

from .synthetic import make_report


@pytest.fixture
def report() -> Report:
    return make_report()
