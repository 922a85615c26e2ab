"""Where the results of a run go: one class for each option that writes or shows something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import cv2
import numpy as np

from ..runtime.errors import OutputError
from ..runtime.masks import NOT_SEEN, class_map
from ..runtime.preprocess import Preprocess
from ..runtime.session import Result
from ..runtime.sources import Frame, Source
from .annotate import Annotator, Shown
from .events import Event, EventDetector
from .record import ArrayRecorder, JsonLines, MaskFolder
from .run_options import Plan, paths_for
from .video_recorder import VideoRecorder

DEFAULT_RECORD_FPS = 30.0
MAX_RECORD_FPS = 240.0
NOT_SEEN_BYTE = 255  # in masks


@dataclass
class Taken:
    """One frame of one source with its result.

    Attributes:
        stream: number of the source in the order given.
        age_ms: age of the frame when its result was ready.
    """

    stream: int
    source: str
    frame: Frame
    result: Result
    age_ms: float
    annotator: Annotator

    @cached_property
    def picture(self) -> np.ndarray:
        """The annotated frame, uint8 BGR; drawn once for whoever wants it."""
        return self.annotator.draw(
            Shown(
                rgb=self.frame.rgb,
                index=self.frame.index,
                timestamp=self.frame.timestamp,
                latency_ms=self.result.latency_ms,
                scores=self.result.get("scores"),
                patch_scores=self.result.get("patch_scores"),
            )
        )


class Sink(Protocol):
    """Where results go. Every method may raise OutputError; after that only `close` is called."""

    def write(self, taken: Taken) -> None: ...

    def end(self, stream: int) -> None:
        """This source gives no more frames."""
        ...

    def close(self) -> None: ...

    def files(self) -> list[Path]:
        """Those that were written, once closed."""
        ...


def open_sinks(
    plan: Plan, sources: Sequence[Source], preprocess: Preprocess, stop: Callable[[], None]
) -> dict[str, Sink]:
    """Opens what the options ask for, by the name under which the summary lists the files.

    Args:
        plan: the checked options.
        sources: opened, in the order given.
        preprocess: the session's.
        stop: called when the user closes a window.

    Raises:
        OutputError: a file cannot be written; the others are closed then.
    """
    options = plan.options
    sinks: dict[str, Sink] = {}
    try:
        if options.output is not None:
            sinks["results"] = ResultLines(options.output, plan)
        if options.events is not None:
            sinks["events"] = EventLines(options.events, plan, sources)
        if options.record is not None:
            fps = [_recorded_fps(source, plan.rate) for source in sources]
            videos = zip(paths_for(options.record, options.sources), fps, strict=True)
            sinks["video"] = FilePerSource([VideoRecorder(path, rate) for path, rate in videos], _record)
        if options.save_features is not None:
            constants = {"labels": np.array(plan.labels)} if "scores" in plan.saved else {}
            archives = paths_for(options.save_features, options.sources)
            recorders = [ArrayRecorder(path, constants) for path in archives]
            sinks["features"] = FilePerSource(recorders, partial(_save_arrays, plan.saved))
        if options.save_masks is not None:
            sinks["masks"] = Masks(options.save_masks, plan, sources, preprocess)
        if options.show:
            sinks["window"] = Window(stop)
    except OutputError:
        for sink in sinks.values():
            sink.close()
        raise
    return sinks


class ResultLines:
    """--output: one JSON object a frame."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self._lines = JsonLines(path)
        self._labels = plan.labels
        self._listed = plan.listed

    def write(self, taken: Taken) -> None:
        frame, result = taken.frame, taken.result
        line: dict[str, Any] = {
            "stream": taken.stream,
            "source": taken.source,
            "index": frame.index,
            "timestamp": round(frame.timestamp, 6),
            "position": result.position,
            "latency_ms": round(result.latency_ms, 3),
            "age_ms": round(taken.age_ms, 3),
        }
        for name in self._listed:
            if name == "scores":
                scores = zip(self._labels, result[name].tolist(), strict=True)
                line[name] = {label: float(f"{score:.6g}") for label, score in scores}
            else:
                line[name] = np.round(result[name].astype(np.float64), 6).tolist()
        self._lines.write(line)

    def end(self, stream: int) -> None:
        pass

    def close(self) -> None:
        self._lines.close()

    def files(self) -> list[Path]:
        return self._lines.files()


