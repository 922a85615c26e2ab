"""Frame sources: cameras, streams, video files, folders of images, synthetic scenes; all read the same way.

```python
with open_source("/dev/video0", rate=4) as source:
    for frame in source:
        frame.rgb  # uint8 [height, width, 3]
```

Files deliver every frame in order. Live sources deliver the newest frame, count the ones that were never
delivered, and come back by themselves after a camera stalled or vanished.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from ..errors import SourceError
from .cameras import Camera, GStreamerPipeline, NetworkCamera, UsbCamera, list_cameras
from .frame import Frame, Source
from .image_folder import IMAGE_SUFFIXES, ImageFolder
from .live import LiveSource, LiveTiming
from .opencv import has_gstreamer
from .redaction import redacted
from .sampling import check_rate
from .synthetic import MOTIONS, SyntheticSource, Truth
from .video_file import VideoFile

__all__ = [
    "MOTIONS",
    "Camera",
    "Frame",
    "LiveTiming",
    "Source",
    "SyntheticSource",
    "Truth",
    "at_home",
    "has_gstreamer",
    "list_cameras",
    "open_source",
]

NETWORK_SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "srt")


def open_source(
    spec: str | int | PathLike[str],
    *,
    rate: float | None = None,
    width: int | None = None,
    height: int | None = None,
    camera_fps: float | None = None,
    fourcc: str | None = None,
    on_report: Callable[[str], None] | None = None,
    timing: LiveTiming | None = None,
) -> Source:
    """Open a source of frames.

    `spec` is one of:
      - `0`, `"0"` or `"/dev/video0"`: a USB camera;
      - `"rtsp://…"`, `"http://…mjpg"`: a network camera (whatever an address leads to is treated as live);
      - `"gst:v4l2src ! …"`: a GStreamer pipeline, where OpenCV was built with GStreamer (pip's was not);
      - `"synthetic"` or `"synthetic:seed=3,frames=300,width=320,height=240,fps=25"`: see `SyntheticSource`;
      - the path of a video file, of a folder of images (natural order, sizes may differ) or of one image. A
        `Path` is never taken for anything but a path or a camera's device file.

    `rate` samples the source down to that many frames a second, by timestamps and without drift; a frame is
    never repeated. `width`, `height` (pixels), `camera_fps` and `fourcc` (four characters, such as "MJPG")
    are asked of a USB camera; what it grants instead is reported. `camera_fps` also says how many frames a
    second a folder of images holds; without it the images are taken to be at `rate` already. Elsewhere these
    four are reported as unused.

    `on_report` receives one line about each thing that went wrong and was survived: a camera that stalled,
    was lost or came back, corrupt frames, a video that ends early. It is called in the thread that reads the
    source; by default the lines go to `logging.getLogger("framestep")` as warnings. `timing` sets the
    patience of live sources.

    Raises `SourceError` where the source does not exist, is busy, or is nothing that can be read.
    """
    check_rate(rate)
    _check_camera_options(width, height, camera_fps, fourcc)
    report = on_report or logging.getLogger("framestep").warning
    timing = timing or LiveTiming()
    text = str(spec)
    if not text.strip():
        raise SourceError("source '': names nothing; expected a camera, an address, a file, a folder or `synthetic`")

    if isinstance(spec, int) or _names_usb_camera(spec):
        usb = UsbCamera(text, width=width, height=height, fps=camera_fps, fourcc=fourcc)
        return LiveSource(usb, rate=rate, on_report=report, timing=timing)

    source: Source
    if isinstance(spec, PathLike):
        source = _open_path(Path(spec), rate, camera_fps, report)
    elif text.startswith("gst:"):
        source = LiveSource(GStreamerPipeline(text), rate=rate, on_report=report, timing=timing)
    elif text == "synthetic" or text.startswith("synthetic:"):
        source = SyntheticSource(text, rate=rate, on_report=report)
    elif scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text):
        if scheme[1].lower() not in NETWORK_SCHEMES:
            known = ", ".join(f"{name}://" for name in NETWORK_SCHEMES)
            raise SourceError(f"source {redacted(text)}: {scheme[1]}:// is not supported; the schemes are {known}")
        source = LiveSource(NetworkCamera(text), rate=rate, on_report=report, timing=timing)
    else:
        source = _open_path(Path(text), rate, camera_fps, report)

    options = {"width": width, "height": height, "fourcc": fourcc, "camera_fps": camera_fps}
    if isinstance(source, ImageFolder):
        del options["camera_fps"]
    if unused := [name for name, value in options.items() if value is not None]:
        told = ", ".join(name.replace("_", " ") for name in unused)
        report(f"{source.name}: {told} not used: this is no USB camera")
    return source


def at_home(path: str | PathLike[str]) -> Path:
    """A path with the folder that its `~` stands for, where there is such a user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _names_usb_camera(spec: str | PathLike[str]) -> bool:
    if isinstance(spec, str) and spec.isdecimal():
        return True
    # Not everything in /dev is a device: /dev/shm holds files.
    path = Path(spec)
    return str(path).startswith(("/dev/video", "/dev/v4l/")) or path.is_char_device()


def _open_path(path: Path, rate: float | None, images_fps: float | None, report: Callable[[str], None]) -> Source:
    path = at_home(path)
    try:
        if not path.exists():
            raise SourceError(
                f"source {redacted(str(path))}: no such file or folder"
                " (a camera is 0, /dev/video0 or rtsp://…; moving shapes are `synthetic`)"
            )
        if path.is_fifo() or path.is_socket():
            raise SourceError(f"source {path}: is a pipe, not a file; name the camera, address or file that feeds it")
        if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
            return ImageFolder(path, fps=images_fps, rate=rate, on_report=report)
    except OSError as error:
        raise SourceError(f"source {path}: cannot be read: {error.strerror}") from error
    return VideoFile(path, rate=rate, on_report=report)


def _check_camera_options(width: int | None, height: int | None, camera_fps: float | None, fourcc: str | None) -> None:
    for name, value in (("width", width), ("height", height), ("camera_fps", camera_fps)):
        if value is not None and not 0 < value < math.inf:
            raise SourceError(f"{name} is {value}: must be greater than 0{' and finite' if value > 0 else ''}")
    if fourcc is not None and not (len(fourcc) == 4 and fourcc.isascii()):
        raise SourceError(f"fourcc is {fourcc!r}: must be four ASCII characters, such as MJPG or YUYV")
