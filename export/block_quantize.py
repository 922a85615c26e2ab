"""Weight-only quantization: integers in blocks of 32 weights of one output, with a scale for each block.

A graph says it in standard ONNX, a blocked `DequantizeLinear` before the `MatMul`. ONNX Runtime makes one `MatMulNBits`
of the two, which reads the integers and never writes the floats down.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
BLOCK = 32
LARGEST = {8: 127, 4: 7}  # of the integers that stand for the largest weight of a block
CANDIDATES = 8  # scales tried for a block of INT4
ROWS = 4096  # outputs quantized at a time, which bounds the memory


def quantize_blocks(weight: Array, bits: int) -> tuple[npt.NDArray[np.int8], Array]:
    """Quantize a matrix [outputs, inputs] along its inputs.

    INT8 takes the scale at which the largest weight of a block is 127. INT4 has 16 values, and with them the largest
    weight is often better cut: of some scales, the one with the smallest squared error is taken.

    Args:
        weight: [outputs, inputs], inputs a multiple of 32.
        bits: 8 or 4.

    Returns:
        Integers [outputs, inputs] and scales [outputs, inputs / 32].
    """
    outputs, inputs = weight.shape
    integers = np.empty((outputs, inputs), np.int8)
    scales = np.empty((outputs, inputs // BLOCK), np.float32)
    for first in range(0, outputs, ROWS):
        rows = np.ascontiguousarray(weight[first : first + ROWS], np.float32).reshape(-1, BLOCK)
        q, scale = _quantize(rows, bits)
        integers[first : first + ROWS] = q.reshape(-1, inputs)
        scales[first : first + ROWS] = scale.reshape(-1, inputs // BLOCK)
    return integers, scales


def dequantize_blocks(integers: npt.NDArray[np.int8], scales: Array) -> Array:
    """The matrix [outputs, inputs] that the integers stand for."""
    wide: Array = np.repeat(scales, BLOCK, axis=1) * integers.astype(scales.dtype)
    return wide


def to_onnx(integers: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.generic]:
    """In the type in which a graph holds them."""
    return integers if bits == 8 else integers.astype(ml_dtypes.int4)


def _quantize(blocks: Array, bits: int) -> tuple[npt.NDArray[np.int8], Array]:
    """Integers and scales [blocks, 1] of blocks [blocks, 32]."""
    largest = LARGEST[bits]
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)  # with its sign
    if bits == 8:
        scale = _divisor(np.abs(extreme) / largest)
        return np.rint(blocks / scale).astype(np.int8), scale
    # INT4 reaches -8 but only 7: with a negative scale the largest weight may take the longer side
    best_scale = _divisor(extreme / -8)
    best = _round(blocks, best_scale)
    error = _error(blocks, best, best_scale)
    for steps in np.linspace(6.0, 7.5, CANDIDATES - 1, dtype=np.float32):
        scale = _divisor(extreme / steps)
        q = _round(blocks, scale)
        found = _error(blocks, q, scale)
        better = found < error
        error = np.where(better, found, error)
        best_scale = np.where(better, scale, best_scale)
        best = np.where(better, q, best)
    return best.astype(np.int8), best_scale


def _divisor(scale: Array) -> Array:
    """A scale that can be divided by: where a block is zero, one."""
    return np.where(np.abs(scale) > np.finfo(np.float32).tiny, scale, np.float32(1))


def _round(blocks: Array, scale: Array) -> Array:
    return np.clip(np.rint(blocks / scale), -8, 7)


def _error(blocks: Array, q: Array, scale: Array) -> Array:
    return np.square(blocks - q * scale).sum(axis=1, keepdims=True)
