"""Sampling a source down to a rate, by timestamps."""

from __future__ import annotations

import math

from ..errors import SourceError

# Containers round presentation times, to milliseconds at worst: a frame this much early is on time.
ROUNDING = 0.001


class Sampler:
    """Says which frames are due at `rate` frames a second; every one where the rate is None.

    A frame is due when its timestamp reaches the next due time, and the due time then advances by exactly 1
    / rate: a frame that comes late does not delay those after it, so the average rate has no drift. After a
    gap in the timestamps at most one frame is made up for. `tolerance` is how many seconds early a frame may
    be.
    """

    def __init__(self, rate: float | None, tolerance: float = ROUNDING) -> None:
        self._rate = rate
        self._tolerance = tolerance
        self._first: float | None = None
        self._taken = 0  # due times used up, counted so that no rounding accumulates

    def due(self, timestamp: float) -> bool:
        if self._rate is None:
            return True
        if self._first is None:
            self._first = timestamp
        late = timestamp - (self._first + self._taken / self._rate)
        if late < -self._tolerance:
            return False
        self._taken += max(1, int(late * self._rate))
        return True

    def restart(self) -> None:
        """Make the next frame due, whenever it comes: the one that was due turned out to be unusable."""
        self._first = None
        self._taken = 0


def tolerance(fps: float | None) -> float:
    """Seconds that a frame of a source may be early: arrival jitters, and one that comes a bit early is meant."""
    return ROUNDING if fps is None else max(ROUNDING, 0.25 / fps)


def check_rate(rate: float | None) -> None:
    """Raise `SourceError` unless `rate` is None or a number of frames a second."""
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise SourceError(f"rate is {rate:g}: must be a number of frames a second above 0")
