"""Rounding weights to blocks of 4 or 8 bits so that what the matrix computes changes least, not the weights themselves.

    # N output features, K input features, C blocks along K, E values of one block

GPTQ (Frantar et al. 2022, arXiv:2210.17323): columns are rounded one after the other, and the columns still to come
make up for each one's error, weighted by how the layer's inputs are correlated. Scales and zero points are set
beforehand, by a search for the clipping of both ends that costs least under the inputs' energy, so that columns may be
taken in the order of that energy. All output features go through a column at once, columns in panels: inside a panel
each column updates the next ones, and what lies behind the panel is updated by one matrix product.

Written here because no library at hand fits. onnxruntime 1.32 carries a `gptq`
(`onnxruntime.quantization.neural_compressor`), but it takes the wrong half of the triangular factor, so no error is
passed on: on the trained reference models its 4 bits in blocks of 128 leave 0.12 % and 0.44 % of the outputs' energy as
error, RTN 0.13 % and 0.46 %, this 0.007 % and 0.22 % (optimized, baseline; 2026-11-24). It also returns rounded values
instead of codes, and its driver works on the MatMuls of a finished float graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ryot.deploy.matrices import BlockMatrix
from ryot.models.block_sizes import block_size_for
from ryot.models.tensors import FloatArray

#: Shares of a block's range that are tried as its end, on either side.
CLIPPINGS = (1.0, 0.94, 0.88, 0.82, 0.76)
#: Added to the diagonal, as a share of its mean, at least (GPTQ's own default).
DAMPING = 0.01
#: Columns whose effect on the columns after them is applied at once.
PANEL = 64
#: Values that a search works on at a time, so that they stay in the processor's cache.
CHUNK_VALUES = 1 << 17
#: Output features that are rounded, and whose errors are taken, at a time.
ROWS_AT_ONCE = 16_384


@contextmanager
def _one_thread() -> Iterator[None]:
    """For many short steps: two threads save a quarter of the time where the cores are free, and where one is not each
    step waits for it (1024 x 3072 took 0.4 s alone and up to 30 s beside a process that computed, 2026-11-27)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def round_by_search(
    values_NK: FloatArray, energy_K: Tensor | None = None, *, bits: int, block_size: int, asymmetric: bool = True
) -> BlockMatrix:
    """RTN under scales (and zero points) that were searched for; `energy_K` weighs the inputs, by default alike."""
    block_size = block_size_for(values_NK.shape[1], block_size)
    blocks = _split(torch.from_numpy(values_NK), block_size)
    scales, zeros = search_scales(blocks, _energy_blocks(energy_K, values_NK.shape[1], block_size), bits, asymmetric)
    codes = torch.empty(blocks.shape, dtype=torch.uint8)
    for rows in _chunks(blocks):
        codes[rows] = _encode(blocks[rows], scales[rows], zeros[rows], bits).to(torch.uint8)
    return _block_matrix(codes, scales, zeros, bits, values_NK.shape[1], asymmetric)


@dataclass(frozen=True, slots=True)
class Curvature:
    """What GPTQ needs of a matrix's inputs, made once for all ways to round it."""

    moments_KK: Tensor
    """Second moments, float32."""
    order: Tensor
    """Inputs by falling energy: the order in which columns are rounded."""
    factor_KK: Tensor
    """Upper Cholesky factor of the damped inverse moments in that order, as GPTQ walks it."""


def damping(num_inputs: int, num_tokens: int) -> float:
    """What is added to the diagonal of moments that so many tokens gave, as a share of its mean.

    Few tokens leave directions in which they hardly vary and other text does: there GPTQ would put its errors. On
    SmolLM2-135M with 2,048 tokens a damping of 0.01 left more error on other text than RTN does (K = 1536: 8.3e-3 and
    6.8e-3 of the outputs' energy, RTN 5.2e-3), one near K / tokens least (4.5e-3 and 4.0e-3; 2 matrices, 2026-11-27).
    """
    return max(DAMPING, num_inputs / num_tokens)


