"""Video files: every frame in order, past the ones that are corrupt."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import SourceError
from .frame import Frame, Source
from .opencv import as_opencv_takes, has_backend, quiet_opening, require_cv2, stated_fps, to_rgb
from .sampling import Sampler

ASSUMED_FPS = 25.0  # where a header states none
# How many failures in a row end a file whose header does not say how many frames to expect.
PATIENCE_WITHOUT_LENGTH = 64
# The same where it does: a damaged header may announce billions, and OpenCV states no position while it fails, so that
# the end of the file and a stretch of bad frames look alike. Failing this often takes some 30 ms.
LONGEST_PATIENCE = 10_000
FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")


class VideoFile(Source):
    """A video file, decoded frame by frame as it is read; no more than one frame is held.

    Frames that cannot be decoded are skipped and counted in `bad_frames`, and take their place in the index.
    Damage that the decoder conceals passes for a frame. Timestamps are the file's presentation times, counted from the
    first, where they increase; otherwise they continue at the nominal rate. May be closed while another thread reads.
    """

    live = False

    def __init__(self, path: Path, *, rate: float | None, on_report: Callable[[str], None]) -> None:
        super().__init__(str(path), on_report)
        self._path = path.absolute()
        self._cv2 = require_cv2()
        self._reading = threading.RLock()  # to release a capture at work ends the process
        self._capture = _open(self._cv2, path)
        self.fps = stated_fps(self._capture)
        announced = int(self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT))
        self.length = announced if announced > 0 else None
        self._sampler = Sampler(rate)
        self._next_index = 0
        self._reached = 0
        self._timestamp = -math.inf
        self._first_is_grabbed = self._grab()
        if not self._first_is_grabbed:
            self.close()
            raise SourceError(f"video {path}: no frame in it can be decoded")
        self._report_rate_above_fps(rate)

    def read(self, timeout: float | None = None) -> Frame | None:
        with self._reading:
            return self._read()

    def close(self) -> None:
        self.ended = True
        with self._reading:
            self._capture.release()

    def _read(self) -> Frame | None:
        while not self.ended:
            if not self._first_is_grabbed and not self._grab():
                self._finish()
                break
            self._first_is_grabbed = False
            captured = time.perf_counter()
            if not self._sampler.due(self._timestamp):
                continue
            decoded, picture = self._capture.retrieve()
            if decoded and picture is not None:
                return Frame(to_rgb(picture), self._next_index - 1, self._timestamp, captured)
            self._count_bad(1, self._next_index - 1)
            self._sampler.restart()
        return None

    def _grab(self) -> bool:
        """Move to the next frame that can be decoded, and date it. False at the end."""
        # A failure is either a frame that cannot be decoded or the end: only trying on tells.
        patience = PATIENCE_WITHOUT_LENGTH
        if self.length is not None:
            patience = min(self.length - self._next_index, LONGEST_PATIENCE)
        failures = 0
        while not self._capture.grab():
            failures += 1
            if failures > patience:
                return False
        if failures:
            self._count_bad(failures, self._next_index)
        index = self._next_index + failures
        self._next_index = index + 1
        self._timestamp = self._date(index, failures)
        self._reached = max(self._next_index, self._frames_of_time())
        return True

    def _date(self, index: int, failures: int) -> float:
        stated = float(self._capture.get(self._cv2.CAP_PROP_POS_MSEC)) / 1000.0
        if math.isfinite(stated) and stated >= 0 and stated > self._timestamp:
            return stated
        fps = self.fps or ASSUMED_FPS
        return index / fps if self._timestamp < 0 else self._timestamp + (1 + failures) / fps

    def _frames_of_time(self) -> int:
        """Frames up to here, were they as regular as the nominal rate.

        A container that states a duration and no count announces so many, and where its first frame comes late some
        count from 0 and not from that frame.
        """
        if self.fps is None:
            return 0
        since_first = self._timestamp * self.fps
        since_zero = float(self._capture.get(self._cv2.CAP_PROP_PTS)) if hasattr(self._cv2, "CAP_PROP_PTS") else 0.0
        return round(max(since_first, since_zero)) + 1

    def _count_bad(self, count: int, index: int) -> None:
        if self.bad_frames == 0:
            self._report(f"frame {index} cannot be decoded; continuing past bad frames")
        self.bad_frames += count

    def _finish(self) -> None:
        self.close()
        if self.bad_frames:
            self._report(f"{self.bad_frames} of {self._next_index} frames could not be decoded")
        # The product of a duration and a rate is off by a little.
        if self.length is None or self.length - self._reached <= max(1, self.length // 100):
            return
        if not _has_whole_boxes(self._path):
            self._report(
                f"ends early: {self._next_index} of the {self.length} frames that its header announces; it was cut off"
            )


def _open(cv2: Any, path: Path) -> Any:
    """An opened cv2.VideoCapture."""
    try:
        if path.stat().st_size == 0:
            raise SourceError(f"video {path}: the file is empty")
        with path.open("rb"):
            pass
    except OSError as error:
        raise SourceError(f"video {path}: cannot be read: {error.strerror}") from error
    backend = cv2.CAP_FFMPEG if has_backend(cv2.CAP_FFMPEG) else cv2.CAP_ANY
    with quiet_opening():
        # Absolute, because FFmpeg takes what stands before a colon for a protocol.
        capture = cv2.VideoCapture(as_opencv_takes(path.absolute()), backend)
    if not capture.isOpened():
        raise SourceError(
            f"video {path}: this is no video, it was cut off before its index was written,"
            " or OpenCV knows no decoder for it"
        )
    return capture


def _has_whole_boxes(path: Path) -> bool:
    """Whether a file is MP4 or QuickTime and no byte is missing at its end (the boxes of ISO/IEC 14496-12, 4.2).

    One that is whole has fewer frames than it announces where a list of edits leaves some out.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = 0
            while start < size:
                file.seek(start)
                header = file.read(16)
                length, kind = int.from_bytes(header[:4], "big"), header[4:8]
                if start == 0 and kind not in FIRST_BOXES:
                    return False
                if length == 0:  # to the end of the file
                    return True
                if length == 1:
                    length = int.from_bytes(header[8:], "big")
                if length < 8:
                    return False
                start += length
            return start == size
    except OSError:
        return False
