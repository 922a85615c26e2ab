"""Live sources: a thread reads the device, the consumer gets the newest frame, what is lost is reopened."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import SourceError
from .cameras import Device, Patience
from .frame import Frame, Source
from .opencv import quiet, quiet_opening, stated_fps, to_rgb
from .sampling import Sampler, tolerance

# How long one wait lasts before a stall is looked for; also keeps Ctrl-C prompt where a wait defers it.
GLANCE = 0.1
CLOSING = 0.3  # seconds that a reader has to come to its end, from stop() on
# A reader that never came back from OpenCV may still hold the device: more and more of them would only leak.
MAX_STUCK_READERS = 3


@dataclass(frozen=True, slots=True)
class LiveTiming:
    """The patience of a live source, in seconds."""

    opening: float = 10.0  # from the start until the first frame, and for each opening after a loss
    stall: float = 5.0  # without a frame until the device counts as stalled
    first_retry: float = 1.0  # before opening it again; doubles with each failure
    longest_retry: float = 30.0


class LiveSource(Source):
    """The newest frame of a device, read in a daemon thread.

    The thread keeps one picture: a newer one replaces it and counts as a drop. It does the sampling too, so
    that frames skipped by the rate are neither converted nor dropped. A device that ends, fails or delivers
    nothing for `timing.stall` seconds is reported and opened again, with growing pauses, until `close()`;
    index and timestamp go on, the timestamp over the time that was lost.

    A call into OpenCV can block for longer than anybody wants to wait, and nothing can interrupt it. The
    consumer therefore never waits for the thread: it abandons a reader that is stuck and starts another. The
    stuck one gives its capture back when its call returns.

    Opening waits for the first frame; a device that is not there, busy or mute then is a `SourceError`.
    """

    live = True

    def __init__(
        self, device: Device, *, rate: float | None, on_report: Callable[[str], None], timing: LiveTiming
    ) -> None:
        super().__init__(device.name, on_report)
        self._device = device
        self._rate = rate
        self._timing = timing
        self._closed = threading.Event()
        self._stopped_at = 0.0
        # The condition guards all that follows, and is notified of every change that concerns the consumer.
        self._changed = threading.Condition()
        self._newest: _Picture | None = None
        self._reports: deque[str] = deque()
        self._failure: Exception | None = None
        self._sampler = Sampler(rate)
        self._next_index = 0
        self._started: float | None = None  # perf_counter of the first frame
        self._lost: float | None = None  # perf_counter of the last sign of life, while the device is away
        self._pause = timing.first_retry  # before the next opening
        self._stuck: list[_Reader] = []
        self._reader = _Reader(self._run, delay=0.0)
        try:
            self._reader.start()
            self._wait_for_first_frame()
        except BaseException:
            self.stop()
            raise
        self._report_rate_above_fps(rate)

    def read(self, timeout: float | None = None) -> Frame | None:
        deadline = None if timeout is None else time.perf_counter() + timeout
        while not self._closed.is_set():
            with self._changed:
                self._abandon_stuck_reader()
                picture, self._newest = self._newest, None
                if picture is None and not self._reports and self._failure is None:
                    patience = GLANCE if deadline is None else min(GLANCE, deadline - time.perf_counter())
                    if patience <= 0:
                        return None
                    self._changed.wait(patience)
                failure = self._failure
            self._deliver_reports()
            if failure is not None:
                self.close()
                raise failure
            if picture is not None:
                return Frame(to_rgb(picture.bgr), picture.index, picture.timestamp, picture.captured)
        return None

    def stop(self) -> None:
        if not self._closed.is_set():
            self._stopped_at = time.perf_counter()
        self._closed.set()
        with self._changed:
            self.ended = True
            self._newest = None
            self._changed.notify_all()

    def close(self) -> None:
        self.stop()
        self._reader.join(max(0.0, self._stopped_at + CLOSING - time.perf_counter()))
        self._deliver_reports()

    # What the consumer's thread does.

    def _wait_for_first_frame(self) -> None:
        deadline = time.perf_counter() + self._timing.opening
        with self._changed:
            while self._started is None and self._failure is None:
                left = deadline - time.perf_counter()
                if left <= 0:
                    raise SourceError(f"source {self.name}: no frame within {self._timing.opening:g} s")
                self._changed.wait(min(left, GLANCE))
            failure = self._failure
        self._deliver_reports()
        if failure is not None:
            raise failure

    def _deliver_reports(self) -> None:
        while True:
            with self._changed:
                if not self._reports:
                    return
                text = self._reports.popleft()
            self._report(text)

    def _abandon_stuck_reader(self) -> None:
        """Start another reader where no frame has come for too long. The lock is held."""
        stuck = self._reader
        if stuck.alive is None:  # pausing on purpose
            return
        silent = time.perf_counter() - stuck.alive
        if silent < (self._timing.opening if stuck.opening else self._timing.stall):
            return
        self._stuck = [reader for reader in (*self._stuck, stuck) if reader.is_alive()]
        self._lost = self._lost or stuck.alive
        pause = self._take_pause()
        what = "opening it takes too long" if stuck.opening else "stalled: no frame"
        self._post(f"{what}, {silent:.1f} s; trying again in {pause:g} s")
        self._reader = _Reader(self._run, delay=pause)
        self._reader.start()

    # What the reader's thread does.

    def _run(self, reader: _Reader) -> None:
        self._closed.wait(reader.delay)
        try:
            while self._is_wanted(reader):
                with quiet():
                    what = self._read_until_lost(reader)
                with self._changed:
                    if not self._is_wanted(reader):
                        return
                    self._lost = self._lost or reader.alive
                    reader.alive = None
                    pause = self._take_pause()
                    self._post(f"{what}; trying again in {pause:g} s")
                self._closed.wait(pause)
        except Exception as error:
            # A first opening that failed. Anything else is a bug, which must not pass for a silent camera.
            with self._changed:
                if reader is self._reader:
                    self._failure = error
                    self._changed.notify_all()

    def _read_until_lost(self, reader: _Reader) -> str:
        """Open the device and read it while it lasts; then say what happened to it."""
        try:
            capture = self._open(reader)
        except SourceError:
            if self._started is None:
                raise
            return "still not back"
        try:
            while self._is_wanted(reader) and capture.grab():
                self._take_frame(reader, capture, time.perf_counter())
        finally:
            capture.release()
        if self._started is None and self._is_wanted(reader):
            raise SourceError(
                f"source {self.name}: opens but delivers no frame that can be decoded; is another program using it?"
            )
        if self._lost is not None:
            return "opens but delivers no frame"
        silent = time.perf_counter() - (reader.alive or 0.0)
        return f"lost: no frame for {silent:.1f} s" if silent > 0.5 * self._timing.stall else "lost"

    def _open(self, reader: _Reader) -> Any:
        """The opened cv2.VideoCapture."""
        if sum(stuck.is_alive() for stuck in self._stuck) > MAX_STUCK_READERS:
            raise SourceError(f"source {self.name}: too many attempts at it have not returned")
        reader.opening, reader.alive = True, time.perf_counter()
        patience = Patience(opening=self._timing.opening, reading=0.8 * self._timing.stall)
        with quiet_opening():
            capture = self._device.open(patience, on_report=self._post_from(reader))
        with self._changed:
            reader.opening, reader.alive = False, time.perf_counter()
            if self._started is None and self._device.states_its_fps and (fps := stated_fps(capture)) is not None:
                self.fps = fps
                self._sampler = Sampler(self._rate, tolerance(fps))
        return capture

    def _take_frame(self, reader: _Reader, capture: Any, captured: float) -> None:
        with self._changed:
            if not self._is_wanted(reader):
                return
            index = self._next_index
            self._next_index += 1
            timestamp = 0.0 if self._started is None else captured - self._started
            due = self._sampler.due(timestamp)
        decoded, bgr = capture.retrieve() if due else (True, None)
        with self._changed:
            if not self._is_wanted(reader):
                return
            if not decoded or (due and (bgr is None or bgr.size == 0)):
                if self.bad_frames == 0:
                    self._post(f"frame {index} cannot be decoded; continuing past bad frames")
                self.bad_frames += 1
                self._sampler.restart()
                return
            reader.alive = captured
            self._pause = self._timing.first_retry
            if self._lost is not None:
                self._post(f"back after {captured - self._lost:.1f} s")
                self._lost = None
            if self._started is None:
                self._started = captured
            if due:
                self.dropped += self._newest is not None
                self._newest = _Picture(bgr, index, timestamp, captured)
            self._changed.notify_all()

    def _is_wanted(self, reader: _Reader) -> bool:
        return reader is self._reader and not self._closed.is_set()

    def _take_pause(self) -> float:
        """The pause before the next opening; the one after that doubles. The lock is held."""
        pause = self._pause
        self._pause = min(2 * pause, self._timing.longest_retry)
        return pause

    def _post(self, text: str) -> None:
        """Leave a report for the consumer's thread. The lock is held."""
        self._reports.append(text)
        self._changed.notify_all()

    def _post_from(self, reader: _Reader) -> Callable[[str], None]:
        def post(text: str) -> None:
            with self._changed:
                if self._is_wanted(reader):
                    self._post(text)

        return post


@dataclass(frozen=True, slots=True)
class _Picture:
    bgr: Any  # as OpenCV decoded it; converted only when it is delivered
    index: int
    timestamp: float
    captured: float


class _Reader(threading.Thread):
    """One attempt at reading the device without a stall."""

    def __init__(self, run: Callable[[_Reader], None], delay: float) -> None:
        super().__init__(name="framestep source", daemon=True)  # __main__ knows them by this name
        self._run_reader = run
        self.delay = delay  # seconds before it opens the device
        self.alive: float | None = None  # perf_counter of the last good frame or opening; None while it pauses
        self.opening = False

    def run(self) -> None:
        self._run_reader(self)
