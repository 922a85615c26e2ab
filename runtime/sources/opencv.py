"""OpenCV as the sources use it: imported on demand, kept quiet, and its pictures turned into RGB."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import SourceError
from .frame import RgbImage

FFMPEG_LOGLEVEL = "OPENCV_FFMPEG_LOGLEVEL"
MAX_PLAUSIBLE_FPS = 1000.0
TAKES_BYTES = (4, 12)  # the first OpenCV that does, for a name


def require_cv2() -> Any:
    """The cv2 module. Raises `SourceError` where OpenCV is not installed, or cannot be loaded."""
    try:
        return importlib.import_module("cv2")
    except ImportError as error:
        raise SourceError(f"frames are read with OpenCV ({error}): {what_to_install(error)}") from error


def what_to_install(error: ImportError) -> str:
    """The command that helps where cv2 cannot be imported: machines without a desktop lack what its windows need."""
    if "shared object" in str(error):
        return "apt install libgl1 libglib2.0-0"
    return "pip install --upgrade opencv-python"


def has_backend(backend: int) -> bool:
    """Whether this OpenCV can really read through a backend such as cv2.CAP_FFMPEG."""
    return bool(require_cv2().videoio_registry.hasBackend(backend))


def has_gstreamer() -> bool:
    """Whether this OpenCV was built with GStreamer."""
    return has_backend(require_cv2().CAP_GSTREAMER)


def as_opencv_takes(name: str | os.PathLike[str]) -> Any:
    """A path or an address for OpenCV, which ends the process over text that is not Unicode and takes such bytes.

    Raises:
        SourceError: the name is not Unicode, and this OpenCV takes no bytes.
    """
    text = os.fspath(name)
    try:
        text.encode()
    except UnicodeEncodeError:
        version = require_cv2().__version__
        if tuple(int(part) for part in version.split(".")[:2]) < TAKES_BYTES:
            raise SourceError(
                f"{text}: OpenCV {version} cannot open a name that is not UTF-8: rename it, or"
                " pip install --upgrade opencv-python"
            ) from None
        return os.fsencode(text)
    return text


@contextmanager
def quiet() -> Iterator[None]:
    """Keep OpenCV from printing: what goes wrong inside is reported by the caller, in one line."""
    with _opencv_silenced.changed():
        yield


@contextmanager
def quiet_opening() -> Iterator[None]:
    """The same while something is opened, which also settles how much FFmpeg prints from then on.

    Where the user has set OPENCV_FFMPEG_LOGLEVEL, that holds.
    """
    with _opencv_silenced.changed(), _ffmpeg_silenced.changed():
        yield


def stated_fps(capture: Any) -> float | None:
    """Frames a second as an opened cv2.VideoCapture states them; None where that cannot be."""
    fps = float(capture.get(require_cv2().CAP_PROP_FPS))
    return fps if 0 < fps <= MAX_PLAUSIBLE_FPS else None


def to_rgb(picture: Any) -> RgbImage:
    """A decoded BGR, BGRA or grey picture as a new uint8 [height, width, 3] RGB array."""
    cv2 = require_cv2()
    channels = 1 if picture.ndim == 2 else picture.shape[2]
    code = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}[channels]
    rgb: RgbImage = cv2.cvtColor(picture, code)
    return rgb


class _ProcessSetting:
    """A setting of the whole process that several threads may need changed at a time.

    The first one in changes it, the last one out restores it.
    """

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        self._change = change  # returns what restores the setting
        self._lock = threading.Lock()
        self._holders = 0
        self._restore: Callable[[], None] = lambda: None

    @contextmanager
    def changed(self) -> Iterator[None]:
        with self._lock:
            if self._holders == 0:
                self._restore = self._change()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self._restore()


def _silence_opencv() -> Callable[[], None]:
    cv2 = require_cv2()
    # OpenCV 5 moved it.
    set_level = cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel
    usual = set_level(0)  # LOG_LEVEL_SILENT

    def restore() -> None:
        set_level(usual)

    return restore


def _silence_ffmpeg() -> Callable[[], None]:
    # OpenCV reads the variable once, when the process first opens something with FFmpeg.
    if FFMPEG_LOGLEVEL in os.environ:
        return lambda: None
    os.environ[FFMPEG_LOGLEVEL] = "-8"  # AV_LOG_QUIET

    def restore() -> None:
        os.environ.pop(FFMPEG_LOGLEVEL, None)

    return restore


_opencv_silenced = _ProcessSetting(_silence_opencv)
_ffmpeg_silenced = _ProcessSetting(_silence_ffmpeg)
