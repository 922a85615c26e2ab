"""Live sources: a thread reads the device, the consumer gets the newest frame, and what is lost is opened again."""

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
from .opencv import require_cv2, to_rgb
from .sampling import ROUNDING, Sampler

MAX_PLAUSIBLE_FPS = 1000.0
# How long one wait lasts before a stall is looked for; also keeps Ctrl-C prompt on systems where a wait defers it.
GLANCE = 0.5
CLOSING = 2.0  # seconds that close() waits for the reader
# A reader that never came back from OpenCV may still hold the device: opening ever more of them would only leak.
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

    The thread keeps one picture: a newer one replaces it and counts as a drop. It does the sampling too, so that
    frames skipped by the rate are neither converted nor dropped. A device that ends, fails or delivers nothing for
    `timing.stall` seconds is reported and opened again, with growing pauses, until `close()`; index and timestamp go
    on, the timestamp over the time that was lost.

    A call into OpenCV can block for longer than anybody wants to wait, and nothing can interrupt it. The consumer
    therefore never waits for the thread: it abandons a reader that is stuck and starts another. The stuck one gives its
    capture back when its call returns.

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
            self._stop()
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

    def close(self) -> None:
        self._stop()
        self._reader.join(CLOSING)
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
        self._reports.append(f"{what}, {silent:.1f} s; trying again in {pause:g} s")
        self._reader = _Reader(self._run, delay=pause)
        self._reader.start()

    def _stop(self) -> None:
        self._closed.set()
        with self._changed:
            self.ended = True
            self._newest = None
            self._changed.notify_all()

    # What the reader's thread does.

    def _run(self, reader: _Reader) -> None:
        self._closed.wait(reader.delay)
        try:
            while self._is_wanted(reader):
                self._read_until_lost(reader)
        except Exception as error:
            # Devices and networks fail by return value: this is a bug, or a first opening that failed.
            with self._changed:
                if reader is self._reader:
                    self._failure = error
                    self._changed.notify_all()

    def _is_wanted(self, reader: _Reader) -> bool:
        return reader is self._reader and not self._closed.is_set()

    def _read_until_lost(self, reader: _Reader) -> None:
        """Open the device, read it until it is lost, then pause."""
        capture = self._open(reader)
        if capture is None:
            return
        try:
            while self._is_wanted(reader) and capture.grab():
                self._take_frame(reader, capture, time.perf_counter())
        finally:
            capture.release()
        with self._changed:
            if not self._is_wanted(reader):
                return
            alive, reader.alive = reader.alive, None
            assert alive is not None
            if self._started is None:
                raise SourceError(
                    f"source {self.name}: opens but delivers no frame; another program may be using it"
                )
            what = "lost" if self._lost is None else "opens but delivers no frame"
            self._lost = self._lost or alive
            self._pause_after(what)

    def _open(self, reader: _Reader) -> Any:
        """The opened capture; None where it could not be reopened, after a pause."""
        if sum(stuck.is_alive() for stuck in self._stuck) > MAX_STUCK_READERS:
            self._closed.wait(self._timing.longest_retry)
            return None
        ...
