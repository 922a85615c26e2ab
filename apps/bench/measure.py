"""The process that measures: one job from standard input, lines of JSON to standard output.

Such a process is started afresh for every job, so that no path inherits another's allocator or thread pools. Lines are
`{"progress": 0..1}`, `{"position": {...}}` as each position is done, and at the end `{"result": {...}}` or
`{"error": "..."}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime.bundle import Bundle
from ...runtime.counted import counted
from ...runtime.errors import FramestepError
from ...runtime.schema import from_json, to_json
from .baselines import make_path
from .fixed_work import FixedWork
from .machine import gpu_memory_used, memory_available, reset_peak, resident
from .paths import (
    FRAMESTEP,
    OUTPUTS,
    FramestepPath,
    MeasuredPath,
    OutOfTimeError,
    PathSpec,
    frame_at,
    window_of,
)
from .pytorch_paths import WholeClip, bidirectional_difference

Array = npt.NDArray[Any]
GUARANTEED = 64  # every baseline is taken at least up to here, whatever its time budget
WARM_UP = 3
BLOCK = 5  # samples at one position before the next position has its turn
CAMERA_FRAME = (720, 1280, 3)
CHECKED_FRAMES = 18  # at most; enough to wrap a ring of 16
MEMORY_MARGIN = 0.9  # of the free memory; the rest is for what the estimate leaves out


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
        kind: a key of `JOBS`.
        other: the path that is measured in turns with `path`, or "".
        positions: stream positions, the first frame being 1.
        samples: latencies wanted at each position, or rounds, or frames, depending on the kind.
        streams: streams of the session.
        budget_s: seconds for all positions; beyond `GUARANTEED` none is begun that would take longer.
        reference: file of the session's outputs.
    """

    kind: str
    path: PathSpec
    positions: tuple[int, ...] = (1,)
    samples: int = 1
    streams: int = 1
    budget_s: float = float("inf")
    other: str = ""
    reference: str = ""


@dataclass
class PositionSamples:
    """Latencies at a stream position, and the memory of the process there.

    The memory is that of the first visit, before any later position was visited.

    Attributes:
        device_bytes: of the GPU, above what was in use before; None without one.
    """

    position: int
    latencies_ms: list[float] = field(default_factory=list)
    resident_bytes: int = 0
    peak_bytes: int = 0
    device_bytes: int | None = None


Emit = Callable[[dict[str, Any]], None]


def main() -> int:
    """Run the job on standard input."""
    # libraries print to standard output as they like; ours is kept apart from it
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(message: dict[str, Any]) -> None:
        lines.write(json.dumps(message) + "\n")
        lines.flush()

    job = from_json(Job, json.load(sys.stdin))
    try:
        result = JOBS[job.kind](job, emit)
    except FramestepError as error:
        emit({"error": str(error)})
        return 0
    except MemoryError:
        emit({"error": f"{job.path.name}: out of memory"})
        return 0
    emit({"result": result})
    return 0


def measure_reference(job: Job, emit: Emit) -> dict[str, Any]:
    """The session's outputs for the first frames, into the reference file; and how long a step takes."""
    path = FramestepPath(job.path)
    frames = [frame_at(path.manifest, index) for index in range(checked_frames(path.manifest))]
    outputs, latencies = [], []
    for frame in frames:
        start = time.perf_counter()
        outputs.append(path.step(frame))
        latencies.append(time.perf_counter() - start)
    features, pooled = (np.stack(part) for part in zip(*outputs, strict=True))
    np.savez(job.reference, features=features, pooled=pooled)
    return {"step_ms": float(np.median(latencies)) * 1e3, "precision": path.session.precision}


