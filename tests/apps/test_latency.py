"""Latency percentiles over everything and over recent frames."""

import sys

import numpy as np
import pytest

from framestep.apps.latency import Latencies, Percentiles


def test_percentiles_equal_those_of_all_values_within_a_quarter_percent() -> None:
    values = np.random.default_rng(0).gamma(3, 15, 20_000)
    latencies = Latencies()
    for value in values:
        latencies.add(value)
    overall = latencies.overall()
    for found, q in ((overall.p50, 50), (overall.p95, 95), (overall.p99, 99)):
        assert found == pytest.approx(np.percentile(values, q, method="inverted_cdf"), rel=0.0026)
    assert overall.max == values.max()


def test_recent_percentiles_forget_old_values() -> None:
    latencies = Latencies(recent=10)
    for value in [1000.0] * 50 + [float(i) for i in range(1, 11)]:
        latencies.add(value)
    assert latencies.recent() == Percentiles(5.0, 10.0, 10.0, 10.0)
    assert latencies.recent_values() == [float(i) for i in range(1, 11)]
    assert latencies.overall().max == 1000.0


def test_memory_does_not_grow_with_the_stream() -> None:
    latencies = Latencies(recent=10)
    latencies.add(1.0)
    counters = sys.getsizeof(latencies._counts)
    for i in range(5_000):
        latencies.add(i % 700)
    assert sys.getsizeof(latencies._counts) == counters
    assert len(latencies.recent_values()) == 10


def test_nothing_measured_gives_zeros() -> None:
    assert Latencies().overall() == Latencies().recent() == Percentiles(0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e12])
def test_extreme_values_are_counted(value: float) -> None:
    latencies = Latencies()
    latencies.add(value)
    assert latencies.count == 1
    assert latencies.overall().max == value
    assert latencies.overall().p50 <= value


def test_one_value_is_every_percentile() -> None:
    latencies = Latencies()
    latencies.add(12.5)
    assert latencies.overall().p50 == pytest.approx(12.5, rel=0.003)
    assert latencies.recent() == Percentiles(12.5, 12.5, 12.5, 12.5)
