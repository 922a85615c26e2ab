"""Sampling of sources by rate."""

from __future__ import annotations

import math

import numpy as np
import pytest

from framestep.runtime.errors import SourceError
from framestep.runtime.sources import open_source
from framestep.runtime.sources.sampling import Sampler


def taken(rate: float | None, timestamps: np.ndarray, tolerance: float = 0.001) -> list[int]:
    sampler = Sampler(rate, tolerance)
    return [index for index, timestamp in enumerate(timestamps) if sampler.due(float(timestamp))]


def test_each_due_time_takes_the_first_frame_at_or_after_it() -> None:
    assert taken(4, np.arange(32) / 25) == [0, 7, 13, 19, 25]


@pytest.mark.parametrize(("fps", "rate"), [(25, 4), (30, 7), (29.97, 4), (60, 59), (24, 23.976), (30, 0.3)])
def test_the_average_rate_has_no_drift(fps: float, rate: float) -> None:
    timestamps = np.arange(round(1000 * fps)) / fps  # a thousand seconds
    indices = taken(rate, timestamps)
    assert abs(len(indices) - 1000 * rate) <= 1
    lateness = timestamps[indices] - np.arange(len(indices)) / rate
    assert lateness.min() >= -0.001
    assert lateness.max() < 1 / fps


@pytest.mark.parametrize(("fps", "rate"), [(25, 5), (30, 10), (30, 15), (24, 8), (30, 30)])
def test_a_rate_that_divides_the_fps_takes_evenly_spaced_frames_from_rounded_timestamps(fps: int, rate: int) -> None:
    indices = taken(rate, np.round(np.arange(600) / fps, 3))
    assert indices == list(range(0, 600, fps // rate))


def test_a_rate_above_the_fps_takes_every_frame_once() -> None:
    assert taken(100, np.arange(50) / 25) == list(range(50))


def test_without_a_rate_every_frame_is_taken() -> None:
    assert taken(None, np.zeros(5)) == list(range(5))


def test_after_a_gap_no_burst_makes_up_for_it() -> None:
    timestamps = np.concatenate([np.arange(25) / 25, 100.02 + np.arange(100) / 25])
    after = [index for index in taken(4, timestamps) if index >= 25]
    assert len(after) <= 4 * 4 + 1
    assert after[0] == 25


def test_jittering_arrivals_keep_the_rate() -> None:
    rng = np.random.default_rng(0)
    timestamps = np.arange(3000) / 30 + rng.uniform(-0.007, 0.007, 3000)
    assert len(taken(30, timestamps, tolerance=0.25 / 30)) >= 2970
    assert abs(len(taken(10, timestamps, tolerance=0.25 / 30)) - 1000) <= 1


def test_rate_above_the_fps_is_reported_once() -> None:
    reports: list[str] = []
    frames = list(open_source("synthetic:frames=10,fps=5", rate=30, on_report=reports.append))
    assert len(frames) == 10
    assert len(reports) == 1
    assert "rate 30 is above the source's 5 frames a second" in reports[0]


def test_index_counts_the_frames_before_sampling() -> None:
    frames = list(open_source("synthetic:frames=50,fps=25", rate=5))
    assert [frame.index for frame in frames] == list(range(0, 50, 5))
    assert [frame.timestamp for frame in frames] == [index / 25 for index in range(0, 50, 5)]


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf])
def test_impossible_rate_is_an_error(rate: float) -> None:
    with pytest.raises(SourceError, match="rate is"):
        open_source("synthetic", rate=rate)
