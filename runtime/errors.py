"""The errors that framestep raises on purpose.

A message is one line: what is wrong, where (file, key, expected and found) and what to do. The command line prints it
and exits with status 2. Any other exception is a bug.
"""

from __future__ import annotations


class FramestepError(Exception):
    """Base of every error that framestep raises on purpose."""


class BundleError(FramestepError):
    """A bundle, or a file in it, is missing, damaged or of a kind that this version cannot run."""


class CheckpointError(FramestepError):
    """A checkpoint cannot be read, or its weights do not fit its configuration."""


class EngineError(FramestepError):
    """An engine or a device is unknown or cannot be used on this machine."""


class FrameError(FramestepError):
    """A frame is not uint8 RGB of shape [height, width, 3]."""


class SourceError(FramestepError):
    """A frame source cannot be opened or read."""


class StateError(FramestepError):
    """A saved stream state is damaged or belongs to another model."""


class OutputError(FramestepError):
    """A result cannot be written where it was asked for."""


def first_line(error: BaseException) -> str:
    """The first line of what another package's error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