class EventLines:
    """--events: one JSON object a segment, when it closes. The background label makes no events."""

    def __init__(self, path: Path, plan: Plan, sources: Sequence[Source]) -> None:
        self.count = 0
        self._lines = JsonLines(path)
        self._names = [source.name for source in sources]
        self._reported = [row for row, label in enumerate(plan.labels) if label != plan.background]
        labels = [plan.labels[row] for row in self._reported]
        on, off = plan.options.on_threshold, plan.options.off_threshold
        self._detectors = [EventDetector(labels, on, off) for _ in sources]

    def write(self, taken: Taken) -> None:
        scores = taken.result["scores"][self._reported]
        closed = self._detectors[taken.stream].update(scores, taken.frame.timestamp, taken.frame.index)
        self._write(taken.stream, closed)

    def end(self, stream: int) -> None:
        self._write(stream, self._detectors[stream].finish())

    def close(self) -> None:
        self._lines.close()

    def files(self) -> list[Path]:
        return self._lines.files()

    def _write(self, stream: int, events: Sequence[Event]) -> None:
        for event in events:
            self._lines.write({"stream": stream, "source": self._names[stream], **event.as_dict()})
            self.count += 1


class Recorder(Protocol):
    """The file of one source."""

    path: Path
    finished: bool

    def close(self) -> None: ...


AnyRecorder = TypeVar("AnyRecorder", bound=Recorder)


class FilePerSource(Generic[AnyRecorder]):
    """--record, --save-features: a file a source, finished when that source ends.

    Args:
        recorders: one for each source.
        write: puts a frame and its result into the recorder of its source.
    """

    def __init__(self, recorders: Sequence[AnyRecorder], write: Callable[[AnyRecorder, Taken], None]) -> None:
        self._recorders = recorders
        self._write = write

    def write(self, taken: Taken) -> None:
        self._write(self._recorders[taken.stream], taken)

    def end(self, stream: int) -> None:
        self._recorders[stream].close()

    def close(self) -> None:
        _close_all(self._recorders)

    def files(self) -> list[Path]:
        return [recorder.path for recorder in self._recorders if recorder.finished]


def _record(recorder: VideoRecorder, taken: Taken) -> None:
    recorder.write(taken.picture, taken.frame.timestamp)


def _save_arrays(names: Sequence[str], recorder: ArrayRecorder, taken: Taken) -> None:
    arrays = {name: taken.result[name] for name in names}
    arrays["timestamps"] = np.array(taken.frame.timestamp, np.float64)
    arrays["indices"] = np.array(taken.frame.index, np.int64)
    recorder.write(arrays)


class Masks:
    """--save-masks: the class map of every frame, in the frame's own pixels."""

    def __init__(self, path: Path, plan: Plan, sources: Sequence[Source], preprocess: Preprocess) -> None:
        self._preprocess = preprocess
        legend = {
            "labels": plan.labels,
            "background": plan.background,
            "not_seen": NOT_SEEN_BYTE,
            "sources": [source.name for source in sources],
        }
        self._folder = MaskFolder(path, legend)

    def write(self, taken: Taken) -> None:
        height, width = taken.frame.rgb.shape[:2]
        classes = class_map(taken.result["patch_scores"], height, width, self._preprocess).classes
        mask = np.where(classes == NOT_SEEN, NOT_SEEN_BYTE, classes).astype(np.uint8)
        self._folder.write(taken.stream, taken.frame.index, mask)

    def end(self, stream: int) -> None:
        pass

    def close(self) -> None:
        pass

    def files(self) -> list[Path]:
        return [self._folder.path]


class Window:
    """--show: a window a source. Escape, q or closing a window stops the run."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop

    def write(self, taken: Taken) -> None:
        title = f"framestep: {taken.source}".encode(errors="replace").decode()
        cv2.imshow(title, taken.picture)
        key = cv2.waitKey(1) & 0xFF
        if key in (27, ord("q")) or cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) < 1:
            self._stop()

    def end(self, stream: int) -> None:
        pass

    def close(self) -> None:
        cv2.destroyAllWindows()

    def files(self) -> list[Path]:
        return []


def _recorded_fps(source: Source, rate: float | None) -> float | None:
    """What a recording of the source plays at; None where only the run will tell."""
    if source.live:
        return None
    fps = source.fps or DEFAULT_RECORD_FPS
    return min(fps, rate or fps, MAX_RECORD_FPS)


def _close_all(recorders: Sequence[Recorder]) -> None:
    """Closes every one, also after one failed; raises the first failure."""
    failures: list[OutputError | OSError] = []
    for recorder in recorders:
        try:
            recorder.close()
        except (OutputError, OSError) as error:
            failures.append(error)
    if failures:
        raise failures[0]
