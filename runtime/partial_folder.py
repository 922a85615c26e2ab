"""Folders in the making, beside the place that they will have. Whoever writes one holds a lock on it, so that what a
process that is gone has left is told from what another one is writing.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

MARK_BYTES = 4


def partial_path(place: Path) -> Path:
    """A new name for what will be at `place`."""
    return place.parent / f".{place.name}.partial-{secrets.token_hex(MARK_BYTES)}"


def hold(folder: Path) -> int | None:
    """Lock a folder until the descriptor that this gives is closed or the process ends.

    Returns:
        None where the folder is gone or its file system has no locks.
    """
    return _lock(folder, fcntl.LOCK_EX)


def remove_abandoned(place: Path) -> list[Path]:
    """Remove the folders that nobody holds of those that were to be at `place`, and tell which they were."""
    name = re.compile(re.escape(f".{place.name}.partial-") + f"[0-9a-f]{{{2 * MARK_BYTES}}}")
    removed = []
    with suppress(OSError):
        for folder in [path for path in place.parent.iterdir() if name.fullmatch(path.name)]:
            lock = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
                removed.append(folder)
    return [folder for folder in removed if not folder.exists()]


def _lock(folder: Path, how: int) -> int | None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, how)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            return None
        raise
    return descriptor
