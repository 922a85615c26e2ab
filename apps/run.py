"""`framestep run`: frames from sources, through one session, into files, a window and a status line.

Several sources are streams of one session. Live sources give the newest frame there is, files every frame in
order. A file that can no longer be written is given up with a report; the others are finished.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..runtime.bundle import Bundle
from ..runtime.counted import counted
from ..runtime.errors import OutputError, SourceError
from ..runtime.preprocess import Preprocess
from ..runtime.session import NonFiniteOutputError, Session, Stream
from ..runtime.sources import Frame, Source, open_source
from .annotate import Annotator
from .latency import Latencies, Percentiles
from .output_places import told
from .run_options import Plan, RunOptions, plan_run
from .sinks import EventLines, Sink, Taken, open_sinks
from .status import LaneStatus, Status
from .stopping import Stopping, stop_on_signals

STOPPED_BY_USER = "stopped by user"
WARM_UP_STEPS = 3
TOP_LABELS = 3
WAIT_S = 0.05  # how soon a signal is noticed while a live source has no frame
POLL_S = 0.002  # between looks at several live sources


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
            f"{counted(self.frames, 'frame')} in {self.seconds:.1f} s, {self.fps:.1f} fps ({self.stopped})",
            f"latency    p50 {latency.p50:.1f}  p95 {latency.p95:.1f}  p99 {latency.p99:.1f}  max {latency.max:.1f} ms",
        ]
        if self.deadline_ms is not None:
            lines.append(f"deadline   {counted(self.missed_deadlines, 'frame')} later than {self.deadline_ms:g} ms")
        counts = f"{self.dropped} dropped, {self.bad_frames} bad, {self.non_finite} without finite output"
        lines.append(f"frames     {counts}")
        if len(self.sources) > 1:
            lines += [
                f"  {source.source}: {counted(source.frames, 'frame')}, p99 {source.latency_ms.p99:.1f} ms, "
                f"{source.dropped} dropped, {source.bad_frames} bad"
                for source in self.sources
            ]
        lines.append(f"engine     {self.engine}")
        for kind, paths in self.files.items():
            count = f"{self.events} in " if kind == "events" else ""
            lines.append(f"{kind:<10} {count}{', '.join(paths)}")
        if not self.files and not self.errors:
            lines.append("files      none; --output, --events, --record, --save-features and --save-masks write some")
        return "\n".join(lines)


def run(options: RunOptions, status: Status) -> Summary:
    """Run a bundle on its sources until they end, `max_frames` were taken, or the user stops it.

    Raises:
        FramestepError: an option, a file or a source is unusable; raised before the first frame is read.
    """
    bundle = Bundle.open(options.bundle)
    plan = plan_run(options, bundle.manifest)
    with ExitStack() as stack:
        session = stack.enter_context(
            Session(
                bundle,
                options.engine,
                options.device,
                len(options.sources),
                plan.fetched,
                options.threads,
                options.precision,
                (),
            )
        )
        streams = [stack.enter_context(session.open_stream()) for _ in options.sources]
        session.warm_up(WARM_UP_STEPS)  # before a camera opens: no frame waits for it
        lanes = []
        for number, (name, stream) in enumerate(zip(options.sources, streams, strict=True)):
            source = stack.enter_context(_open_source(name, options, plan.rate, status))
            lanes.append(_Lane(number, source, stream, session.preprocess, plan))
        if plan.note is not None:  # when nothing can be wrong any more that would make it idle talk
            status.report(plan.note)
        stopping = stack.enter_context(stop_on_signals())
        sinks = open_sinks(plan, [lane.source for lane in lanes], session.preprocess, stopping.ask)
        return _Run(options, session, lanes, sinks, status, stopping).to_end()


def _open_source(name: str, options: RunOptions, rate: float | None, status: Status) -> Source:
    return open_source(
        name,
        rate=rate,
        width=options.width,
        height=options.height,
        camera_fps=options.camera_fps,
        fourcc=options.fourcc,
        on_report=status.report,
    )


class _Lane:
    """One source, its stream, and what is counted about it."""

    def __init__(self, number: int, source: Source, stream: Stream, preprocess: Preprocess, plan: Plan) -> None:
        self.number = number
        self.name = source.name
        self.source = source
        self.stream = stream
        self.latencies = Latencies()
        self.frames = 0
        self.missed_deadlines = 0
        self.non_finite = 0
        self.output_is_broken = False
        self.finished_at: deque[float] = deque(maxlen=60)
        self.scores: np.ndarray | None = None
        self.ended = False
        self.annotator = Annotator(
            plan.labels,
            preprocess,
            self.latencies,
            overlay=plan.options.overlay,
            background=plan.background,
            on=plan.options.on_threshold,
            deadline_ms=plan.options.deadline_ms,
        )

    def fps(self) -> float:
        """Of the recent frames."""
        if len(self.finished_at) < 2:
            return 0.0
        return (len(self.finished_at) - 1) / max(self.finished_at[-1] - self.finished_at[0], 1e-9)


class _Run:
    """The loop, and the orderly end of everything."""

    def __init__(
        self,
        options: RunOptions,
        session: Session,
        lanes: Sequence[_Lane],
        sinks: dict[str, Sink],
        status: Status,
        stopping: Stopping,
    ) -> None:
        self._options = options
        self._session = session
        self._lanes = lanes
        self._sinks = sinks
        self._open_sinks = dict(sinks)
        self._status = status
        self._stopping = stopping
        self._latencies = Latencies()
        self._errors: list[str] = []

    def to_end(self) -> Summary:
        started = time.perf_counter()
        stopped = ""
        try:
            while not stopped:
                frames = self._take()
                if frames:
                    self._step(frames)
                self._status.update(self._lane_statuses)
                if self._stopping.asked:
                    stopped = STOPPED_BY_USER
                elif all(lane.ended for lane in self._lanes):
                    stopped = "every source ended"
                    if self._options.max_frames and all(
                        lane.frames >= self._options.max_frames for lane in self._lanes
                    ):
                        stopped = "reached --max-frames"
                elif self._sinks and not self._open_sinks:
                    stopped = "nothing can be written any more"
            seconds = time.perf_counter() - started
        finally:
            for lane in self._lanes:
                self._end(lane)
            for name in list(self._open_sinks):
                self._close(name)
            self._status.close()
        return self._summary(stopped, seconds)

    def _take(self) -> dict[_Lane, Frame]:
        """A frame of every source that has one now."""
        frames = {}
        going = [lane for lane in self._lanes if not lane.ended]
        for lane in going:
            try:
                frame = lane.source.read(WAIT_S if len(going) == 1 else 0.0)
            except SourceError as error:
                self._give_up(str(error))
                self._end(lane)
                continue
            if frame is not None:
                frames[lane] = frame
            elif lane.source.ended:
                self._end(lane)
        if not frames and len(going) > 1:
            time.sleep(POLL_S)
        return frames

    def _step(self, frames: dict[_Lane, Frame]) -> None:
        by_stream = {lane.stream: lane for lane in frames}
        try:
            results = self._session.step({lane.stream: frame.rgb for lane, frame in frames.items()})
        except NonFiniteOutputError as error:
            results = error.results
            for stream in error.streams:
                lane = by_stream[stream]
                if not lane.output_is_broken:  # once, not for every frame of a model that is broken for good
                    self._status.report(f"{lane.name}: frame {frames[lane].index}: {error}")
                lane.non_finite += 1
                lane.output_is_broken = True
        ready = time.perf_counter()
        for stream, result in results.items():
            lane = by_stream[stream]
            frame = frames[lane]
            lane.output_is_broken = False
            lane.finished_at.append(ready)
            lane.latencies.add(result.latency_ms)
            self._latencies.add(result.latency_ms)
            deadline = self._options.deadline_ms
            lane.missed_deadlines += deadline is not None and result.latency_ms > deadline
            lane.scores = result.get("scores")
            taken = Taken(lane.number, lane.name, frame, result, (ready - frame.captured) * 1e3, lane.annotator)
            for name, sink in list(self._open_sinks.items()):
                try:
                    sink.write(taken)
                except (OutputError, OSError) as error:
                    self._close(name, error)
        for lane in frames:
            lane.frames += 1
            if self._options.max_frames is not None and lane.frames >= self._options.max_frames:
                self._end(lane)

    def _end(self, lane: _Lane) -> None:
        if lane.ended:
            return
        lane.ended = True
        lane.source.stop()  # closing may wait for a device, and the other sources go on
        for name, sink in list(self._open_sinks.items()):
            try:
                sink.end(lane.number)
            except (OutputError, OSError) as error:
                self._close(name, error)

    def _close(self, name: str, failure: OutputError | OSError | None = None) -> None:
        """Closes a sink, at the end or because of its `failure`; what goes wrong is told in one line."""
        messages = [] if failure is None else [told(failure)]
        try:
            self._open_sinks.pop(name).close()
        except (OutputError, OSError) as error:
            messages.append(told(error))
        if messages:
            self._give_up("; ".join(dict.fromkeys(messages)))

    def _give_up(self, message: str) -> None:
        self._errors.append(message)
        self._status.error(message)

    def _lane_statuses(self) -> list[LaneStatus]:
        labels = self._session.labels
        statuses = []
        for lane in self._lanes:
            best = np.argsort(-lane.scores, kind="stable")[:TOP_LABELS] if lane.scores is not None else ()
            top = [(labels[i], float(lane.scores[i])) for i in best] if lane.scores is not None else []
            latency = lane.latencies.recent()
            statuses.append(LaneStatus(lane.name, lane.frames, lane.fps(), latency, lane.source.dropped, top))
        return statuses

    def _summary(self, stopped: str, seconds: float) -> Summary:
        frames = sum(lane.frames for lane in self._lanes)
        events = self._sinks.get("events")
        return Summary(
            bundle=str(self._options.bundle),
            engine=self._session.engine_choice,
            stopped=stopped,
            seconds=round(seconds, 3),
            frames=frames,
            fps=round(frames / seconds, 3),
            latency_ms=self._latencies.overall(),
            deadline_ms=self._options.deadline_ms,
            missed_deadlines=sum(lane.missed_deadlines for lane in self._lanes),
            dropped=sum(lane.source.dropped for lane in self._lanes),
            bad_frames=sum(lane.source.bad_frames for lane in self._lanes),
            non_finite=sum(lane.non_finite for lane in self._lanes),
            events=events.count if isinstance(events, EventLines) else None,
            files={name: [str(path) for path in sink.files()] for name, sink in self._sinks.items() if sink.files()},
            sources=[
                SourceSummary(
                    lane.name,
                    lane.frames,
                    lane.source.dropped,
                    lane.source.bad_frames,
                    lane.non_finite,
                    lane.latencies.overall(),
                )
                for lane in self._lanes
            ],
            errors=self._errors,
        )
