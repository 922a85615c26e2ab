"""What a bench makes of samples: the figures that a report is read for, from samples of which all is known."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from framestep.apps.bench.measure import Job, PositionSamples
from framestep.apps.bench.paths import PathSpec
from framestep.apps.bench.report import Around, Latency, read_report
from framestep.apps.bench.report_files import write_report
from framestep.apps.bench.results import interleaved, jitter, position_report, split, steady, streams
from framestep.runtime.errors import OutputError

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "epyc-zen4-2-cores" / "base" / "report.json"


def job(**changes) -> Job:
    return Job("any", PathSpec("framestep", "a.bundle", "", "auto", "cpu", 1), **changes)


def test_of_two_paths_in_turns_the_ratio_is_ours_over_the_others() -> None:
    found = interleaved(job(other="pytorch-ring", positions=(16,)), {"a_ms": [9.0, 10.0, 30.0], "b_ms": [40.0] * 3})
    assert (found.other, found.position, found.ratio) == ("pytorch-ring", 16, 0.25)
    assert (found.framestep_ms, found.other_ms) == (Latency.of([[9.0, 10.0, 30.0]]), Latency.of([[40.0] * 3]))


def test_several_streams_are_told_by_what_they_cost_against_one() -> None:
    samples = {"together_ms": [8.0, 8.0, 20.0], "single_ms": [2.5] * 3, "alone_ms": [2.0] * 3, "peak_bytes": 7}
    found = streams(job(streams=4), samples)
    assert found.frames_per_second == 500.0  # four frames in 8 ms
    assert (found.cost, found.alone_ratio) == (3.2, 0.8)
    assert (found.step_ms.p50, found.single_ms.p50, found.alone_ms.p50) == (8.0, 2.5, 2.0)
    assert (found.streams, found.peak_bytes) == (4, 7)


def test_a_steady_run_is_told_by_its_drift_its_spread_and_its_growth() -> None:
    latencies = [10.0] * 20 + [12.0] * 160 + [11.0] * 20
    memory = [(1, 50), (10, 90), (21, 100), (100, 120), (200, 130)]
    found = steady({"latencies_ms": latencies, "memory": memory}, (1, 16, 184, 400))
    assert (found.frames, found.latency_ms.max) == (200, 12.0)
    assert found.drift == 1.1  # the last 20 frames over the first 20
    assert found.spread_ms == 0.6403  # the mean is 11.7, the variance 0.1 * 1.7² + 0.8 * 0.3² + 0.1 * 0.7²
    assert found.growth_bytes == 30  # since frame 21
    assert found.memory == (1, 50, 10, 90, 21, 100, 100, 120, 200, 130)
    # an eighth of the position to both sides, as far as the run goes
    assert found.around == (Around(1, 1, 10.0), Around(16, 5, 10.0), Around(184, 40, 11.5))


def test_memory_at_a_position_is_the_median_over_processes() -> None:
    found = position_report(
        64,
        [
            PositionSamples(64, [1.0, 2.0, 9.0], resident_bytes=10, peak_bytes=300),
            PositionSamples(64, [4.0], resident_bytes=30, peak_bytes=100),
            PositionSamples(64, [3.0], resident_bytes=20, peak_bytes=200),
        ],
    )
    assert (found.process_p50_ms, found.latency_ms.p50, found.latency_ms.samples) == ((2.0, 4.0, 3.0), 3.0, 5)
    assert (found.resident_bytes, found.peak_bytes, found.device_bytes) == (20, 200, None)


def test_the_parts_of_a_frame_are_medians_of_their_own() -> None:
    parts = {"preprocess": 1.0, "bind": 2.0, "engine": 3.0, "results": 4.0, "total": 10.0}
    found = split({name: [value, value, 99.0] for name, value in parts.items()})
    told = (found.preprocess_ms, found.bind_ms, found.engine_ms, found.results_ms, found.total_ms)
    assert told == (1.0, 2.0, 3.0, 4.0, 10.0)
    assert found.frame == (720, 1280)


def test_the_machines_own_jitter_stands_beside_the_frames() -> None:
    found = jitter({"frame_ms": [5.0, 9.0], "fixed_ms": [4.0, 4.5]})
    assert (found.frame_ms.max, found.fixed_ms.max) == (9.0, 4.5)


def test_an_earlier_report_stays_where_the_new_one_finds_no_room(tmp_path, monkeypatch) -> None:
    report = read_report(COMMITTED)
    write_report(report, tmp_path, [])
    before = (tmp_path / "report.json").read_bytes()
    assert read_report(tmp_path / "report.json") == report

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"report.json: cannot be written: No space left on device"):
        write_report(report, tmp_path, [])
    assert (tmp_path / "report.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
