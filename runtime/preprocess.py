"""Bringing camera frames of any size to the model's: one resize and crop, as two banded matrix products.

Bilinear with antialiasing, as Pillow and torchvision do it: when shrinking by a factor f the triangle filter is f
times as wide. Rows and columns are resized separately, so a resize is `rows @ image @ columns`; each block of output
rows needs only a band of input rows, and what the crop cuts away is never computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import FrameError
from .manifest import FrameSpec

Array = npt.NDArray[Any]
BLOCK = 16  # output rows or columns per product
# Products of at most this many multiplications stay on the calling thread in OpenBLAS (interface/gemm.c). Larger ones
# would wake its threads, which then spin on the cores that the engine needs: 60 ms a frame, measured on two cores.
ONE_THREAD = 65536 * 4
LETTERBOX_GREY = 128


class Preprocess:
    """Resizes frames to the model's input size.

    Args:
        spec: height, width and the way of resizing, from the manifest.
    """

    def __init__(self, spec: FrameSpec) -> None:
        self.spec = spec
        self._plan = lru_cache(maxsize=8)(self._make_plan)

    def __call__(self, rgb: Array, out: Array) -> None:
        """Write the resized frame into `out`.

        Args:
            rgb: uint8 [height, width, 3], any size.
            out: uint8 [spec.height, spec.width, 3].

        Raises:
            FrameError: `rgb` is not such an array.
        """
        check_frame(rgb)
        if rgb.shape == out.shape:
            np.copyto(out, rgb)
            return
        self._plan(rgb.shape[0], rgb.shape[1])(rgb, out)

    def region(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The part of a frame that the model's input covers.

        Returns:
            top, left, height, width in pixels of the frame; beyond its edges where bars were added.
        """
        layout = self._layout(height, width)
        down, across = height / layout.height, width / layout.width
        return (
            layout.top * down,
            layout.left * across,
            self.spec.height * down,
            self.spec.width * across,
        )

    def _layout(self, height: int, width: int) -> _Layout:
        """Size of the whole resized frame, and where the model's window lies in it."""
        spec = self.spec
        if spec.resize == "stretch":
            return _Layout(spec.height, spec.width, 0, 0)
        by_height = width * spec.height >= height * spec.width  # the frame is wider than the model's input
        if by_height == (spec.resize == "crop"):
            new_height, new_width = spec.height, max(1, width * spec.height // height)
        else:
            new_height, new_width = max(1, height * spec.width // width), spec.width
        return _Layout(
            new_height,
            new_width,
            round((new_height - spec.height) / 2),
            round((new_width - spec.width) / 2),
        )

    def _make_plan(self, height: int, width: int) -> Callable[[Array, Array], None]:
        layout, spec = self._layout(height, width), self.spec
        top, left = max(layout.top, 0), max(layout.left, 0)
        rows = min(layout.height, spec.height)
        columns = min(layout.width, spec.width)
        down = _bands(height, layout.height, top, rows)
        across = _bands(width, layout.width, left, columns)
        first_column = across[0].start
        last_column = across[-1].stop
        tall = np.empty((rows, (last_column - first_column) * 3), np.float32)
        wide = np.empty((rows, columns * 3), np.float32)
        # a pixel's three channels lie side by side, so a column's weight acts on each of them
        spread = [np.ascontiguousarray(np.kron(band.weights, np.eye(3, dtype=np.float32))) for band in across]
        y, x = max(-layout.top, 0), max(-layout.left, 0)
        has_bars = (rows, columns) != (spec.height, spec.width)

        def resize(rgb: Array, out: Array) -> None:
            for band in down:
                strip = rgb[band.start : band.stop, first_column:last_column].reshape(band.stop - band.start, -1)
                _multiply(band.weights, strip.astype(np.float32), tall[band.first : band.last])
            for band, weights in zip(across, spread, strict=True):
                source = tall[:, (band.start - first_column) * 3 : (band.stop - first_column) * 3]
                _multiply(weights, source.T, wide[:, band.first * 3 : band.last * 3].T)
            np.add(wide, 0.5, out=wide)  # weights are positive and sum to one: 0..255 without clipping
            if has_bars:
                out[:] = LETTERBOX_GREY
            out[y : y + rows, x : x + columns] = wide.reshape(rows, columns, 3)

        return resize


def check_frame(rgb: Any) -> None:
    """Raise FrameError unless `rgb` is uint8 [height, width, 3] and not empty."""
    if not isinstance(rgb, np.ndarray):
        hint = "; pass its .rgb" if hasattr(rgb, "rgb") else ""
        raise FrameError(f"frame: expected a numpy array uint8 [height, width, 3], found {type(rgb).__name__}{hint}")
    if rgb.ndim == 2 or (rgb.ndim == 3 and rgb.shape[2] == 1):
        raise FrameError(
            f"frame: expected RGB [height, width, 3], found grey {list(rgb.shape)};"
            " repeat the channel: np.stack([grey] * 3, axis=-1)"
        )
    if rgb.ndim != 3 or rgb.shape[2] != 3:
        hint = ""
        if rgb.ndim == 3 and rgb.shape[2] == 4:
            hint = "; drop the alpha channel: frame[..., :3]"
        elif rgb.ndim == 3 and rgb.shape[0] == 3:
            hint = "; put the channels last: frame.transpose(1, 2, 0)"
        raise FrameError(f"frame: expected shape [height, width, 3], found {list(rgb.shape)}{hint}")
    if rgb.dtype != np.uint8:
        unit = rgb.dtype.kind == "f" and rgb.size and float(np.nanmax(rgb)) <= 1.0
        how = "(frame * 255).round().astype(np.uint8)" if unit else "frame.astype(np.uint8)"
        raise FrameError(f"frame: expected uint8 values 0 to 255, found {rgb.dtype}; convert with {how}")
    if rgb.size == 0:
        raise FrameError(f"frame: expected at least one pixel, found shape {list(rgb.shape)}")


@dataclass(frozen=True)
class _Layout:
    height: int
    width: int
    top: int
    left: int


@dataclass(frozen=True)
class _Band:
    """Output rows first..last are `weights` @ input rows start..stop."""

    first: int
    last: int
    start: int
    stop: int
    weights: Array  # float32 [last - first, stop - start]


def _multiply(weights: Array, source: Array, out: Array) -> None:
    """out = weights @ source, in pieces small enough to stay on this thread"""
    piece = max(1, ONE_THREAD // weights.size)
    for begin in range(0, source.shape[1], piece):
        np.matmul(weights, source[:, begin : begin + piece], out=out[:, begin : begin + piece])


def _bands(size: int, new_size: int, first: int, count: int) -> list[_Band]:
    """Resizing `size` samples to `new_size`, for the output samples first..first + count.

    The filter is Pillow's: a triangle of half-width max(1, size / new_size) about each output's centre, normalised.
    """
    scale = size / new_size
    support = max(scale, 1.0)
    centres = (np.arange(first, first + count) + 0.5) * scale
    starts = np.maximum(np.floor(centres - support + 0.5), 0).astype(int)
    stops = np.minimum(np.floor(centres + support + 0.5), size).astype(int)
    bands = []
    for begin in range(0, count, BLOCK):
        end = min(begin + BLOCK, count)
        start, stop = int(starts[begin]), int(stops[end - 1])
        samples = np.arange(start, stop)
        weights = 1 - np.abs(samples[None] + 0.5 - centres[begin:end, None]) / support
        inside = (samples[None] >= starts[begin:end, None]) & (samples[None] < stops[begin:end, None])
        weights = np.where(inside, np.maximum(weights, 0), 0)
        weights /= weights.sum(axis=1, keepdims=True)
        bands.append(_Band(begin, end, start, stop, weights.astype(np.float32)))
    return bands
