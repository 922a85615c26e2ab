"""Segments from scores."""

import numpy as np
import pytest

from framestep.apps.events import Event, EventDetector
from framestep.runtime.errors import FramestepError


def events_of(scores: list[float], on: float = 0.6, off: float = 0.4) -> tuple[list[Event], list[Event]]:
    """Events closed on the way and at the end, for one label at 10 frames a second from index 100."""
    detector = EventDetector(["cat"], on, off)
    closed = [event for i, score in enumerate(scores) for event in detector.update(np.array([score]), i / 10, 100 + i)]
    return closed, detector.finish()


def test_a_segment_has_its_start_end_and_peak() -> None:
    closed, rest = events_of([0.1, 0.7, 0.9, 0.5, 0.2, 0.1])
    assert closed == [Event("cat", 0.1, 0.3, 0.2, 0.9, 101, 103, 102)]
    assert rest == []


def test_a_score_between_the_thresholds_neither_opens_nor_closes() -> None:
    closed, rest = events_of([0.5, 0.59, 0.6, 0.4, 0.59, 0.39, 0.5])
    assert [(event.start_index, event.end_index) for event in closed] == [(102, 104)]
    assert rest == []


def test_a_trembling_score_makes_one_segment() -> None:
    closed, rest = events_of([0.61, 0.59, 0.61, 0.59] * 5 + [0.0])
    assert len(closed) == 1 and rest == []


def test_segments_come_when_they_close_and_open_ones_at_the_end() -> None:
    detector = EventDetector(["cat", "dog"], 0.5, 0.5)
    assert detector.update(np.array([0.9, 0.0]), 0.0, 0) == []
    assert [event.label for event in detector.update(np.array([0.1, 0.8]), 1.0, 1)] == ["cat"]
    assert detector.finish() == [Event("dog", 1.0, 1.0, 1.0, 0.8, 1, 1, 1)]
    assert detector.finish() == []


def test_the_first_of_equal_peaks_counts() -> None:
    closed, _ = events_of([0.7, 0.9, 0.8, 0.9, 0.0])
    assert closed[0].peak_index == 101


def test_labels_may_repeat_without_mixing() -> None:
    detector = EventDetector(["cat", "cat"], 0.5, 0.4)
    detector.update(np.array([0.9, 0.0]), 0.0, 0)
    detector.update(np.array([0.9, 0.7]), 1.0, 1)
    assert [event.peak_score for event in detector.finish()] == [0.9, 0.7]


@pytest.mark.parametrize(
    ("on", "off", "named"),
    [
        (0.0, 0.0, "--on 0"),
        (1.5, 0.5, "--on 1.5"),
        (float("nan"), 0.5, "--on nan"),
        (0.5, 0.6, "--off 0.6"),
        (0.5, 0.0, "--off 0"),
    ],
)
def test_impossible_thresholds_are_refused_by_name(on: float, off: float, named: str) -> None:
    with pytest.raises(FramestepError, match=f"^{named}: must be above 0 and at most "):
        EventDetector(["cat"], on, off)


def test_random_scores_agree_with_a_plain_state_machine() -> None:
    scores = np.random.default_rng(1).random(400)
    expected, start = [], None
    for i, score in enumerate(scores):
        if start is None and score >= 0.8:
            start = i
        elif start is not None and score < 0.3:
            segment = scores[start:i]
            expected.append((start, i - 1, start + int(segment.argmax())))
            start = None
    closed, _ = events_of(scores.tolist(), 0.8, 0.3)
    found = [(e.start_index - 100, e.end_index - 100, e.peak_index - 100) for e in closed]
    assert found == expected and len(found) > 10
