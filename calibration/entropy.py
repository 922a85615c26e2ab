"""The range that loses least information, from a histogram: where to cut an activation before it becomes INT8.

The measure and its details are those of `get_entropy_threshold` in `onnxruntime.quantization`, after Szymon Migacz,
"8-bit Inference with TensorRT" (GTC 2017); that function adds up in Python, which takes a second for each activation.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LEVELS = 128  # that a candidate's histogram is merged into
LEAST = 0.0001  # what an empty bin counts as

Counts = npt.NDArray[np.integer]


def entropy_threshold(counts: Counts, edges: npt.NDArray[np.floating], lowest: float, highest: float) -> float:
    """The largest absolute value to represent.

    Of all ranges around zero that have at least `LEVELS` bins, the one whose histogram, with everything outside put
    into its outermost bins, is nearest (Kullback-Leibler divergence) to itself merged into `LEVELS` bins.

    Args:
        counts: of a histogram that is symmetric about zero, [bins], at least `LEVELS`.
        edges: of its bins, [bins + 1].
        lowest, highest: what was seen.
    """
    half = len(counts) // 2
    before = np.concatenate([[0], np.cumsum(counts)])
    best, divergence = LEVELS // 2, np.inf
    for reach in range(LEVELS // 2, half + 1):
        first, stop = half - reach, min(half + reach + 1, len(counts))
        inside = counts[first:stop]
        p = inside.copy()
        p[0] += before[first]
        p[-1] += before[-1] - before[stop]
        found = _divergence(p, _merged(inside, p != 0))
        if found < divergence:
            best, divergence = reach, found
    first, stop = half - best, min(half + best + 1, len(counts))
    return max(abs(max(float(edges[first]), lowest)), abs(min(float(edges[stop]), highest)))


def _merged(counts: Counts, occupied: npt.NDArray[np.bool_]) -> Counts:
    """The same after it was merged into `LEVELS` bins, each of which is spread evenly again. A rest is left empty."""
    width = len(counts) // LEVELS
    starts = np.arange(LEVELS) * width
    shares = np.add.reduceat(occupied[: LEVELS * width], starts, dtype=np.int64)
    sums = np.where(shares > 0, np.add.reduceat(counts, starts), 0)  # the last one has the rest too
    spread = np.zeros_like(counts)
    spread[: LEVELS * width] = np.repeat(sums // np.maximum(shares, 1), width)
    return spread


def _divergence(p: Counts, q: Counts) -> float:
    if not p.any() or not q.any():
        return float("inf")
    p_share, q_share = _smoothed(p), _smoothed(q)
    return float(np.sum(p_share * np.log(p_share / q_share)))


def _smoothed(counts: Counts) -> npt.NDArray[np.float64]:
    """Shares of a whole, none of them zero: what empty bins get is taken from the others."""
    empty = counts == 0
    wide = np.where(empty, LEAST, counts - LEAST * empty.sum() / (~empty).sum())
    return wide / wide.sum()
