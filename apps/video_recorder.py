"""The annotated video that a run writes.

As the writers of `record` it fails before the first frame if its file cannot be written, and with an OutputError that
names the file if the disk refuses later; `close()` after a failure still finishes the file.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import cv2
import numpy as np

from ..runtime.counted import counted
from ..runtime.durable import sync, sync_names
from ..runtime.errors import OutputError
from ..runtime.sources.opencv import as_opencv_takes
from .output_places import check_room, unwritable

FRAMES_WITHOUT_GROWTH = 3000  # the encoder buffers 256 KiB: 80 annotated frames, 700 of pure black
FRAMES_BETWEEN_DISK_CHECKS = 16
FRAMES_TO_MEASURE_RATE = 12
SECONDS_TO_MEASURE_RATE = 1.0
ROUNDING = 0.05  # of a frame, in timestamps
LONGEST_ABSENCE_S = 2.0  # of a live source that a recording keeps
LONGEST_STILL_S = 60.0  # that a recording of a file shows one picture


class VideoRecorder:
    """An mp4 (MPEG-4 part 2). It appears under its name when it is complete and on the disk; until then it is
    `.NAME.partial-MARK.mp4`.

    It keeps the pace of the frames' timestamps to within one frame of its own: a picture is repeated until the next is
    due, and one that comes a whole frame too early is skipped. Frames that come at `fps` are each written once.
    Without `fps`, for live sources, the rate is measured on the first frames, and an absence is cut to 2 s; a picture
    of a file may stand for 60 s. The first frame sets the size; frames of another size are fitted into it.
    """

    def __init__(self, path: Path, fps: float | None) -> None:
        self.path = path
        self.finished = False
        self._place = Path(os.path.realpath(path))  # where a link leads, it goes on leading
        self._partial = self._place.with_name(f".{path.stem}.partial-{secrets.token_hex(4)}.mp4")
        self._fps = fps
        self._longest_s = LONGEST_ABSENCE_S if fps is None else LONGEST_STILL_S
        self._early: list[tuple[np.ndarray, float]] = []
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._latest = np.zeros((0, 0, 3), np.uint8)
        self._first_timestamp = 0.0
        self._frames = 0
        self._appended = 0
        self._grown_bytes = 0
        self._grown_at = 0
        self._try_encoder()

    def write(self, bgr: np.ndarray, timestamp: float) -> None:
        """Appends `bgr`, uint8 [height, width, 3], shown at `timestamp` seconds."""
        if self._fps is None:
            self._early.append((bgr, timestamp))
            elapsed = timestamp - self._early[0][1]
            if len(self._early) < 2 or (
                len(self._early) < FRAMES_TO_MEASURE_RATE and elapsed < SECONDS_TO_MEASURE_RATE
            ):
                return
            self._flush_early()
        else:
            self._append(bgr, timestamp)

    def close(self) -> None:
        """Finishes the file. Without any frame there is no file. Raises OutputError if it cannot be read
        back.
        """
        if self._early:
            self._flush_early()
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        if not self._frames:
            self._partial.unlink(missing_ok=True)
            return
        readable = cv2.VideoCapture(as_opencv_takes(self._partial))
        frames = int(readable.get(cv2.CAP_PROP_FRAME_COUNT)) if readable.isOpened() else 0
        readable.release()
        if frames != self._frames:
            self._partial.unlink(missing_ok=True)
            raise OutputError(
                f"{self.path}: the recording could not be finished ({frames} of {counted(self._frames, 'frame')} can "
                f"be read back) and was removed; is the disk full?"
            )
        try:
            sync(self._partial)
            self._partial.replace(self._place)
            sync_names(self._place.parent)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self.finished = True

    def _try_encoder(self) -> None:
        """Fails now rather than at the first frame."""
        writer = self._encoder(30.0, (64, 64))
        writer.write(np.zeros((64, 64, 3), np.uint8))
        writer.release()
        size = self._partial.stat().st_size if self._partial.exists() else 0
        self._partial.unlink(missing_ok=True)
        if not size:
            raise OutputError(f"{self.path}: cannot be written: no video can be recorded in {self.path.parent}")

    def _encoder(self, fps: float, size: tuple[int, int]) -> cv2.VideoWriter:
        writer = cv2.VideoWriter(as_opencv_takes(self._partial), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
        if not writer.isOpened():
            picture = f"{size[0]}x{size[1]} at {counted(fps, 'frame')} a second"
            raise OutputError(f"{self.path}: cannot be written: OpenCV's encoder (mp4v) takes no {picture} here")
        return writer

    def _flush_early(self) -> None:
        early, self._early = self._early, []
        elapsed = early[-1][1] - early[0][1]
        self._fps = min(max((len(early) - 1) / elapsed, 0.1), 240.0) if elapsed > 0 else 30.0
        for bgr, timestamp in early:
            self._append(bgr, timestamp)

    def _append(self, bgr: np.ndarray, timestamp: float) -> None:
        assert self._fps is not None
        if self._writer is None:
            self._size = (bgr.shape[1], bgr.shape[0])
            self._first_timestamp = timestamp
            self._writer = self._encoder(self._fps, self._size)
        fitted = _fitted(bgr, self._size)
        ahead = self._ahead(timestamp)
        if ahead > ROUNDING - 1:
            if self._appended % FRAMES_BETWEEN_DISK_CHECKS == 0:
                self._check_disk()
            self._appended += 1
            for picture in (*[self._latest] * int(ahead + ROUNDING), fitted):
                self._writer.write(picture)
                self._frames += 1
        self._latest = fitted

    def _ahead(self, timestamp: float) -> float:
        """By how many frames a picture is due after the next one of the file, whose time is `_frames` / fps."""
        assert self._fps is not None
        ahead = (timestamp - self._first_timestamp) * self._fps - self._frames
        longest = self._longest_s * self._fps
        if ahead > longest:  # do not fill the disk with a still picture
            self._first_timestamp += (ahead - longest) / self._fps
        return min(ahead, longest)

    def _check_disk(self) -> None:
        # OpenCV's writer swallows the error of a full disk: look before it comes to that.
        check_room(self.path, 0, f"recording stopped after {counted(self._frames, 'frame')}")
        size = self._partial.stat().st_size if self._partial.exists() else 0
        if size > self._grown_bytes:
            self._grown_bytes, self._grown_at = size, self._appended  # repeats cost next to nothing
        elif self._appended - self._grown_at > FRAMES_WITHOUT_GROWTH:
            raise OutputError(f"{self.path}: the recording no longer grows; is the disk full, or a quota reached?")


def _fitted(bgr: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`bgr` scaled into `size` (width, height), with black bars where the aspect differs."""
    width, height = size
    if bgr.shape[:2] == (height, width):
        return bgr
    scale = min(width / bgr.shape[1], height / bgr.shape[0])
    inner = (max(1, round(bgr.shape[1] * scale)), max(1, round(bgr.shape[0] * scale)))
    canvas = np.zeros((height, width, 3), np.uint8)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    canvas[top : top + inner[1], left : left + inner[0]] = cv2.resize(bgr, inner, interpolation=cv2.INTER_AREA)
    return canvas
