"""The files that a run writes beside its video: JSON lines, arrays, masks.

Each writer fails before the first frame if its file cannot be written, and with an OutputError that names the
file if the disk refuses later. `close()` after a failure still finishes the file with what was written until
then.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import tempfile
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np

from ..runtime.counted import counted
from ..runtime.durable import sync, sync_names
from ..runtime.errors import OutputError
from .output_places import check_room, unwritable

STANDARD_OUTPUT = Path("/dev/stdout")
PIPE_PATIENCE_S = 10.0
FRAMES_BETWEEN_DISK_CHECKS = 16
NOT_UTF_8 = "backslashreplace"  # bytes of a file's name, which JSON can hold as escapes alone


class JsonLines:
    """One JSON object a line, each line complete in its file as soon as it is written; `close` brings it to the disk.

    A pipe is given `PIPE_PATIENCE_S` to find a reader. `STANDARD_OUTPUT` takes the lines where the shell has it: behind
    what a file already holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._line_start = 0
        self._failed = False
        try:
            opened = os.dup(1) if path == STANDARD_OUTPUT else _opened(path)  # to open that anew would empty it
            self._file: IO[bytes] | None = open(opened, "wb", buffering=0)  # noqa: PTH123, SIM115
        except OSError as error:
            raise unwritable(path, error) from error

    def write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            raise OutputError(f"{self.path}: already closed")
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode(errors=NOT_UTF_8) + b"\n"
        try:
            _write_all(self._file, line)
        except OSError as error:
            self._failed = True
            self._cut_unfinished_line()
            raise unwritable(self.path, error) from error
        self._line_start += len(line)

    def files(self) -> list[Path]:
        """The file, unless nothing could be written to it."""
        return [] if self._failed and not self._line_start else [self.path]

    def close(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            with file:
                if self._is_file():
                    os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _is_file(self) -> bool:
        return self.path != STANDARD_OUTPUT and self.path.is_file()

    def _cut_unfinished_line(self) -> None:
        if self._file is not None and self._is_file():
            with suppress(OSError):  # told is what failed first
                self._file.truncate(self._line_start)


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
            raise unwritable(self.path, error) from error
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
            sync(partial)
            partial.replace(self._place)
            sync_names(self._place.parent)
            self.finished = True
        except OSError as error:
            raise unwritable(self.path, error) from error
        finally:
            partial.unlink(missing_ok=True)
            for column in columns.values():
                column.close()  # unbuffered: nothing to flush that could fail

    def _check_disk(self) -> None:
        packing = max((column.row_bytes * self.frames for column in self._columns.values()), default=0)
        check_room(self.path, packing, f"saving features stopped after {counted(self.frames, 'frame')}")


class MaskFolder:
    """A PNG for each frame, `STREAM.INDEX.png`, whose bytes are labels, and `labels.json`, which names them."""

    def __init__(self, path: Path, legend: dict[str, Any]) -> None:
        self.path = path
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise unwritable(path, error) from error
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
            raise unwritable(file, error) from error


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


def _opened(path: Path) -> int:
    """A descriptor of a file, emptied, or of a pipe that somebody reads."""
    deadline = time.monotonic() + PIPE_PATIENCE_S
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno != errno.ENXIO or not path.is_fifo():
                raise
        else:
            os.set_blocking(descriptor, True)
            return descriptor
        if time.monotonic() > deadline:
            raise OutputError(f"{path}: is a pipe that nobody reads; start what reads it first")
        time.sleep(0.05)


def _write_all(file: IO[bytes], data: bytes) -> None:
    """Writes to an unbuffered file, which may take a part before it fails."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