def measure_difference(job: Job, emit: Emit) -> dict[str, Any]:
    """How far a baseline is from the session on the frames that both see with the same memory."""
    path = make_path(job.path)
    manifest = Bundle.open(job.path.bundle, verify=False).manifest
    with np.load(job.reference) as file:
        features, pooled = file["features"], file["pooled"]
    if job.path.name == "pytorch-bidirectional":
        assert isinstance(path, WholeClip)
        # its first frame is any path's; from the second on it has a definition of its own
        clip = np.stack([frame_at(manifest, index) for index in range(min(4, window_of(manifest) + 1))])
        first = path._encode(clip[:1])
        found = max(float(np.abs(first[0] - features[0]).max()), float(np.abs(first[1] - pooled[0]).max()))
        return {"frames": len(clip), "difference": max(found, bidirectional_difference(path, clip))}
    # a ring forgets and a growing cache does not: beyond the window they are different functions
    unlimited = path.walks or isinstance(path, WholeClip)
    count = min(len(features), window_of(manifest)) if unlimited else len(features)
    steps = range(count)
    if isinstance(path, WholeClip):
        steps = sorted({0, count // 4, count - 1})  # type: ignore[assignment]
    path.reset()
    largest = 0.0
    for index in steps:
        if isinstance(path, WholeClip):
            path.seek(index, float("inf"))
        found_features, found_pooled = path.step(frame_at(manifest, index))
        largest = max(largest, float(np.abs(found_features - features[index]).max()))
        largest = max(largest, float(np.abs(found_pooled - pooled[index]).max()))
        emit({"progress": (index + 1) / count})
    return {
        "frames": count,
        "difference": largest,
        "precision": getattr(path, "precision", ""),
        "largest_output": float(np.abs(features).max()),
    }


def checked_frames(manifest: Any) -> int:
    """Frames whose outputs are compared: the ring wraps where it is not too long."""
    return min(window_of(manifest) + 2, CHECKED_FRAMES)


def measure_latency(job: Job, emit: Emit) -> dict[str, Any]:
    """One path alone: latencies at each position."""
    gpu_before = gpu_memory_used() if job.path.device == "cuda" else None
    path = make_path(job.path)
    rgb = frame_at(Bundle.open(job.path.bundle, verify=False).manifest, 10_000)
    warm_up(path, rgb)
    stopped = measure_positions(path, rgb, job, emit, gpu_before=gpu_before)
    return {"stopped": stopped}


def measure_positions(
    path: MeasuredPath,
    rgb: Array,
    job: Job,
    emit: Emit,
    available: Callable[[], int] = memory_available,
    gpu_before: int | None = None,
) -> str | None:
    """Visit the positions in turns until each has its samples, or until time or memory is up.

    A first round takes each position once, shortest first, so that a path gets as far as it can; then the rounds go on
    until every position has its samples, so that a drift of the machine touches all positions alike.

    Returns:
        Why it stopped before the last position, or None.
    """
    begin = time.perf_counter()
    found: dict[int, PositionSamples] = {}
    cost: dict[int, float] = {}  # seconds that the last sample, or walk, took
    typical: dict[int, float] = {}  # median latency in ms of the first visit
    stopped = None
    hard_deadline = begin + 3 * job.budget_s + 600  # also for the guaranteed positions
    for position in job.positions:
        needed, free = path.bytes_at(position), available()
        if needed > MEMORY_MARGIN * free:
            stopped = f"position {position} needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
            break
        left = begin + job.budget_s - time.perf_counter()
        expected = _expected_s(typical, position, path)
        if position > GUARANTEED and expected > left:
            stopped = f"position {position} would take about {expected:.0f} s more, past the budget of the process"
            stopped += f" ({job.budget_s:.0f} s)"
            break
        deadline = hard_deadline if position <= GUARANTEED else begin + job.budget_s
        start = time.perf_counter()
        reset_peak()
        try:
            samples = _block(path, rgb, position, 1, deadline)
        except OutOfTimeError:
            stopped = f"position {position} was not reached in the budget of the process ({job.budget_s:.0f} s)"
            break
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
                raise
            stopped = f"out of memory at position {position}"
            break
        cost[position] = time.perf_counter() - start
        typical[position] = float(np.median(samples))
        memory = resident()
        gpu = gpu_memory_used() if gpu_before is not None else None
        device_bytes = gpu - gpu_before if gpu is not None and gpu_before is not None else None
        found[position] = PositionSamples(position, samples, memory.now, memory.peak, device_bytes)
        emit({"position": to_json(found[position])})
        emit({"progress": len(found) / len(job.positions) * 0.2})
    wanted = max(1, job.samples)
    while open_positions := [p for p in found if len(found[p].latencies_ms) < wanted]:
        progressed = False
        for position in open_positions:
            entry = found[position]
            left = begin + job.budget_s - time.perf_counter()
            count = 1 if cost[position] > left / 20 else min(BLOCK, wanted - len(entry.latencies_ms))
            if cost[position] * count > left:
                continue
            start = time.perf_counter()
            entry.latencies_ms += _block(path, rgb, position, count, float("inf"))
            cost[position] = (time.perf_counter() - start) / count
            progressed = True
        if not progressed:
            break
        done = sum(min(len(entry.latencies_ms), wanted) for entry in found.values()) / (wanted * len(found))
        spent = (time.perf_counter() - begin) / job.budget_s
        emit({"progress": min(1.0, 0.2 + 0.8 * max(done, spent))})
    for entry in found.values():
        emit({"position": to_json(entry)})
    return stopped


def _block(path: MeasuredPath, rgb: Array, position: int, count: int, deadline: float) -> list[float]:
    """Latencies in ms at a position: `count` at it exactly, or, where every frame must be fed, `count` walks from the
    first frame to it, of which the frames within an eighth of the position count."""
    latencies = []
    for _ in range(count):
        if not path.walks:
            path.seek(position - 1, deadline)
            latencies.append(_timed(path, rgb))
            continue
        around = position // 8
        path.reset()
        path.seek(position - 1 - around, deadline)
        latencies += [_timed(path, rgb) for _ in range(2 * around + 1)]
    return latencies


def _timed(path: MeasuredPath, rgb: Array) -> float:
    start = time.perf_counter()
    path.step(rgb)
    return (time.perf_counter() - start) * 1e3


def _expected_s(typical: dict[int, float], position: int, path: MeasuredPath) -> float:
    """Seconds that a first visit of this position will take, from the latencies at the two positions before."""
    if not typical:
        return 0.0
    *_, last = typical
    power = 1.0
    if len(typical) > 1:
        *_, before, last = typical
        power = float(np.log(typical[last] / typical[before]) / np.log(last / before))
    latency = typical[last] * float((position / last) ** min(max(power, 0.0), 1.5)) / 1e3
    if not path.walks:
        return latency
    return 1.125 * position * (typical[last] / 1e3 + latency) / 2


def warm_up(path: MeasuredPath, rgb: Array) -> None:
    """Take first times out of the measurement; a ring is filled with frames here."""
    for _ in range(WARM_UP):
        path.step(rgb)
    path.reset()
    path.seek(0, float("inf"))


def measure_interleaved(job: Job, emit: Emit) -> dict[str, Any]:
    """Ours and a baseline in one process, in turns: A B A B."""
    position = job.positions[0]
    ours: MeasuredPath = make_path(replace(job.path, name=FRAMESTEP))
    other = make_path(replace(job.path, name=job.other))
    rgb = frame_at(Bundle.open(job.path.bundle, verify=False).manifest, 10_000)
    a: list[float] = []
    b: list[float] = []
    for path in (ours, other):
        warm_up(path, rgb)
    for turn in range(job.samples):
        a += _block(ours, rgb, position, BLOCK, float("inf"))
        b += _block(other, rgb, position, 1 if other.walks else BLOCK, float("inf"))
        emit({"progress": (turn + 1) / job.samples})
    return {"a_ms": a, "b_ms": b}


def measure_streams(job: Job, emit: Emit) -> dict[str, Any]:
    """N streams in one step, and one stream alone in a session of N, in turns with a session of one stream."""
    one = FramestepPath(job.path)
    manifest = one.manifest
    needed = job.streams * one.session.bundle.bytes_per_stream()
    if needed > MEMORY_MARGIN * memory_available():
        raise FramestepError(
            f"{counted(job.streams, 'stream')}: {needed / 1e9:.1f} GB of state memory are needed, which are not free"
        )
    many = FramestepPath(job.path, job.streams)
    streams = [many.stream, *(many.session.open_stream() for _ in range(job.streams - 1))]
    rgb = frame_at(manifest, 10_000)
    window = window_of(manifest)
    everyone = dict.fromkeys(streams, rgb)
    for _ in range(window):
        one.step(rgb)
        many.session.step(everyone)
    single: list[float] = []
    together: list[float] = []
    alone: list[float] = []
    while len(together) < job.samples:
        for _ in range(BLOCK):
            single.append(_timed(one, rgb))
        for _ in range(BLOCK):
            start = time.perf_counter()
            results = many.session.step(everyone)
            together.append((time.perf_counter() - start) * 1e3)
            assert all(name in results[streams[0]] for name in OUTPUTS)
        for _ in range(BLOCK):
            alone.append(_timed(many, rgb))
        emit({"progress": min(1.0, len(together) / job.samples)})
    memory = resident()
    return {"single_ms": single, "together_ms": together, "alone_ms": alone, "peak_bytes": memory.peak}


def measure_steady(job: Job, emit: Emit) -> dict[str, Any]:
    """A long run in which every frame is really fed, from the first on."""
    path = FramestepPath(job.path)
    rgb = [frame_at(path.manifest, 10_000 + index) for index in range(8)]
    warm_up(path, rgb[0])
    latencies = np.empty(job.samples)
    memory: list[tuple[int, int]] = []
    every = max(1, job.samples // 100)
    for index in range(job.samples):
        start = time.perf_counter()
        path.step(rgb[index % len(rgb)])
        latencies[index] = (time.perf_counter() - start) * 1e3
        if index % every == 0 or index == job.samples - 1:
            memory.append((index + 1, resident().now))
            emit({"progress": (index + 1) / job.samples})
    return {"latencies_ms": latencies.tolist(), "memory": memory}


def measure_jitter(job: Job, emit: Emit) -> dict[str, Any]:
    """Frames in turns with arithmetic that lasts as long as a frame on as many cores."""
    path = FramestepPath(job.path)
    rgb = frame_at(path.manifest, 10_000)
    warm_up(path, rgb)
    work = FixedWork(job.path.threads, float(np.median([_timed(path, rgb) for _ in range(BLOCK)])))
    frames: list[float] = []
    fixed: list[float] = []
    while len(frames) < job.samples:
        frames.append(_timed(path, rgb))
        fixed.append(work.run())
        emit({"progress": len(frames) / job.samples})
    return {"frame_ms": frames, "fixed_ms": fixed}


def measure_split(job: Job, emit: Emit) -> dict[str, Any]:
    """Where the time of a camera-sized frame goes."""
    path = FramestepPath(job.path)
    session: Any = path.session
    engine = session._engine
    rgb = np.random.default_rng(0).integers(0, 256, CAMERA_FRAME, np.uint8)
    parts: dict[str, list[float]] = {name: [] for name in ("preprocess", "bind", "engine", "results", "total")}
    for index in range(job.samples + WARM_UP):
        start = time.perf_counter()
        path.step(rgb)
        total = (time.perf_counter() - start) * 1e3
        if index < WARM_UP:
            continue
        times = engine.last_step(path.stream.slot)
        parts["preprocess"].append(times.preprocess)
        parts["bind"].append(times.total - times.preprocess - times.engine)
        parts["engine"].append(times.engine)
        parts["results"].append(total - times.total)
        parts["total"].append(total)
        emit({"progress": (index + 1) / (job.samples + WARM_UP)})
    return parts


JOBS: dict[str, Callable[[Job, Emit], dict[str, Any]]] = {
    "reference": measure_reference,
    "difference": measure_difference,
    "latency": measure_latency,
    "interleaved": measure_interleaved,
    "streams": measure_streams,
    "steady": measure_steady,
    "jitter": measure_jitter,
    "split": measure_split,
}
