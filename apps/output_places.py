"""Where outputs go: whether a file can be written there, and what is said where it cannot."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ..runtime.bundle import bundle_around
from ..runtime.errors import OutputError

DISK_RESERVE = 64 * 1024 * 1024  # bytes left free, so that a recording can still be finished


def check_writable(path: Path, option: str) -> None:
    """Raises OutputError, naming `option` and `path`, unless a file can be written at `path`. Changes
    nothing.
    """
    folder = path.parent
    if path == Path("-"):
        raise OutputError(f"{option} -: does not go to standard output; name a file")
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


def check_room(path: Path, needed: int, consequence: str) -> None:
    """Raises OutputError, naming `path` and the `consequence`, where the disk has less than `needed` bytes and the
    reserve.
    """
    try:
        free = shutil.disk_usage(Path(os.path.realpath(path)).parent).free
    except OSError as error:
        raise unwritable(path, error) from error
    if free - needed < DISK_RESERVE:
        raise OutputError(
            f"{path}: disk nearly full ({free >> 20} MiB left, {DISK_RESERVE >> 20} MiB are kept free): "
            f"{consequence}; make room or write elsewhere"
        )


def unwritable(path: Path, error: OSError) -> OutputError:
    """What to raise where the system refuses to write `path`."""
    return OutputError(f"{path}: cannot be written: {_reason(error)}")


def told(error: OutputError | OSError) -> str:
    """What to say of an output that is lost."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: cannot be written: {_reason(error)}"
    return str(error)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
