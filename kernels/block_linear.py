"""Products with weights of 4 or 8 bits in blocks, a scale for each block: a decoder's few rows against large matrices.

A few rows read every weight once and compute little, so the kernel is written for memory:
- weights are packed so that what a thread holds is what the matrix units take (`reference.pack_blocks`): 16 bits hold
  the weights of two or four steps along the inputs, and a mask and one fused multiplication make floating numbers of a
  pair, exactly. In the file's order, outputs side by side, every weight would have to move to another thread first;
- the weights are the rows of the product and the tokens its columns, of which the matrix units take eight at least;
- the units of a tile are products of their own, side by side in the warps of a program: so the sum over the inputs is
  cut within a program, and a second launch is only needed for long sums of few outputs;
- sums of a unit's integers are scaled in float32: neither weights nor sums are rounded before the end. A float32 input
  is taken as three bfloat16 numbers that add up to it, whose products with integers are exact.

For many rows (prompts) `widen` writes a part of a matrix down in floating numbers, for PyTorch's product.

Sizes: T rows, K inputs, N outputs, B inputs of a block, U units of K.
"""

# Triton reads the signatures of its functions itself.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .temporal import processors

LEAST_COLUMNS = 8  # of a matrix product
MOST_UNITS = 8  # of a tile
FEW_BYTES, MANY_BYTES = 32, 128  # of an input's columns, beyond which a tile has a half and a quarter of the units
MOST_ROWS, LEAST_ROWS = 64, 16
PROGRAMS_PER_PROCESSOR = 2  # below which programs take fewer outputs each
WARPS = 4
STAGES = 3
MOST_SPLITS = 8
SPLIT_TILES = 16  # fewer tiles than this are not worth a second launch
SUMMED = 1024  # numbers of one program that sums parts
WIDE_ROWS, WIDE_UNITS = 32, 4  # of one program that widens


@dataclass(frozen=True)
class Launch:
    """How the work is cut.

    Attributes:
        rows: outputs of one program, a power of 2.
        units: of one tile, a power of 2.
        splits: parts of the inputs, each summed by programs of their own.
        warps: warps of one program.
        stages: tiles that are fetched ahead through shared memory; 1 for none.
    """

    rows: int
    units: int
    splits: int
    warps: int
    stages: int


