"""`framestep run`: frames from sources, through one session, into files, a window and a status line.

Several sources are streams of one session. Live sources give the newest frame there is, files every frame in order.
A file that can no longer be written is given up with a report; the others are finished.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import cv2
import numpy as np

from ..runtime.bundle import Bundle, Manifest
from ..runtime.errors import FramestepError, OutputError, SourceError
from ..runtime.preprocess import Preprocess
from ..runtime.session import NonFiniteOutputError, Result, Session, Stream, load
from ..runtime.sources import Frame, Source, open_source
from .annotate import Annotator, Shown, check_overlay
from .events import Event, EventDetector
from .latency import Latencies, Percentiles
from .record import ArrayRecorder, JsonLines, VideoRecorder, check_writable
from .status import LaneStatus, Status

LARGEST_LISTED = 4096  # values of one output that fit into a line of JSON
WARM_UP_STEPS = 3
DEFAULT_RECORD_FPS = 30.0
MAX_RECORD_FPS = 240.0
OFF_PER_ON = 0.75
WAIT_S = 0.05  # how soon a signal is noticed while no live source has a frame


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What `framestep run` was asked for; see its help."""

    bundle: Path
    sources: tuple[str, ...]
    width: int | None = None
    height: int | None = None
    camera_fps: float | None = None
    fourcc: str | None = None
    rate: float | None = None
    engine: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    outputs: tuple[str, ...] = ()
    output: Path | None = None
    events: Path | None = None
    on: float = 0.5
    off: float | None = None
    record: Path | None = None
    overlay: str | None = None
    show: bool = False
    save_features: Path | None = None
    max_frames: int | None = None
    deadline_ms: float | None = None

    @property
    def off_threshold(self) -> float:
        return self.on * OFF_PER_ON if self.off is None else self.off


@dataclass(frozen=True)
class SourceSummary:
    """What became of one source."""

    source: str
    frames: int
    dropped: int
    bad_frames: int
    non_finite: int
    latency_ms: Percentiles


@dataclass(frozen=True)
class Summary:
    """What a run did. `errors` are those that did not stop it: files given up, sources lost."""

    bundle: str
    engine: str
    stopped: str
    seconds: float
    frames: int
    fps: float
    latency_ms: Percentiles
    deadline_ms: float | None
    missed_deadlines: int
    dropped: int
    bad_frames: int
    non_finite: int
    events: int | None
    files: dict[str, list[str]]
    sources: list[SourceSummary]
    errors: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["latency_ms"] = self.latency_ms.as_dict()
        for source, summary in zip(values["sources"], self.sources, strict=True):
            source["latency_ms"] = summary.latency_ms.as_dict()
        return values

    def as_text(self) -> str:
        latency = self.latency_ms
        lines = [
            f"{self.frames} frames in {self.seconds:.1f} s, {self.fps:.1f} fps ({self.stopped})",
            f"latency    p50 {latency.p50:.1f}  p95 {latency.p95:.1f}  p99 {latency.p99:.1f}  max {latency.max:.1f} ms",
        ]
        if self.deadline_ms is not None:
            lines.append(f"deadline   {self.deadline_ms:g} ms missed by {self.missed_deadlines} of {self.frames} frames")
        lines.append(f"frames     {self.dropped} dropped, {self.bad_frames} bad, {self.non_finite} with non-finite output")
        if len(self.sources) > 1:
            lines += [
                f"  {source.source}: {source.frames} frames, p99 {source.latency_ms.p99:.1f} ms, "
                f"{source.dropped} dropped, {source.bad_frames} bad"
                for source in self.sources
            ]
        lines.append(f"engine     {self.engine}")
        if self.events is not None:
            lines.append(f"events     {self.events}")
        lines += [f"{kind:<10} {', '.join(paths)}" for kind, paths in self.files.items()]
        return "\n".join(lines)


def run(options: RunOptions, status: Status) -> Summary:
    """Run a bundle on its sources until they end, `max_frames` were taken, or the user stops it.

    Raises:
        FramestepError: an option, a file or a source is unusable; raised before the first frame is read.
    """
    bundle = Bundle.open(options.bundle, verify=False)  # the session verifies it
    plan = _plan(options, bundle.manifest)
    with ExitStack() as stack:
        session = stack.enter_context(
            load(
                options.bundle,
                engine=options.engine,
                device=options.device,
                streams=len(options.sources),
                outputs=plan.fetched,
                threads=options.threads,
            )
        )
        streams = [stack.enter_context(session.open_stream()) for _ in options.sources]
        _warm_up(session, streams, bundle.manifest)
        stopping = stack.enter_context(_stop_on_signals())
        lanes = []
        for number, (name, stream) in enumerate(zip(options.sources, streams, strict=True)):
            source = stack.enter_context(_open_source(name, options, session.rate, status))
            lanes.append(_Lane(number, name, source, stream, plan))
        sinks = _open_sinks(options, plan, lanes)
        return _Run(options, session, lanes, sinks, status, stopping).to_end()


