"""Which matrices take finer steps at 8 bits, by what is expected of each: smaller blocks, or blocks at all.

Costs are those of `eight_bits`; what a choice really costs is measured by whoever asks for it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ryot.deploy.calibration import Sensitivity, measure_sensitivity
from ryot.deploy.eight_bits import InputSizes, dynamic_cost, eight_bit_formats, measure_inputs
from ryot.deploy.graph import matrix_names
from ryot.deploy.matrices import BlockMatrix, Matrix
from ryot.deploy.precisions import matrix_block_size
from ryot.deploy.quality import EvalData, quality_windows
from ryot.deploy.selection import Format, Ladder
from ryot.deploy.settings import ExportSettings
from ryot.deploy.weights import DecoderWeights
from ryot.models.block_sizes import BLOCK_SIZES

log = logging.getLogger(__name__)

#: Training tokens that the choice is made on, in windows of at most this length.
COST_TOKENS, COST_WINDOW = 1_024, 256
#: The largest block that is tried where the fastest one costs too much.
LARGEST_BLOCK = 32
#: Blocks of 16 save at least this many times the share of KL that they take in bytes. Where all are of 16, not 32,
#: 11 % more bytes, decode takes 13 % more time and prefill 30 % (SmolLM2's layers, AVX-512 VNNI, 2026-11-27).
BLOCKS_SAVE = 4.0
#: A product in blocks takes this many times the time of a dynamic one (128 tokens, the same machine: 299 and 95 ms).
BLOCK_TIME = 3
#: Shares of the values that are in blocks, tried one after the other. SmolLM2-135M, smoothed, 4,096 tokens of
#: validation text (2026-11-27): KL 0.0110 with none, 0.0083 with 0.03, 0.0067 with 0.08, 0.0057 with 0.15, 0.0046 with
#: 0.25.
OUTLIER_SHARES = (0.04, 0.08, 0.12, 0.18, 0.27, 0.4, 0.6, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class EightBitCosts:
    """What is known of each product of a decoder: how much its outputs matter, and what goes into it."""

    sensitivity: Sensitivity
    inputs: Mapping[str, InputSizes]


def measure_costs(weights: DecoderWeights, data: EvalData) -> EightBitCosts:
    """The costs over a little training text."""
    length = weights.spec.max_seq_len
    windows = quality_windows(data, "train", length, tokens=COST_TOKENS, window=COST_WINDOW)
    windows = windows[: max(1, COST_TOKENS // min(length, COST_WINDOW)), :-1]
    sensitivity = measure_sensitivity(weights, windows)
    return EightBitCosts(sensitivity=sensitivity, inputs=measure_inputs(weights, windows, sensitivity))


def choose_blocks(
    weights: DecoderWeights, costs: EightBitCosts, settings: ExportSettings, allowed: float
) -> tuple[dict[str, int], float]:
    """The block size of each matrix, of the smaller ones, and the KL that is expected of all: `allowed` if they can."""
    formats = {}
    for name in matrix_names(weights):
        wanted = (size for size in BLOCK_SIZES if size <= min(LARGEST_BLOCK, settings.int8_block_size))
        sizes = list(dict.fromkeys(matrix_block_size(weights, name, size) for size in wanted))
        values = weights[f"{name}.weight"]
        found = eight_bit_formats(name, values, sizes, costs.sensitivity, costs.inputs.get(name))
        formats[name] = dict(zip(sizes, found))
    ladder = Ladder({name: list(of_matrix.values()) for name, of_matrix in formats.items()})
    rung = min(ladder.rung_for(allowed), ladder.rung_that_pays(BLOCKS_SAVE))
    mix = ladder.mix(rung)
    chosen = {name: next(size for size, f in formats[name].items() if f == mix[name]) for name in formats}
    log.info("int8: blocks %s", dict(Counter(chosen.values())))
    return chosen, ladder.expected_kl(rung)


def outlier_mixes(
    weights: DecoderWeights, costs: EightBitCosts, bits: int, blocks: Mapping[str, Matrix]
) -> Iterator[tuple[list[str], float]]:
    """The matrices that are better in `blocks` than with a scale for each token, and the KL expected of the mix.

    Few inputs of a trained decoder are a hundred times as large as the others, most of them of some `down` and of a
    few tokens. Beside one of those a whole token is rounded coarsely. The mixes grow.
    """
    formats: dict[str, list[Format]] = {}
    for name in matrix_names(weights):
        block = blocks[name]
        if name not in costs.inputs or name == "embedding" or not isinstance(block, BlockMatrix):
            continue
        values, inputs = weights[f"{name}.weight"], costs.inputs[name]
        dynamic = dynamic_cost(values, bits, costs.sensitivity.outputs[name], inputs)
        in_blocks = eight_bit_formats(name, values, [block.block_size], costs.sensitivity, inputs)[0].expected_kl
        # The price is time, in that of a value of a dynamic product.
        formats[name] = [
            Format(label="dynamic", price=values.size, expected_kl=dynamic),
            Format(label="blocks", price=BLOCK_TIME * values.size, expected_kl=in_blocks),
        ]
    ladder = Ladder(formats)
    for share in OUTLIER_SHARES:
        enough = ladder.price(0) * (1 + (BLOCK_TIME - 1) * share)
        rung = next((r for r in range(ladder.top) if ladder.price(r) >= enough), ladder.top)
        chosen = [n for n, option in ladder.mix(rung).items() if option.label == "blocks"]
        log.info("int8-dyn: in blocks %s", ", ".join(chosen) or "none")
        yield chosen, ladder.expected_kl(rung)
