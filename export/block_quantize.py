"""Weight-only quantization: integers in blocks of 32 to 128 weights of one output, with a scale for each block.

A graph says it in standard ONNX, a blocked `DequantizeLinear` before the `MatMul`. ONNX Runtime makes one `MatMulNBits`
of the two, TensorRT one product; both read the integers and never write the floats down.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import torch

Array = npt.NDArray[np.floating]
# weights that share a scale: the first that divides a layer's inputs. Eight bits lose next to nothing in a large block,
# and their products are then bound by memory, not by scales
BLOCKS = {8: (128, 64, 32), 4: (32,)}
HALF_BLOCKS = (64, 32)  # of INT4 with FP16 scales; TensorRT for RTX fuses blocks of 32, 64 and 128
# to the lowest weight of a block of INT4 in the scales that are tried; to the highest it is one less. What is cut to -8
# and 7 is at most one step off, and the other weights gain from it
STEPS = np.linspace(7, 9, 8, dtype=np.float32)
PIECE = 1 << 18  # weights quantized at a time, which stay in a processor's cache


def quantize_blocks(weight: torch.Tensor, bits: int, half: bool = False) -> tuple[npt.NDArray[np.int8], Array]:
    """Quantize a matrix [outputs, inputs] along its inputs.

    INT8 takes the scale at which the largest weight of a block is 127. INT4 has 16 values, and with them the largest
    weight is often better cut: of eight scales, the one with the smallest squared error is taken.

    Args:
        weight: [outputs, inputs], inputs a multiple of 32; of any float type, widened piece by piece.
        bits: 8 or 4.
        half: INT4 as TensorRT takes it: with FP16 scales, which have to be above zero, in blocks of 64 where they fit.

    Returns:
        Integers [outputs, inputs] and scales [outputs, inputs / block], float32 or FP16.
    """
    outputs, inputs = weight.shape
    block = next(size for size in (HALF_BLOCKS if half else BLOCKS[bits]) if inputs % size == 0)
    integers = np.empty((outputs, inputs), np.int8)
    scales = np.empty((outputs, inputs // block), np.float16 if half else np.float32)
    for rows in _pieces(outputs, inputs):
        blocks = weight[rows].float().numpy().reshape(-1, block)
        q, scale = _quantize(blocks, bits, half)
        integers[rows] = q.reshape(-1, inputs)
        scales[rows] = scale.reshape(-1, inputs // block)
    return integers, scales


def dequantize_blocks(integers: npt.NDArray[np.int8], scales: Array) -> Array:
    """The matrix [outputs, inputs] that the integers stand for; or any number of axes before the inputs."""
    wide: Array = integers.reshape(*scales.shape, -1) * scales[..., None]
    return wide.reshape(integers.shape)


def to_onnx(integers: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.generic]:
    """In the type in which a graph holds them."""
    return integers if bits == 8 else integers.astype(ml_dtypes.int4)


def steps_off(integers: npt.NDArray[np.int8], scales: Array, weight: torch.Tensor) -> float:
    """How far integers are from what a weight [outputs, inputs] is, at most, in steps of their block."""
    largest = 0.0
    for rows in _pieces(*integers.shape):
        step = scales[rows, :, None]
        blocks = (*step.shape[:2], -1)
        off = weight[rows].float().numpy().reshape(blocks) / step - integers[rows].reshape(blocks)
        largest = max(largest, float(np.abs(off).max()))
    return largest


class StoredBlocks:
    """The matrices that a graph's file holds as integers in blocks, read one at a time.

    Args:
        path: of the graph.
    """

    def __init__(self, path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        self._folder = path.parent
        self._tensors = {item.name: item for item in model.graph.initializer}

    def names(self) -> list[str]:
        """Of the layers: those with a weight and its scales."""
        weights = [name.removesuffix(".weight") for name in self._tensors if name.endswith(".weight")]
        return [name for name in weights if f"{name}.scale" in self._tensors]

    def integers(self, name: str) -> npt.NDArray[np.int8]:
        """A layer's integers, in the shape that the file has."""
        return self._read(f"{name}.weight").astype(np.int8, copy=False)

    def scales(self, name: str) -> Array:
        return self._read(f"{name}.scale").astype(np.float32, copy=False)

    def _read(self, name: str) -> npt.NDArray[np.generic]:
        tensor = self._tensors[name]
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        entries = {entry.key: entry.value for entry in tensor.external_data}
        raw = np.memmap(
            self._folder / entries["location"], np.int8, "r", int(entries["offset"]), int(entries["length"])
        )
        shape = tuple(tensor.dims)
        if tensor.data_type == onnx.TensorProto.INT4:  # two in a byte, the first one low
            return np.stack([raw << 4 >> 4, raw >> 4], axis=-1).reshape(-1)[: np.prod(shape)].reshape(shape)
        return raw.view(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(shape)


def _pieces(outputs: int, inputs: int) -> Iterator[slice]:
    """Rows of a matrix, some at a time."""
    rows = max(1, PIECE // inputs)
    return (slice(first, first + rows) for first in range(0, outputs, rows))


def _quantize(blocks: Array, bits: int, half: bool) -> tuple[npt.NDArray[np.int8], Array]:
    """Integers and scales [blocks, 1] of blocks [blocks, weights]."""
    if bits == 8:
        scale = _divisor(np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127))
        return np.rint(blocks / scale).astype(np.int8), scale
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    if half:
        scales = (_half_divisor(np.maximum(-low / steps, high / (steps - 1))) for steps in STEPS)
    else:  # INT4 reaches -8 but only 7: with a negative scale the largest weight may take the longer side
        turned = high > -low
        low, high = np.where(turned, -high, low), np.where(turned, -low, high)
        sign = np.where(turned, np.float32(-1), np.float32(1))
        scales = (_divisor(sign * np.maximum(-low / steps, high / (steps - 1))) for steps in STEPS)
    best_scale = next(scales)
    best = _round(blocks, best_scale)
    error = _error(blocks, best, best_scale)
    for scale in scales:
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


def _half_divisor(scale: Array) -> Array:
    """The next FP16 number above zero that is no smaller, so that no weight is cut by more; as float32."""
    half = np.maximum(scale.astype(np.float16), np.finfo(np.float16).smallest_subnormal)
    return np.where(half < scale, np.nextafter(half, np.float16(np.inf)), half).astype(np.float32)


def _round(blocks: Array, scale: Array) -> Array:
    return np.clip(np.rint(blocks / scale), -8, 7)


def _error(blocks: Array, q: Array, scale: Array) -> Array:
    return np.square(blocks - q * scale).sum(axis=1, keepdims=True)