def factorize(moments_KK: Tensor, num_tokens: int) -> Curvature:
    """Factorize moments over so many tokens, in float64, which the inverse needs."""
    order = torch.argsort(moments_KK.diagonal(), descending=True, stable=True)
    damped = moments_KK[order][:, order].double()
    damped.diagonal().add_(damping(len(damped), num_tokens) * max(float(damped.diagonal().mean()), 1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return Curvature(moments_KK, order, torch.linalg.cholesky(inverse, upper=True).float())


@_one_thread()
def round_by_gptq(
    values_NK: FloatArray, curvature: Curvature, *, bits: int, block_size: int, asymmetric: bool = True
) -> BlockMatrix:
    """GPTQ with scales set beforehand and columns in the order of their inputs' energy."""
    N, K = values_NK.shape
    E = block_size_for(K, block_size)
    C = -(-K // E)
    energy_CE = _energy_blocks(curvature.moments_KK.diagonal(), K, E)
    codes, scales, zeros = torch.empty((N, C, E), dtype=torch.uint8), torch.empty(N, C), torch.empty(N, C)
    # Outputs have nothing to do with each other.
    for rows in row_slices(N):
        blocks = _split(torch.from_numpy(values_NK[rows]), E)
        scales[rows], zeros[rows] = search_scales(blocks, energy_CE, bits, asymmetric)
        rounded = _round_columns(values_NK[rows], curvature, scales[rows], zeros[rows], bits, E)
        codes[rows] = _split_codes(rounded, zeros[rows], E)
    return _block_matrix(codes, scales, zeros, bits, K, asymmetric)


def _round_columns(
    values_NK: FloatArray, curvature: Curvature, scales_NC: Tensor, zeros_NC: Tensor, bits: int, block_size: int
) -> Tensor:
    """Codes [N, K] of blocks with these scales and zero points."""
    N, K = values_NK.shape
    order, factor_KK = curvature.order, curvature.factor_KK
    # Inputs along the first axis from here on, so that each step works on contiguous rows.
    left_KN = torch.from_numpy(values_NK).T[order].contiguous()
    codes_KN = torch.empty((K, N), dtype=torch.uint8)
    scales_CN, zeros_CN = scales_NC.T.contiguous(), zeros_NC.T.contiguous()
    steps_CN = 1 / scales_CN
    lowest_CN, highest_CN = -zeros_CN, (1 << bits) - 1 - zeros_CN
    block_of = (order // block_size).tolist()
    for start in range(0, K, PANEL):
        end = min(start + PANEL, K)
        panel = left_KN[start:end]
        errors = torch.empty_like(panel)
        factor = factor_KK[start:end]
        for i in range(end - start):
            c = block_of[start + i]
            level = _limit((panel[i] * steps_CN[c]).round_(), lowest_CN[c], highest_CN[c])
            codes_KN[start + i] = level + zeros_CN[c]
            torch.addcmul(panel[i], level, scales_CN[c], value=-1, out=errors[i]).div_(factor[i, start + i])
            if i + 1 < end - start:
                panel[i + 1 :].addr_(factor[i, start + i + 1 : end], errors[i], alpha=-1)
        left_KN[end:].addmm_(factor[:, end:].T, errors, alpha=-1)
    codes = torch.empty((N, K), dtype=torch.uint8)
    codes[:, order] = codes_KN.T
    return codes


def output_errors(values_NK: FloatArray, matrix: BlockMatrix, moments_KK: Tensor) -> Tensor:
    """Mean squared error of each output feature [N] over inputs with these second moments, in closed form."""
    errors = []
    for rows in row_slices(len(values_NK)):
        difference = torch.from_numpy(matrix.rows(rows).dequantize()).sub_(torch.from_numpy(values_NK[rows]))
        errors.append((difference @ moments_KK).mul_(difference).sum(dim=1).clamp_(min=0))
    return torch.cat(errors)


def row_slices(num_rows: int) -> Iterator[slice]:
    """Pieces of a matrix that are worked on at a time: a table of float32 values is large."""
    return (slice(start, start + ROWS_AT_ONCE) for start in range(0, num_rows, ROWS_AT_ONCE))


def search_scales(blocks_NCE: Tensor, energy_CE: Tensor, bits: int, asymmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points [N, C] whose clipping gives the least squared error, each input weighted by its energy."""
    scales, zeros = torch.empty(blocks_NCE.shape[:2]), torch.empty(blocks_NCE.shape[:2])
    for rows in _chunks(blocks_NCE):
        scales[rows], zeros[rows] = _search_rows(blocks_NCE[rows], energy_CE, bits, asymmetric)
    return scales, zeros


def _search_rows(blocks: Tensor, energy_CE: Tensor, bits: int, asymmetric: bool) -> tuple[Tensor, Tensor]:
    best = torch.full(blocks.shape[:2], torch.inf)
    best_scale, best_zero = torch.ones_like(best), torch.zeros_like(best)
    for scale, zero in _ranges(blocks, bits, asymmetric):
        level = (blocks / scale[..., None]).round_()
        _limit(level, -zero[..., None], (1 << bits) - 1 - zero[..., None])
        error = level.mul_(scale[..., None]).sub_(blocks).square_().mul_(energy_CE).sum(dim=-1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _ranges(blocks: Tensor, bits: int, asymmetric: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Candidates (scale, zero code) of each block."""
    last, middle = (1 << bits) - 1, 1 << (bits - 1)
    if not asymmetric:
        # The value of largest size gets the code 0 exactly, whatever its sign: one step more than the other side has.
        largest = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))[..., 0]
        full = largest / -middle if bits == 4 else largest.abs() / (middle - 1)
        full = torch.where(full == 0, 1.0, full)
        for clipping in (*CLIPPINGS, 0.7):
            yield full * clipping, torch.full_like(full, middle)
        return
    low, high = blocks.amin(dim=-1).clamp_(max=0), blocks.amax(dim=-1).clamp_(min=0)
    for a, b in itertools.product(CLIPPINGS, repeat=2):
        scale = (high * b - low * a) / last
        scale = torch.where(scale == 0, 1.0, scale)
        yield scale, (low * -a / scale).round_().clamp_(0, last)


def _limit(values: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """`clamp_`, which is slow where the limits are tensors."""
    torch.maximum(values, lowest, out=values)
    return torch.minimum(values, highest, out=values)


def _encode(blocks: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    return (blocks / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, (1 << bits) - 1)


def _chunks(blocks: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_VALUES // blocks[0].numel())
    return (slice(start, start + rows) for start in range(0, len(blocks), rows))


def _split(values_NK: Tensor, block_size: int) -> Tensor:
    """[N, K] as [N, C, E], zeros after the end."""
    N, K = values_NK.shape
    padded = torch.nn.functional.pad(values_NK, (0, -K % block_size)) if K % block_size else values_NK
    return padded.reshape(N, -1, block_size)


def _split_codes(codes_NK: Tensor, zeros_NC: Tensor, block_size: int) -> Tensor:
    """Codes as blocks, the zero code after the end."""
    N, K = codes_NK.shape
    if K % block_size == 0:
        return codes_NK.reshape(N, -1, block_size)
    padded = zeros_NC.to(torch.uint8).repeat_interleave(block_size, dim=1)
    padded[:, :K] = codes_NK
    return padded.reshape(N, -1, block_size)


def _energy_blocks(energy_K: Tensor | None, num_inputs: int, block_size: int) -> Tensor:
    # A diagonal, left as the view that it is, is read value by value.
    energy = torch.ones(num_inputs) if energy_K is None else energy_K.float().contiguous()
    return _split(energy[None], block_size)[0]


def _block_matrix(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, num_inputs: int, asymmetric: bool
) -> BlockMatrix:
    zero_codes = zeros.to(torch.uint8).numpy() if asymmetric else None
    return BlockMatrix(codes.numpy(), scales.numpy(), bits, num_inputs, zero_codes)
