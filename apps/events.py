"""Segments of video in which a label holds, from its score in every frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..runtime.errors import FramestepError


@dataclass(frozen=True, slots=True)
class Event:
    """One segment. Times are timestamps of the source in seconds, indices are frame indices of the source.

    `end` is the last frame that held the segment open, `peak` the first frame with the highest score.
    """

    label: str
    start: float
    end: float
    peak: float
    peak_score: float
    start_index: int
    end_index: int
    peak_index: int

    def as_dict(self) -> dict[str, Any]:
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}


class EventDetector:
    """Turns scores into events with hysteresis, as they come.

    A segment of a label opens with the first frame that scores at least `on`, and closes with the first later
    frame that scores less than `off` (`off <= on`), so that a score trembling about one threshold makes one
    segment.
    """

    def __init__(self, labels: Sequence[str], on: float, off: float) -> None:
        if not 0 < on <= 1:
            raise FramestepError(f"--on {on:g}: must be above 0 and at most 1")
        if not 0 < off <= on:
            raise FramestepError(f"--off {off:g}: must be above 0 and at most --on ({on:g})")
        self._labels = tuple(labels)
        self._on = on
        self._off = off
        self._open: dict[int, Event] = {}

    def update(self, scores: np.ndarray, timestamp: float, index: int) -> list[Event]:
        """The events that this frame's `scores` [labels] closed."""
        closed = []
        for position, score in enumerate(scores.tolist()):
            event = self._open.get(position)
            if event is None:
                if score >= self._on:
                    self._open[position] = Event(
                        self._labels[position], timestamp, timestamp, timestamp, score, index, index, index
                    )
            elif score < self._off:
                closed.append(self._open.pop(position))
            else:
                self._open[position] = _extended(event, score, timestamp, index)
        return closed

    def finish(self) -> list[Event]:
        """The events still open when the stream ends."""
        closed = list(self._open.values())
        self._open.clear()
        return closed


def _extended(event: Event, score: float, timestamp: float, index: int) -> Event:
    peak, peak_score, peak_index = event.peak, event.peak_score, event.peak_index
    if score > peak_score:
        peak, peak_score, peak_index = timestamp, score, index
    return Event(event.label, event.start, timestamp, peak, peak_score, event.start_index, index, peak_index)
