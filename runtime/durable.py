"""Files that a power cut leaves whole or as they were before."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .errors import OutputError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h
LONGEST_MARKED = 200  # bytes of a name, whose limit is 255 with what marks a temporary one


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = _read_umask()  # once, at import: to read it is to change it for a moment


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file in one step: a reader sees the whole file or the one before, also after a power cut. It is on the
    disk when this returns. A link goes on leading to it.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = None
    try:
        place = Path(os.path.realpath(path))
        if place.exists() and not (place.is_file() or place.is_dir()):
            raise OutputError(f"{path}: cannot be written: is a device or a pipe; name a file")
        marked = os.fsdecode(os.fsencode(place.name)[:LONGEST_MARKED])
        descriptor, temporary = tempfile.mkstemp(prefix=f".{marked}.", dir=place.parent)
        with os.fdopen(descriptor, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(descriptor)
        Path(temporary).chmod(0o666 & ~UMASK)
        Path(temporary).replace(place)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None
        raise
    sync_names(place.parent)


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk. Raises OSError where the disk refuses."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, so that neither is ever without its file or folder.

    Returns:
        Whether that was done: not every system and file system can.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux
    return rename is not None and rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def sync_names(folder: Path) -> None:
    """The same of the names in a folder, where folder and file system let one ask; the files are whole either way."""
    with suppress(OSError):
        sync(folder)
