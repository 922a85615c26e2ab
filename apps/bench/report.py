"""The report of a bench, as data. `docs/bench-report.md` documents the schema of its `report.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...runtime.errors import FramestepError
from ...runtime.schema import SchemaError, from_json
from .machine import Machine

VERSION = 1
LEAST_SAMPLES = {95: 20, 99: 100}  # below these a percentile would be an extreme, or nothing at all


@dataclass(frozen=True)
class Latency:
    """A distribution of latencies in milliseconds.

    Attributes:
        samples: how many there are.
        p50: median; over several processes the median of their medians.
        p95, p99: nearest rank; null with fewer than 20 and 100 samples.
    """

    samples: int
    p50: float
    p95: float | None
    p99: float | None
    max: float

    @classmethod
    def of(cls, processes: Sequence[Sequence[float]]) -> Latency:
        """Of the samples of each process, all of which count."""
        pooled = np.sort(np.concatenate([np.asarray(values, float) for values in processes]))
        medians = [float(np.median(values)) for values in processes]
        return cls(
            len(pooled),
            round(float(np.median(medians)), 4),
            percentile(pooled, 95),
            percentile(pooled, 99),
            round(float(pooled[-1]), 4),
        )


def percentile(ordered: np.ndarray, rank: int) -> float | None:
    """Nearest-rank percentile of ascending values; None where there are too few for it to say anything."""
    if len(ordered) < LEAST_SAMPLES[rank]:
        return None
    return round(float(ordered[math.ceil(len(ordered) * rank / 100) - 1]), 4)


@dataclass(frozen=True)
class PositionReport:
    """A path at a stream position.

    Attributes:
        position: frames that the model has seen, the newest included.
        process_p50_ms: the median of each process.
        resident_bytes, peak_bytes: of the process; medians over the processes.
        device_bytes: of the GPU, above what was in use before; null without one.
    """

    position: int
    latency_ms: Latency
    process_p50_ms: tuple[float, ...]
    resident_bytes: int
    peak_bytes: int
    device_bytes: int | None = None


@dataclass(frozen=True)
class Verification:
    """A comparison with the session's outputs.

    Attributes:
        frames: compared, from the first on.
        difference: largest absolute difference of features and pooled.
        tolerance: accepted; null where the path computes in a lower precision and the difference is only told.
        largest_output: largest absolute value among the session's features, to see the difference against.
    """

    frames: int
    difference: float
    tolerance: float | None
    largest_output: float | None = None


@dataclass(frozen=True)
class PathReport:
    """One path, each process alone on the machine.

    Attributes:
        precision: of its arithmetic.
        environment: variables set for its processes.
        verification: null for framestep itself, and where there was nothing to compare with.
        stopped: why it ends before the last asked position, or null.
    """

    name: str
    title: str
    description: str
    precision: str
    threads: int
    processes: int
    environment: dict[str, str]
    positions: tuple[PositionReport, ...]
    verification: Verification | None = None
    stopped: str | None = None

    def at(self, position: int) -> PositionReport | None:
        return next((entry for entry in self.positions if entry.position == position), None)


@dataclass(frozen=True)
class Interleaved:
    """framestep and another path in one process, in turns (A B A B).

    Attributes:
        ratio: framestep's p50 over the other's.
    """

    other: str
    position: int
    framestep_ms: Latency
    other_ms: Latency
    ratio: float


@dataclass(frozen=True)
class StreamsReport:
    """Several streams in one step, in turns with a session of one stream.

    Attributes:
        step_ms: one step of all streams.
        single_ms: a step of a session of one stream, in the same process.
        alone_ms: a step of one stream in the session of `streams`.
        frames_per_second: streams over the median step.
        cost: p50 of the step over p50 of the single one; at most `streams` where batching costs nothing.
        alone_ratio: p50 of `alone_ms` over that of `single_ms`; 1 where room for more streams costs nothing.
    """

    streams: int
    step_ms: Latency
    single_ms: Latency
    alone_ms: Latency
    frames_per_second: float
    cost: float
    alone_ratio: float
    peak_bytes: int


@dataclass(frozen=True)
class Around:
    """Median of the really fed frames around a position of the steady run."""

    position: int
    frames: int
    p50_ms: float


@dataclass(frozen=True)
class SteadyReport:
    """A long run in which every frame is fed.

    Attributes:
        latencies_ms: of each frame, in order.
        drift: median of the last tenth over that of the first tenth.
        spread_ms: standard deviation.
        around: medians around the asked positions that the run passed.
        memory: (frame, resident bytes) in turns: frame, bytes, frame, bytes, ...
        growth_bytes: resident memory at the end less that after the first tenth.
    """

    frames: int
    latency_ms: Latency
    spread_ms: float
    drift: float
    around: tuple[Around, ...]
    growth_bytes: int
    memory: tuple[int, ...]
    latencies_ms: tuple[float, ...]


@dataclass(frozen=True)
class JitterReport:
    """How much of the spread is the machine's: frames in turns with arithmetic that is always the same.

    Attributes:
        frame_ms: of frames.
        fixed_ms: of float32 products of small matrices on as many threads, as many of them as last about a frame.
    """

    frame_ms: Latency
    fixed_ms: Latency


@dataclass(frozen=True)
class SplitReport:
    """Where the time of a frame goes; medians in milliseconds.

    Attributes:
        frame: height, width of the frame that was fed.
        preprocess_ms: resize and crop to the model's input.
        bind_ms: between the session and the engine's library.
        engine_ms: the engine's library.
        results_ms: finding streams, checking that outputs are finite, copying them.
    """

    frame: tuple[int, ...]
    preprocess_ms: float
    bind_ms: float
    engine_ms: float
    results_ms: float
    total_ms: float


@dataclass(frozen=True)
class BundleFacts:
    """The measured bundle."""

    path: str
    family: str
    precision: str
    frame: tuple[int, ...]
    window: int
    state_bytes: int
    checkpoint: str
    backbone_sha256: str


@dataclass(frozen=True)
class Asked:
    """The options of the bench."""

    command: str
    frames: tuple[int, ...]
    streams: tuple[int, ...]
    compare: tuple[str, ...]
    samples: int
    processes: int
    steady: int
    every_frame: bool
    threads: int
    engine: str
    device: str
    budget_s: float
    precision: str = "auto"


@dataclass(frozen=True)
class Report:
    """Everything that a bench found.

    Attributes:
        created: date and time, UTC, ISO 8601.
        seconds: that the bench took.
        engine: the engine taken, and why.
        problems: what could not be measured and why, a line each.
    """

    version: int
    framestep: str
    created: str
    seconds: float
    asked: Asked
    bundle: BundleFacts
    machine: Machine
    engine: str
    paths: tuple[PathReport, ...] = ()
    interleaved: tuple[Interleaved, ...] = ()
    streams: tuple[StreamsReport, ...] = ()
    steady: SteadyReport | None = None
    split: SplitReport | None = None
    jitter: JitterReport | None = None
    problems: tuple[str, ...] = field(default_factory=tuple)

    def path(self, name: str) -> PathReport | None:
        return next((entry for entry in self.paths if entry.name == name), None)


def read_report(path: Path) -> Report:
    """Read a `report.json`.

    Raises:
        FramestepError: missing, or not such a report.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
        if isinstance(values, dict) and values.get("version") != VERSION:
            raise FramestepError(f"{path}: report version {values.get('version')}, this framestep reads {VERSION}")
        return from_json(Report, values)
    except (OSError, ValueError, SchemaError) as error:
        raise FramestepError(f"{path}: not a report of 'framestep bench': {error}") from None