@dataclass(frozen=True)
class _Plan:
    """What to fetch from the session, and where it goes."""

    options: RunOptions
    labels: tuple[str, ...]
    background: str | None
    fetched: tuple[str, ...]
    listed: tuple[str, ...]
    saved: tuple[str, ...]
    preprocess: Preprocess


def _plan(options: RunOptions, manifest: Manifest) -> _Plan:
    """Checks every option that can be checked without opening a source."""
    labels = manifest.labels.names if manifest.labels is not None else ()
    sizes = {
        port.name: _values(port.shape, len(labels))
        for graph in manifest.graphs.values()
        for port in graph.outputs
        if labels or not _is_label_output(port.shape)
    }
    EventDetector((), options.on, options.off_threshold)
    for name in options.outputs:
        if name not in sizes:
            raise FramestepError(f"--outputs {name}: no such output; this bundle has {', '.join(sizes)}")
        if sizes[name] > LARGEST_LISTED and options.save_features is None:
            raise FramestepError(
                f"--outputs {name}: {sizes[name]} values a frame are too many for a line of JSON "
                f"(at most {LARGEST_LISTED}); save them with --save-features FILE.npz"
            )
    if options.outputs and options.output is None and options.save_features is None:
        raise FramestepError(
            f"--outputs {','.join(options.outputs)}: goes into a file; add --output FILE.jsonl or --save-features FILE.npz"
        )
    if options.events is not None and not labels:
        raise FramestepError(
            f"--events {options.events}: this bundle has no labels; "
            f"add some with `framestep label BUNDLE --labels FILE`"
        )
    if options.overlay is not None:
        check_overlay(options.overlay, labels)
        if options.record is None and not options.show:
            raise FramestepError(f"--overlay {options.overlay}: is drawn into --record FILE.mp4 or --show; add one")
    _check_files(options)
    if options.show:
        _check_window()

    listed = tuple(name for name in options.outputs if sizes[name] <= LARGEST_LISTED)
    if not options.outputs and labels:
        listed = ("scores",)
    saved: tuple[str, ...] = ()
    if options.save_features is not None:
        saved = options.outputs or tuple(name for name in sizes if name != "patch_scores")
    wanted = [*listed, *saved]
    if labels:
        wanted.append("scores")
    if options.overlay is not None:
        wanted.append("patch_scores")
    fetched = tuple(dict.fromkeys(wanted)) or (min(sizes, key=lambda name: sizes[name]),)
    background = manifest.labels.background if manifest.labels is not None else None
    return _Plan(options, labels, background, fetched, listed, saved, Preprocess(manifest.frame))


def _is_label_output(shape: Sequence[int | str]) -> bool:
    return "C" in shape


def _values(shape: Sequence[int | str], labels: int) -> int:
    """Values a frame of an output; the first axis is the streams'."""
    count = 1
    for size in shape[1:]:
        count *= labels if size == "C" else int(size)
    return count


def _check_files(options: RunOptions) -> None:
    asked = {
        "--output": [options.output] if options.output is not None else [],
        "--events": [options.events] if options.events is not None else [],
        "--record": _paths(options.record, options.sources),
        "--save-features": _paths(options.save_features, options.sources),
    }
    for option, suffix in (("--record", ".mp4"), ("--save-features", ".npz")):
        for path in asked[option]:
            if path.suffix.lower() != suffix:
                raise OutputError(f"{option} {path}: is written as {suffix[1:]}; name it *{suffix}")
    seen: dict[Path, str] = {}
    for option, paths in asked.items():
        for path in paths:
            check_writable(path, option)
            other = seen.setdefault(path.resolve(), option)
            if other != option:
                raise OutputError(f"{option} {path}: is also the file of {other}; name another")


def _paths(path: Path | None, sources: Sequence[str]) -> list[Path]:
    """One file per source: `out.mp4`, or with several sources `out.0.mp4`, `out.1.mp4`, and so on."""
    if path is None:
        return []
    if len(sources) == 1:
        return [path]
    return [path.with_suffix(f".{number}{path.suffix}") for number in range(len(sources))]


def _check_window() -> None:
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise FramestepError("--show: no display here (DISPLAY and WAYLAND_DISPLAY are not set); use --record FILE.mp4")
    try:
        cv2.namedWindow("framestep", cv2.WINDOW_NORMAL)
        cv2.destroyWindow("framestep")
    except cv2.error:
        raise FramestepError(
            "--show: this OpenCV cannot open windows; replace opencv-python-headless by opencv-python, "
            "or use --record FILE.mp4"
        ) from None