def plan(tokens: int, units: int, outputs: int, itemsize: int, processors: int) -> Launch:
    """The launch for these sizes on a GPU with so many multiprocessors.

    Args:
        itemsize: of x.
    """
    columns = max(LEAST_COLUMNS, triton.next_power_of_2(tokens))
    column_bytes = columns * itemsize
    tile = MOST_UNITS // (1 if column_bytes <= FEW_BYTES else 2 if column_bytes <= MANY_BYTES else 4)
    rows = MOST_ROWS if columns == LEAST_COLUMNS else MOST_ROWS // 2  # for want of registers
    while rows > LEAST_ROWS and triton.cdiv(outputs, rows) < PROGRAMS_PER_PROCESSOR * processors:
        rows //= 2
    wanted = 2 * PROGRAMS_PER_PROCESSOR * processors // triton.cdiv(outputs, rows)
    splits = max(1, min(wanted, units // (SPLIT_TILES * tile), MOST_SPLITS))
    return Launch(rows, tile, splits, WARPS, STAGES)


@triton.jit
def unpack(words, p: tl.constexpr, BITS: tl.constexpr):
    """The weights of inputs 16 p to 16 p + 15 of units, from words [U, N, 8] to float16 [U, N, 16], times 2^-9.

    A masked number of 16 bits is a float16 below the normal ones: its integer times 2^-24.
    """
    if BITS == 8:
        if p == 1:
            words = words >> 8
        words = words & 0x00FF00FF
    else:
        if p >= 2:
            words = words >> 8
        words = words & 0x000F000F * (1 + 15 * (p % 2))
    both = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
    halves = tl.reshape(both, [words.shape[0], words.shape[1], 2 * words.shape[2]]).to(tl.float16, bitcast=True)
    if BITS == 8:
        return halves * 32768.0 - 0.25
    if p % 2 == 0:
        return halves * 32768.0 - 0.015625
    return halves * 2048.0 - 0.015625


@triton.jit
def block_linear_kernel(
    x,  # [T, K] by strides, unit stride over K
    weight,  # int32 [U, N, 8]
    scale,  # [K / B, N]
    bias,  # [N], where BIAS
    out,  # [T, N] contiguous
    parts,  # float32 [SPLITS, T, N], where SPLITS > 1
    tokens,
    inputs,
    outputs,
    units,
    x_t,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    PIECES: tl.constexpr = 16 // BITS  # of 16 inputs, in a unit
    UNIT: tl.constexpr = 16 * PIECES
    SCALES: tl.constexpr = UNIT // BLOCK if UNIT > BLOCK else 1  # of a unit
    SHARING: tl.constexpr = BLOCK // UNIT if BLOCK > UNIT else 1  # units of one scale
    SCALED: tl.constexpr = PIECES // SCALES  # pieces of one scale
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_read = tl.minimum(n, outputs - 1)  # what is read twice is not stored twice; a mask costs more
    u = tl.arange(0, BLOCK_U)
    j = tl.arange(0, 16)
    t = tl.arange(0, BLOCK_T)
    t_here = (t < tokens)[None, None, :]  # a column that is not there is not fetched
    weight_at = n_read[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    x_at = t.to(tl.int64)[None, None, :] * x_t + ((u * UNIT)[:, None, None] + j[None, :, None])
    tiles = tl.cdiv(tl.cdiv(units, SPLITS), BLOCK_U)  # of one split
    begin = split * tiles * BLOCK_U
    end = tl.minimum(begin + tiles * BLOCK_U, units)
    k_end = tl.minimum(end * UNIT, inputs)
    acc = tl.zeros([BLOCK_U, BLOCK_N, BLOCK_T], tl.float32)
    for start in tl.range(begin, end, BLOCK_U, num_stages=STAGES):
        unit = tl.minimum(start + u, units - 1)  # one too far meets an x of zero
        unit_at = unit.to(tl.int64) * outputs * 8
        words = tl.load(weight + unit_at[:, None, None] + weight_at, eviction_policy="evict_first")
        for part in tl.static_range(SCALES):
            row = tl.minimum(unit // SHARING * SCALES + part, inputs // BLOCK - 1)
            steps = tl.load(scale + row.to(tl.int64)[:, None] * outputs + n_read[None, :]).to(tl.float32)
            sums = tl.zeros([BLOCK_U, BLOCK_N, BLOCK_T], tl.float32)
            for piece in tl.static_range(SCALED):
                first = start * UNIT + 16 * (part * SCALED + piece)
                k_here = (first + u * UNIT)[:, None, None] + j[None, :, None] < k_end
                given = tl.load(x + first + x_at, mask=k_here & t_here, other=0.0)  # [BLOCK_U, 16, BLOCK_T]
                integers = unpack(words, part * SCALED + piece, BITS)
                if given.dtype == tl.float32:
                    integers = integers.to(tl.bfloat16)
                    for _ in tl.static_range(3):
                        rounded = given.to(tl.bfloat16)
                        sums = tl.dot(integers, rounded, sums)
                        given -= rounded.to(tl.float32)
                else:
                    sums = tl.dot(integers.to(given.dtype), given, sums)
            acc += sums * steps[:, :, None]
    total = tl.sum(acc, axis=0) * 512.0  # [BLOCK_N, BLOCK_T]
    here = (n < outputs)[:, None] & (t < tokens)[None, :]
    at = t.to(tl.int64)[None, :] * outputs + n[:, None]
    if SPLITS > 1:
        tl.store(parts + split.to(tl.int64) * tokens * outputs + at, total, mask=here)
    else:
        if BIAS:
            total += tl.load(bias + n_read).to(tl.float32)[:, None]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=here)


@triton.jit
def sum_kernel(
    parts,  # float32 [SPLITS, T, N]
    bias,  # [N], where BIAS
    out,  # [T, N] contiguous
    numbers,  # T * N
    outputs,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < numbers
    total = tl.load(parts + at, mask=here, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + tl.full([], split, tl.int64) * numbers + at, mask=here, other=0.0)
    if BIAS:
        total += tl.load(bias + at % outputs, mask=here, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=here)


@triton.jit
def widen_kernel(
    weight,  # int32 [U, N, 8]
    scale,  # [K / B, N]
    out,  # [ROWS, K] contiguous: outputs first..first + rows - 1
    first,
    rows,
    inputs,
    outputs,
    units,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    PIECES: tl.constexpr = 16 // BITS
    UNIT: tl.constexpr = 16 * PIECES
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)
    j = tl.arange(0, 16)
    n = first + row
    here = (unit < units)[:, None] & (row < rows)[None, :]  # [BLOCK_U, BLOCK_N]
    unit_at = unit.to(tl.int64) * outputs * 8
    weight_at = unit_at[:, None, None] + n[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    words = tl.load(weight + weight_at, mask=here[:, :, None], other=0)
    for piece in tl.static_range(PIECES):
        k = unit * UNIT + 16 * piece
        k_here = here & (k < inputs)[:, None]  # inputs are a multiple of 16
        steps = tl.load(scale + (k // BLOCK).to(tl.int64)[:, None] * outputs + n[None, :], mask=k_here, other=0.0)
        wide = unpack(words, piece, BITS).to(tl.float32) * 512.0 * steps.to(tl.float32)[:, :, None]
        out_at = row.to(tl.int64)[None, :, None] * inputs + (k[:, None, None] + j[None, None, :])
        tl.store(out + out_at, wide.to(out.dtype.element_ty), mask=k_here[:, :, None])


def launch(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int, cut: Launch | None = None
) -> Tensor:
    """Run the kernel; shapes as in `operators.block_linear`, unchecked.

    Args:
        cut: how the work is cut; default: `plan`.
    """
    (tokens, inputs), (units, outputs) = x.shape, weight.shape[:2]
    if cut is None:
        cut = plan(tokens, units, outputs, x.element_size(), processors(x.device))
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    parts = out  # a pointer must be given, and is not followed
    if cut.splits > 1:
        parts = torch.empty((cut.splits, tokens, outputs), dtype=torch.float32, device=x.device)
    block_linear_kernel[(triton.cdiv(outputs, cut.rows), cut.splits)](
        x,
        weight,
        scale,
        out if bias is None else bias,
        out,
        parts,
        tokens,
        inputs,
        outputs,
        units,
        x.stride(0),
        BITS=bits,
        BLOCK=inputs // scale.shape[0],
        BIAS=bias is not None,
        BLOCK_N=cut.rows,
        BLOCK_T=max(LEAST_COLUMNS, triton.next_power_of_2(tokens)),
        BLOCK_U=cut.units,
        SPLITS=cut.splits,
        STAGES=cut.stages,
        num_warps=cut.warps,
        enable_fp_fusion=True,
    )
    if cut.splits > 1:
        sum_kernel[(triton.cdiv(out.numel(), SUMMED),)](
            parts,
            out if bias is None else bias,
            out,
            out.numel(),
            outputs,
            SPLITS=cut.splits,
            BIAS=bias is not None,
            BLOCK=SUMMED,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def widen(weight: Tensor, scale: Tensor, out: Tensor, bits: int, first: int) -> None:
    """Run the kernel; shapes as in `operators.widen_blocks`, unchecked."""
    rows, inputs = out.shape
    units, outputs = weight.shape[:2]
    widen_kernel[(triton.cdiv(rows, WIDE_ROWS), triton.cdiv(units, WIDE_UNITS))](
        weight,
        scale,
        out,
        first,
        rows,
        inputs,
        outputs,
        units,
        BITS=bits,
        BLOCK=inputs // scale.shape[0],
        BLOCK_N=WIDE_ROWS,
        BLOCK_U=WIDE_UNITS,
        num_warps=4,
        enable_fp_fusion=True,
    )
