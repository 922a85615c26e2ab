"""Where in a frame each label is: a model's patch scores, brought to the frame's own pixels.

Bilinear between the centres of the patches, as torch's `interpolate(mode="bilinear", align_corners=False)`; beyond the
outermost centres the outermost patches go on. Pixels that the model did not see, because its input is cropped out of
the frame, are marked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import FrameError
from .preprocess import Preprocess

Array = npt.NDArray[Any]
NOT_SEEN = -1
BLOCK_VALUES = 1 << 18  # upsampled at a time: 1 MiB, which stays in the cache until it has been reduced


@dataclass(frozen=True, slots=True)
class ClassMap:
    """Which label each pixel belongs to.

    Attributes:
        classes: int32 [height, width], index of the likeliest label; NOT_SEEN where the model did not look.
        probability: float32 [height, width], that label's softmax probability; 0 where the model did not look.
    """

    classes: Array
    probability: Array


def class_map(
    patch_scores: Array, height: int, width: int, preprocess: Preprocess, size: tuple[int, int] | None = None
) -> ClassMap:
    """Softmax over the labels of the bilinearly upsampled logits.

    Args:
        patch_scores: sigmoid scores, float [labels, grid_h, grid_w], as in a `Result`.
        height, width: of the frame that was stepped.
        preprocess: the session's (`session.preprocess`).
        size: height and width of the map, where it is to show the frame at another size than its own.

    Raises:
        FrameError: `patch_scores` has another shape.
    """
    placed = _Placed(logits(patch_scores), height, width, preprocess, size)
    classes = np.full(placed.size, NOT_SEEN, np.int32)
    probability = np.zeros(placed.size, np.float32)
    for rows, block in placed.blocks():
        best = block.max(axis=0)
        into = classes[rows, placed.columns.seen]
        for label in reversed(range(len(block))):  # many times as fast as argmax, which goes pixel by pixel
            np.copyto(into, label, where=block[label] == best)
        block -= best
        probability[rows, placed.columns.seen] = 1 / np.exp(block, out=block).sum(axis=0)
    return ClassMap(classes, probability)


def score_maps(
    patch_scores: Array, height: int, width: int, preprocess: Preprocess, size: tuple[int, int] | None = None
) -> Array:
    """Every label's score in every pixel: the patch scores, bilinearly upsampled.

    Args:
        patch_scores, height, width, preprocess, size: as for `class_map`.

    Returns:
        float32 [labels, height, width], NaN where the model did not look.

    Raises:
        FrameError: `patch_scores` has another shape.
    """
    placed = _Placed(patch_scores, height, width, preprocess, size)
    maps = np.full((len(patch_scores), *placed.size), np.nan, np.float32)
    for rows, block in placed.blocks():
        maps[:, rows, placed.columns.seen] = block
    return maps


def logits(scores: Array) -> Array:
    """What the sigmoid was taken of, float32. Scores that were rounded to 0 or 1 count as the next float to it."""
    smallest, largest = np.finfo(np.float32).tiny, np.nextafter(np.float32(1), np.float32(0))
    p = np.clip(np.asarray(scores, np.float32), smallest, largest)
    return np.asarray(np.log(p) - np.log1p(-p))


class _Placed:
    """Grids [labels, grid_h, grid_w] laid over a frame, and what they give in its pixels."""

    def __init__(
        self, grids: Array, height: int, width: int, preprocess: Preprocess, size: tuple[int, int] | None
    ) -> None:
        if grids.ndim != 3:
            raise FrameError(f"patch scores: expected [labels, grid_h, grid_w], found {list(grids.shape)}")
        self.size = (height, width) if size is None else size
        top, left, region_height, region_width = preprocess.region(height, width)
        self.rows = _Axis.over(top / height, region_height / height, grids.shape[1], self.size[0])
        self.columns = _Axis.over(left / width, region_width / width, grids.shape[2], self.size[1])
        self._wide = self.columns.interpolate(grids.astype(np.float32), 2)  # [labels, grid_h, columns seen]

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Consecutive rows of the map, and their values [labels, rows, columns seen]."""
        # Weighted sums of rows instead of one matrix product, which would wake BLAS's threads: they would then spin on
        # the cores that the engine needs for the next frame.
        seen = self.rows.seen
        count = max(1, BLOCK_VALUES // max(1, self._wide.shape[0] * self._wide.shape[2]))
        for begin in range(seen.start, seen.stop, count):
            rows = slice(begin, min(begin + count, seen.stop))
            part = slice(rows.start - seen.start, rows.stop - seen.start)
            yield rows, self.rows.interpolate(self._wide, 1, part)


@dataclass(frozen=True, slots=True)
class _Axis:
    """One side of a map: which of its pixels the model saw, and the two patches that each of those lies between."""

    seen: slice
    first: Array  # int [seen]
    second: Array
    weight: Array  # float32 [seen], of the second

    @classmethod
    def over(cls, start: float, extent: float, patches: int, pixels: int) -> _Axis:
        """`start` and `extent` of what the model saw, as shares of this side, which has `pixels` pixels."""
        centres = (np.arange(pixels) + 0.5) / pixels
        inside = np.flatnonzero((centres > start) & (centres < start + extent))
        seen = slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)
        at = np.clip((centres[seen] - start) / extent * patches - 0.5, 0, patches - 1)
        first = np.minimum(at.astype(int), max(patches - 2, 0))
        second = np.minimum(first + 1, patches - 1)
        return cls(seen, first, second, (at - first).astype(np.float32))

    def interpolate(self, values: Array, axis: int, part: slice = slice(None)) -> Array:
        """`values` [labels, y, x] between the patches along `axis`, at the pixels `part` of those seen."""
        weight = self.weight[part].reshape((-1, 1) if axis == 1 else -1)
        low = values.take(self.first[part], axis)
        high = values.take(self.second[part], axis)
        high -= low
        high *= weight
        high += low
        return high