def _open_source(name: str, options: RunOptions, model_rate: float | None, status: Status) -> Source:
    rate = model_rate if options.rate is None else (options.rate or None)
    return open_source(
        name,
        rate=rate,
        width=options.width,
        height=options.height,
        camera_fps=options.camera_fps,
        fourcc=options.fourcc,
        on_report=status.report,
    )


def _warm_up(session: Session, streams: Sequence[Stream], manifest: Manifest) -> None:
    """The first steps of an engine are slow; no frame is to wait for them."""
    black = np.zeros((manifest.frame.height, manifest.frame.width, 3), np.uint8)
    for _ in range(WARM_UP_STEPS):
        try:
            session.step({stream: black for stream in streams})
        except NonFiniteOutputError:  # black is nobody's frame: reported where it happens to a real one
            break
    for stream in streams:
        stream.reset()


@dataclass
class _Stopping:
    """Set by a signal."""

    asked: bool = False


@contextmanager
def _stop_on_signals() -> Iterator[_Stopping]:
    """SIGINT and SIGTERM ask the run to stop; a second one has its usual effect."""
    stopping = _Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.asked = True
        restore()

    for number in before:
        signal.signal(number, stop)
    try:
        yield stopping
    finally:
        restore()


class _Lane:
    """One source, its stream, and what is counted about it."""

    def __init__(self, number: int, name: str, source: Source, stream: Stream, plan: _Plan) -> None:
        self.number = number
        self.name = name
        self.source = source
        self.stream = stream
        self.latencies = Latencies()
        self.frames = 0
        self.missed_deadlines = 0
        self.non_finite = 0
        self.finished_at: deque[float] = deque(maxlen=60)
        self.scores: np.ndarray | None = None
        self.feed: _Feed = _LiveFeed(source) if source.live else _FileFeed(source)
        self.annotator = Annotator(
            plan.labels,
            plan.preprocess.region,
            self.latencies,
            overlay=plan.options.overlay,
            background=plan.background,
            on=plan.options.on,
            deadline_ms=plan.options.deadline_ms,
        )

    @property
    def dropped(self) -> int:
        return self.source.dropped + self.feed.dropped

    def fps(self) -> float:
        """Of the recent frames."""
        if len(self.finished_at) < 2:
            return 0.0
        return (len(self.finished_at) - 1) / max(self.finished_at[-1] - self.finished_at[0], 1e-9)


class _Feed(Protocol):
    """Frames of a source, as the loop takes them."""

    dropped: int
    ended: bool
    error: Exception | None

    def take(self) -> Frame | None:
        """The next frame; None if there is none now, or none any more (`ended`)."""
        ...

    def close(self) -> None: ...


class _FileFeed:
    """Every frame in order."""

    def __init__(self, source: Source) -> None:
        self._frames = iter(source)
        self._source = source
        self.dropped = 0
        self.ended = False
        self.error: Exception | None = None

    def take(self) -> Frame | None:
        try:
            return next(self._frames)
        except StopIteration:
            self.ended = True
        except SourceError as error:
            self.error, self.ended = error, True
        return None

    def close(self) -> None:
        self._source.close()


