"""How one path is taken through the positions, with paths that cost nothing."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from framestep.apps.bench.measure import Job, measure_positions
from framestep.apps.bench.paths import OutOfTimeError, PathSpec

SPEC = PathSpec("any", "any.bundle", None, "auto", "cpu", 1)
FRAME = np.zeros((1, 1, 3), np.uint8)


class Ring:
    """Records the position of every measured step."""

    walks = False

    def __init__(self, bytes_each: int = 0, step_s: float = 0.0) -> None:
        self.seen = 0
        self.stepped: list[int] = []
        self._bytes_each, self._step_s = bytes_each, step_s

    def reset(self) -> None:
        self.seen = 0

    def seek(self, seen: int, deadline: float) -> None:
        self.seen = seen

    def step(self, rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.seen += 1
        self.stepped.append(self.seen)
        time.sleep(self._step_s)
        return rgb, rgb

    def bytes_at(self, position: int) -> int:
        return position * self._bytes_each


class Walker(Ring):
    """Must be fed every frame."""

    walks = True

    def seek(self, seen: int, deadline: float) -> None:
        assert seen >= self.seen
        while self.seen < seen:
            if time.perf_counter() > deadline:
                raise OutOfTimeError("out of time")
            self.step(FRAME)


def measure(path: Ring, positions: tuple[int, ...], **job: Any) -> tuple[str | None, dict[int, int]]:
    """Why it stopped, and the number of samples by position."""
    counts: dict[int, int] = {}

    def emit(message: dict[str, Any]) -> None:
        if "position" in message:
            counts[message["position"]["position"]] = len(message["position"]["latencies_ms"])

    options = {"samples": 7, "budget_s": 60.0} | job
    stopped = measure_positions(path, FRAME, Job("latency", SPEC, positions, **options), emit, lambda: 10**9)
    return stopped, counts


def test_ring_is_measured_at_the_very_position() -> None:
    path = Ring()
    stopped, counts = measure(path, (1, 64, 4096))
    assert stopped is None
    assert counts == {1: 7, 64: 7, 4096: 7}
    assert sorted(path.stepped) == [1] * 7 + [64] * 7 + [4096] * 7


def test_positions_are_visited_in_turns() -> None:
    path = Ring()
    measure(path, (1, 64), samples=11)
    assert path.stepped[:2] == [1, 64]
    assert path.stepped[2:12] == [1] * 5 + [64] * 5


def test_walking_path_is_fed_every_frame_and_samples_around_the_position() -> None:
    path = Walker()
    _, counts = measure(path, (16,), samples=1)
    assert path.stepped == list(range(1, 19))
    assert counts == {16: 5}  # 14 to 18


def test_walking_path_starts_afresh_for_each_walk() -> None:
    path = Walker()
    measure(path, (4,), samples=2)
    assert path.stepped == [1, 2, 3, 4, 1, 2, 3, 4]


def test_position_beyond_memory_stops_with_a_line() -> None:
    stopped, counts = measure(Ring(bytes_each=10**7), (1, 64, 256))
    assert list(counts) == [1, 64]
    assert stopped is not None
    assert "position 256 needs about 2.6 GB of memory, 1.0 GB are free" in stopped


def test_position_beyond_the_time_stops_with_a_line() -> None:
    stopped, counts = measure(Walker(step_s=0.002), (1, 4, 4096), samples=1, budget_s=0.5)
    assert list(counts) == [1, 4]
    assert stopped is not None
    assert "position 4096" in stopped
    assert "budget" in stopped


def test_position_64_is_taken_whatever_the_budget() -> None:
    stopped, counts = measure(Walker(step_s=0.001), (1, 16, 64, 4096), samples=50, budget_s=0.02)
    assert list(counts) == [1, 16, 64]
    assert stopped is not None


def test_out_of_memory_on_the_way_keeps_what_was_measured() -> None:
    class Full(Ring):
        def step(self, rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            if self.seen >= 255:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return super().step(rgb)

    stopped, counts = measure(Full(), (1, 256))
    assert stopped == "out of memory at position 256"
    assert counts == {1: 7}


def test_another_error_is_not_taken_for_memory() -> None:
    class Broken(Ring):
        def step(self, rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        measure(Broken(), (1,))
