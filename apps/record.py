"""The files that a run writes: JSON lines, an annotated video, arrays, masks.

Each writer fails before the first frame if its file cannot be written, and with an OutputError that names the
file if the disk refuses later. `close()` after a failure still finishes the file with what was written until
then.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np

from ..runtime.bundle import bundle_around
from ..runtime.counted import counted
from ..runtime.errors import OutputError
from ..runtime.sources.opencv import as_opencv_takes

DISK_RESERVE = 64 * 1024 * 1024  # bytes left free, so that a recording can still be finished
FRAMES_BETWEEN_DISK_CHECKS = 16
FRAMES_WITHOUT_GROWTH = 3000  # the encoder buffers 256 KiB: 80 annotated frames, 700 of pure black
FRAMES_TO_MEASURE_RATE = 12
SECONDS_TO_MEASURE_RATE = 1.0
NOT_UTF_8 = "backslashreplace"  # bytes of a file's name, which JSON can hold as escapes alone
ROUNDING = 0.05  # of a frame, in timestamps
LONGEST_ABSENCE_S = 2.0  # of a live source that a recording keeps
LONGEST_STILL_S = 60.0  # that a recording of a file shows one picture


def check_writable(path: Path, option: str) -> None:
    """Raises OutputError, naming `option` and `path`, unless a file can be written at `path`. Changes
    nothing.
    """
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{option} {path}: is a folder; name a file")
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise OutputError(f"{option} {path}: cannot be written: folder {folder} {what}")
    if path.exists():
        if not os.access(path, os.W_OK):
            raise OutputError(f"{option} {path}: cannot be written: no permission to write this file")
        return
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{option} {path}: cannot be written: {_reason(error)}") from error


def check_outside_bundles(path: Path, option: str) -> None:
    """Raises OutputError, naming `option` and `path`, where `path` is a bundle or lies in one."""
    if (bundle := bundle_around(path)) is not None:
        raise OutputError(f"{option} {path}: lies in the bundle {bundle}; name another place")


def identity(path: Path) -> object:
    """Equal for two names of one file."""
    try:
        found = path.stat()
    except OSError:
        return path.resolve()
    return found.st_dev, found.st_ino


def check_new_folder(path: Path, option: str) -> None:
    """Raises OutputError, naming `option` and `path`, unless `path` is an empty folder or can become one. Changes
    nothing.
    """
    if not path.is_dir():
        if path.exists():
            raise OutputError(f"{option} {path}: is a file; name a folder")
        check_writable(path, option)
        return
    try:
        if any(path.iterdir()):
            raise OutputError(
                f"{option} {path}: is not empty; name a new folder, so that no older masks mix with these"
            )
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(f"{option} {path}: cannot be written: {_reason(error)}") from error


class JsonLines:
    """One JSON object a line, each line complete on disk as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._line_start = 0
        self._failed = False
        try:
            self._file: IO[bytes] | None = path.open("wb", buffering=0)
        except OSError as error:
            raise _unwritable(path, error) from error

    def write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            raise OutputError(f"{self.path}: already closed")
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode(errors=NOT_UTF_8) + b"\n"
        try:
            _write_all(self._file, line)
        except OSError as error:
            self._failed = True
            self._cut_unfinished_line()
            raise _unwritable(self.path, error) from error
        self._line_start += len(line)

    def files(self) -> list[Path]:
        """The file, unless nothing could be written to it."""
        return [] if self._failed and not self._line_start else [self.path]

    def close(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            file.close()
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _cut_unfinished_line(self) -> None:
        if self._file is not None and self.path.is_file():
            self._file.truncate(self._line_start)


class VideoRecorder:
    """An mp4 (MPEG-4 part 2). It appears under its name when it is complete; until then it is
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
            self._partial.replace(self._place)
        except OSError as error:
            raise _unwritable(self.path, error) from error
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
        free = shutil.disk_usage(self._place.parent).free
        if free < DISK_RESERVE:
            raise _disk_full(self.path, free, f"recording stopped after {counted(self._frames, 'frame')}")
        size = self._partial.stat().st_size if self._partial.exists() else 0
        if size > self._grown_bytes:
            self._grown_bytes, self._grown_at = size, self._appended  # repeats cost next to nothing
        elif self._appended - self._grown_at > FRAMES_WITHOUT_GROWTH:
            raise OutputError(f"{self.path}: the recording no longer grows; is the disk full, or a quota reached?")


class ArrayRecorder:
    """Arrays of every frame, stacked along a first axis T into one .npz file.

    Frames go to unnamed temporary files beside the result, so memory does not grow; `close` packs them.
    Packing needs room for the largest array once more: that much is kept free.
    """

    def __init__(self, path: Path, constants: dict[str, np.ndarray]) -> None:
        self.path = path
        self._place = Path(os.path.realpath(path))
        self.finished = False
        self.frames = 0
        self._closed = False
        self._constants = constants
        self._columns: dict[str, _Column] = {}

    def write(self, arrays: dict[str, np.ndarray]) -> None:
        """Appends one frame. Names, shapes and dtypes are those of the first call."""
        if self.frames % FRAMES_BETWEEN_DISK_CHECKS == 0:
            self._check_disk()
        try:
            if not self._columns:
                self._columns = {name: _Column(array, self._place.parent) for name, array in arrays.items()}
            for name, column in self._columns.items():
                column.append(arrays[name])
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.frames += 1

    def close(self) -> None:
        """Writes the .npz: under its name only when complete. Without any frame there is no file."""
        if self._closed:
            return
        self._closed = True
        if not self.frames:
            return
        columns, self._columns = self._columns, {}
        partial = self._place.with_name(f".{self.path.name}.partial-{secrets.token_hex(4)}")
        try:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
                for name, constant in self._constants.items():
                    with archive.open(f"{name}.npy", "w") as member:
                        np.lib.format.write_array(member, constant, allow_pickle=False)
                for name, column in sorted(columns.items(), key=lambda item: -item[1].row_bytes):
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        column.move_to(member, self.frames)
            partial.replace(self._place)
            self.finished = True
        except OSError as error:
            raise _unwritable(self.path, error) from error
        finally:
            partial.unlink(missing_ok=True)
            for column in columns.values():
                column.close()  # unbuffered: nothing to flush that could fail

    def _check_disk(self) -> None:
        packing = max((column.row_bytes * self.frames for column in self._columns.values()), default=0)
        free = shutil.disk_usage(self._place.parent).free
        if free - packing < DISK_RESERVE:
            raise _disk_full(self.path, free, f"saving features stopped after {counted(self.frames, 'frame')}")


class MaskFolder:
    """A PNG for each frame, `STREAM.INDEX.png`, whose bytes are labels, and `labels.json`, which names them."""

    def __init__(self, path: Path, legend: dict[str, Any]) -> None:
        self.path = path
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error
        self._write(
            path / "labels.json", json.dumps(legend, ensure_ascii=False, indent=1).encode(errors=NOT_UTF_8) + b"\n"
        )

    def write(self, stream: int, index: int, mask: np.ndarray) -> None:
        """Adds the mask of one frame, uint8 [height, width]."""
        self._write(self.path / f"{stream}.{index:06d}.png", cv2.imencode(".png", mask)[1].tobytes())

    def _write(self, file: Path, data: bytes) -> None:
        try:
            file.write_bytes(data)
        except OSError as error:
            file.unlink(missing_ok=True)  # no half picture
            raise _unwritable(file, error) from error


class _Column:
    """One array's frames, raw, in an unnamed file."""

    def __init__(self, first: np.ndarray, folder: Path) -> None:
        self._shape = first.shape
        self._dtype = first.dtype
        self.row_bytes = first.nbytes
        # it lives as long as the recorder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def append(self, array: np.ndarray) -> None:
        if array.shape != self._shape or array.dtype != self._dtype:
            raise ValueError(f"expected {self._dtype} {self._shape}, found {array.dtype} {array.shape}")
        _write_all(self._file, np.ascontiguousarray(array).tobytes())

    def move_to(self, member: IO[bytes], frames: int) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (frames, *self._shape),
        }
        np.lib.format.write_array_header_2_0(member, header)
        self._file.seek(0)
        left = frames * self.row_bytes  # a frame that failed halfway is left out
        while left:
            chunk = self._file.read(min(left, 1 << 20))
            if not chunk:
                raise OSError("temporary file of features was cut short")
            member.write(chunk)
            left -= len(chunk)
        self.close()

    def close(self) -> None:
        self._file.close()


def _write_all(file: IO[bytes], data: bytes) -> None:
    """Writes to an unbuffered file, which may take a part before it fails."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


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


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path}: cannot be written: {_reason(error)}")


def _disk_full(path: Path, free: int, consequence: str) -> OutputError:
    return OutputError(
        f"{path}: disk nearly full ({free >> 20} MiB left, {DISK_RESERVE >> 20} MiB are kept free): "
        f"{consequence}; make room or write elsewhere"
    )