class _LiveFeed:
    """The newest frame. A thread waits for the source, so that one slow camera does not hold up the others."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._newest: Frame | None = None
        self._closed = False
        self._source_ended = False
        self.arrived = threading.Event()
        self.dropped = 0
        self.ended = False
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._wait, name=f"feed {source.name}", daemon=True)
        self._thread.start()

    def take(self) -> Frame | None:
        with self._lock:
            frame, self._newest = self._newest, None
            self.arrived.clear()
            if frame is None and self._source_ended:
                self.ended = True
            return frame

    def close(self) -> None:
        self._closed = True
        self._source.close()
        self._thread.join(timeout=2.0)

    def _wait(self) -> None:
        try:
            for frame in self._source:
                if self._closed:
                    break
                with self._lock:
                    self.dropped += self._newest is not None
                    self._newest = frame
                self.arrived.set()
        except Exception as error:  # raised again in the loop's thread
            self.error = error
        self._source_ended = True
        self.arrived.set()


@dataclass
class _Taken:
    """One frame with its result."""

    lane: _Lane
    frame: Frame
    result: Result
    age_ms: float

    @cached_property
    def picture(self) -> np.ndarray:
        """The annotated frame, drawn once for whoever wants it."""
        return self.lane.annotator.draw(
            Shown(
                rgb=self.frame.rgb,
                index=self.frame.index,
                timestamp=self.frame.timestamp,
                latency_ms=self.result.latency_ms,
                scores=_output(self.result, "scores"),
                patch_scores=_output(self.result, "patch_scores"),
            )
        )


def _output(result: Mapping[str, np.ndarray], name: str) -> np.ndarray | None:
    return result[name] if name in result else None


class _Sink(Protocol):
    """Where results go. Every method may raise OutputError; after that only `close` is called."""

    def write(self, taken: _Taken) -> None: ...

    def end(self, lane: _Lane) -> None:
        """The lane gives no more frames."""
        ...

    def close(self) -> None: ...


class _ResultLines:
    """--output: one JSON object a frame."""

    def __init__(self, path: Path, plan: _Plan) -> None:
        self._lines = JsonLines(path)
        self._labels = plan.labels
        self._listed = plan.listed

    def write(self, taken: _Taken) -> None:
        frame, result = taken.frame, taken.result
        line: dict[str, Any] = {
            "stream": taken.lane.number,
            "source": taken.lane.name,
            "index": frame.index,
            "timestamp": round(frame.timestamp, 6),
            "position": result.position,
            "latency_ms": round(result.latency_ms, 3),
            "age_ms": round(taken.age_ms, 3),
        }
        for name in self._listed:
            if name == "scores":
                scores = result[name].tolist()
                line[name] = {
                    label: float(f"{score:.6g}") for label, score in zip(self._labels, scores, strict=True)
                }
            else:
                line[name] = np.round(result[name].astype(np.float64), 6).tolist()
        self._lines.write(line)

    def end(self, lane: _Lane) -> None:
        pass

    def close(self) -> None:
        self._lines.close()


class _EventLines:
    """--events: one JSON object a segment, when it closes."""

    def __init__(self, path: Path, plan: _Plan, lanes: Sequence[_Lane]) -> None:
        self._lines = JsonLines(path)
        on, off = plan.options.on, plan.options.off_threshold
        self._detectors = {lane.number: EventDetector(plan.labels, on, off) for lane in lanes}
        self.count = 0

    def write(self, taken: _Taken) -> None:
        frame = taken.frame
        detector = self._detectors[taken.lane.number]
        self._write(taken.lane, detector.update(taken.result["scores"], frame.timestamp, frame.index))

    def end(self, lane: _Lane) -> None:
        self._write(lane, self._detectors[lane.number].finish())

    def close(self) -> None:
        self._lines.close()

    def _write(self, lane: _Lane, events: Sequence[Event]) -> None:
        for event in events:
            self._lines.write({"stream": lane.number, "source": lane.name, **event.as_dict()})
            self.count += 1


class _Recording:
    """--record: an annotated video a source."""

    def __init__(self, recorders: Sequence[VideoRecorder]) -> None:
        self._recorders = recorders

    def write(self, taken: _Taken) -> None:
        self._recorders[taken.lane.number].write(taken.picture, taken.frame.timestamp)

    def end(self, lane: _Lane) -> None:
        self._recorders[lane.number].close()

    def close(self) -> None:
        _close_all(self._recorders)


class _Features:
    """--save-features: outputs of every frame as arrays, a file a source."""

    def __init__(self, recorders: Sequence[ArrayRecorder], names: Sequence[str]) -> None:
        self._recorders = recorders
        self._names = names

    def write(self, taken: _Taken) -> None:
        arrays = {name: taken.result[name] for name in self._names}
        arrays["timestamps"] = np.array(taken.frame.timestamp, np.float64)
        arrays["indices"] = np.array(taken.frame.index, np.int64)
        self._recorders[taken.lane.number].write(arrays)

    def end(self, lane: _Lane) -> None:
        self._recorders[lane.number].close()

    def close(self) -> None:
        _close_all(self._recorders)


class _Window:
    """--show: a window a source. Escape, q or closing a window stops the run."""

    def __init__(self, stopping: _Stopping) -> None:
        self._stopping = stopping

    def write(self, taken: _Taken) -> None:
        title = f"framestep: {taken.lane.name}"
        cv2.imshow(title, taken.picture)
        key = cv2.waitKey(1) & 0xFF
        if key in (27, ord("q")) or cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) < 1:
            self._stopping.asked = True

    def end(self, lane: _Lane) -> None:
        pass

    def close(self) -> None:
        cv2.destroyAllWindows()


def _close_all(recorders: Sequence[VideoRecorder | ArrayRecorder]) -> None:
    """Closes every one, also after one failed; raises the first failure."""
    failures = []
    for recorder in recorders:
        try:
            recorder.close()
        except OutputError as error:
            failures.append(error)
    if failures:
        raise failures[0]
