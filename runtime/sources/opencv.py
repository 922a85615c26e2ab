"""OpenCV as the sources use it: imported on demand, kept quiet, and its pictures turned into RGB."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import SourceError
from .frame import RgbImage

FFMPEG_LOGLEVEL = "OPENCV_FFMPEG_LOGLEVEL"


def require_cv2() -> Any:
    """The cv2 module. Raises `SourceError` where OpenCV is not installed."""
    try:
        return importlib.import_module("cv2")
    except ImportError as error:
        raise SourceError(f"frames are read with OpenCV ({error}): pip install opencv-python") from error


def has_backend(backend: int) -> bool:
    """Whether this OpenCV can really read through a backend such as cv2.CAP_FFMPEG."""
    return bool(require_cv2().videoio_registry.hasBackend(backend))


def has_gstreamer() -> bool:
    """Whether this OpenCV was built with GStreamer."""
    return has_backend(require_cv2().CAP_GSTREAMER)


def to_rgb(picture: Any) -> RgbImage:
    """A decoded BGR, BGRA or grey picture as a new uint8 [height, width, 3] RGB array."""
    cv2 = require_cv2()
    channels = 1 if picture.ndim == 2 else picture.shape[2]
    code = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}[channels]
    rgb: RgbImage = cv2.cvtColor(picture, code)
    return rgb


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what OpenCV and FFmpeg print: what goes wrong inside is reported by the caller, in one line.

    FFmpeg's own messages are settled when a process first opens something with OpenCV; where the user has set
    their level by OPENCV_FFMPEG_LOGLEVEL, that holds.
    """
    global _quiet_depth, _usual_level
    cv2 = require_cv2()
    logging = cv2.utils.logging
    with _quiet_lock:
        if _quiet_depth == 0:
            _usual_level = logging.setLogLevel(logging.LOG_LEVEL_SILENT)
            _set_ffmpeg_quiet()
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0:
                logging.setLogLevel(_usual_level)
                _unset_ffmpeg_quiet()


# Several sources may be read at a time, each in its thread; the first in and the last out touch the
# settings.
_quiet_lock = threading.Lock()
_quiet_depth = 0
_usual_level = 0
_ffmpeg_level_is_ours = False


def _set_ffmpeg_quiet() -> None:
    global _ffmpeg_level_is_ours
    if FFMPEG_LOGLEVEL not in os.environ:
        os.environ[FFMPEG_LOGLEVEL] = "-8"  # AV_LOG_QUIET
        _ffmpeg_level_is_ours = True


def _unset_ffmpeg_quiet() -> None:
    global _ffmpeg_level_is_ours
    if _ffmpeg_level_is_ours:
        del os.environ[FFMPEG_LOGLEVEL]
        _ffmpeg_level_is_ours = False
