"""Export settings: what they refuse, and the bits of dynamic int8 that every device of a run sums exactly."""

from __future__ import annotations

import pytest

from ryot.deploy.settings import ExportSettings, dynamic_bits
from ryot.edge.machine import describe_cpu, sums_int8_exactly
from ryot.errors import ConfigError


@pytest.mark.parametrize(
    ("isas", "expected"), [([["avx2"]], 7), ([["avx2", "avx-vnni"]], 8), ([["asimd", "dotprod"], ["avx2"]], 7)]
)
def test_dynamic_weights_have_seven_bits_where_any_device_saturates(isas, expected):
    assert dynamic_bits(isas) == expected


def test_a_target_without_a_device_is_this_machine():
    assert dynamic_bits([None]) == (8 if sums_int8_exactly(describe_cpu()["isa"]) else 7)


def test_a_block_size_without_a_kernel_is_refused():
    with pytest.raises(ConfigError, match="int4_block_size: got 512, expected one of"):
        ExportSettings(int4_block_size=512)
