"""Latency as a distribution, in memory that does not grow with the stream."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass

import numpy as np

SMALLEST_MS = 0.01
LARGEST_MS = 1e7
BIN_RATIO = 1.005  # neighbouring bin edges: a percentile is at most 0.25% off
RECENT = 240
QUANTILES = (0.50, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles in milliseconds; all zero where nothing was measured."""

    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in asdict(self).items()}


class Latencies:
    """Latencies of an endless stream.

    Percentiles over everything come from a histogram of fixed size with logarithmic bins (4,156 counters, at
    most 0.25% off; the maximum is exact). Percentiles over recent frames are exact, from the last `recent`
    values.
    """

    def __init__(self, recent: int = RECENT) -> None:
        self._log_ratio = math.log(BIN_RATIO)
        bins = math.ceil(math.log(LARGEST_MS / SMALLEST_MS) / self._log_ratio)
        self._counts = np.zeros(bins, np.int64)
        self._largest = 0.0
        self._recent: deque[float] = deque(maxlen=recent)
        self.count = 0

    def add(self, milliseconds: float) -> None:
        bin_index = int(math.log(max(milliseconds, SMALLEST_MS) / SMALLEST_MS) / self._log_ratio)
        self._counts[min(bin_index, len(self._counts) - 1)] += 1
        self._largest = max(self._largest, milliseconds)
        self._recent.append(milliseconds)
        self.count += 1

    def overall(self) -> Percentiles:
        """Percentiles over every value added."""
        if not self.count:
            return Percentiles()
        cumulative = np.cumsum(self._counts)
        p50, p95, p99 = (self._percentile(cumulative, q) for q in QUANTILES)
        return Percentiles(p50, p95, p99, self._largest)

    def recent(self) -> Percentiles:
        """Percentiles over the most recent values."""
        if not self._recent:
            return Percentiles()
        ordered = sorted(self._recent)
        p50, p95, p99 = (ordered[_rank(q, len(ordered))] for q in QUANTILES)
        return Percentiles(p50, p95, p99, ordered[-1])

    def recent_values(self) -> list[float]:
        """The most recent values in milliseconds, oldest first."""
        return list(self._recent)

    def _percentile(self, cumulative: np.ndarray, q: float) -> float:
        bin_index = int(np.searchsorted(cumulative, _rank(q, self.count), side="right"))
        middle = SMALLEST_MS * math.exp((bin_index + 0.5) * self._log_ratio)
        return min(middle, self._largest)


def _rank(q: float, count: int) -> int:
    """0-based nearest rank of quantile `q` among `count` ordered values."""
    return max(0, math.ceil(q * count) - 1)
