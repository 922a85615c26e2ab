"""Devices that deliver live frames: USB cameras, network cameras, GStreamer pipelines.

How to open each of them, and what to say where that fails.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from ..errors import SourceError
from .opencv import as_opencv_takes, has_backend, has_gstreamer, require_cv2
from .redaction import redacted

TCP_PORTS = {"rtsp": 554, "rtsps": 322, "rtmp": 1935, "http": 80, "https": 443, "tcp": None}


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds until opening a device, and one read from it, count as failed, where OpenCV can limit that."""

    opening: float
    reading: float


class Device(Protocol):
    """What `LiveSource` opens, and reopens after it was lost."""

    @property
    def name(self) -> str:
        """For people: holds no password."""

    @property
    def states_its_fps(self) -> bool:
        """Whether the frame rate that OpenCV states for it means anything."""

    def open(self, patience: Patience, on_report: Callable[[str], None]) -> Any:
        """An opened cv2.VideoCapture. Raises `SourceError` where it cannot be had."""


@dataclass(frozen=True, slots=True)
class UsbCamera:
    """A camera of this machine by number (`0`) or device file (`/dev/video0`). None keeps its own setting."""

    name: str
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    fourcc: str | None = None
    states_its_fps: bool = True

    def open(self, patience: Patience, on_report: Callable[[str], None]) -> Any:
        cv2 = require_cv2()
        if sys.platform == "linux":
            backend = cv2.CAP_V4L2 if has_backend(cv2.CAP_V4L2) else cv2.CAP_ANY
            capture = cv2.VideoCapture(as_opencv_takes(self._device_file), backend)
        else:
            capture = cv2.VideoCapture(int(self.name) if self.name.isdecimal() else self.name)
        if not capture.isOpened():
            capture.release()
            raise SourceError(self._why_not())
        self._configure(cv2, capture, on_report)
        return capture

    @property
    def _device_file(self) -> Path:
        return Path(f"/dev/video{int(self.name)}" if self.name.isdecimal() else self.name)

    def _configure(self, cv2: Any, capture: Any, on_report: Callable[[str], None]) -> None:
        # The pixel format comes first: it decides which sizes and rates a camera offers.
        if self.fourcc is not None:
            capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*self.fourcc))
        for asked, key in (
            (self.width, cv2.CAP_PROP_FRAME_WIDTH),
            (self.height, cv2.CAP_PROP_FRAME_HEIGHT),
            (self.fps, cv2.CAP_PROP_FPS),
        ):
            if asked is not None:
                capture.set(key, asked)

        granted: list[str] = []
        for label, asked, key in (
            ("width", self.width, cv2.CAP_PROP_FRAME_WIDTH),
            ("height", self.height, cv2.CAP_PROP_FRAME_HEIGHT),
            ("camera fps", self.fps, cv2.CAP_PROP_FPS),
        ):
            got = float(capture.get(key))
            if asked is not None and abs(got - asked) > 0.01 * asked:
                granted.append(f"{label} {got:g} instead of {asked:g}")
        if self.fourcc is not None:
            code = int(capture.get(cv2.CAP_PROP_FOURCC)) & 0xFFFFFFFF
            fourcc = code.to_bytes(4, "little").decode("ascii", "replace")
            if fourcc != self.fourcc:
                granted.append(f"fourcc {fourcc!r} instead of {self.fourcc!r}")
        if granted:
            on_report(f"the camera grants {', '.join(granted)}")

    def _why_not(self) -> str:
        if sys.platform != "linux":
            return f"camera {self.name}: does not exist, is in use, or this program may not access it"
        file = self._device_file
        camera = f"camera {self.name}" if str(file) == self.name else f"camera {self.name} ({file})"
        if not file.exists():
            return f"{camera}: does not exist; {cameras_here()}"
        if not os.access(file, os.R_OK | os.W_OK):
            return f"{camera}: no permission; add this user to the group `video`, or run as one who is in it"
        return f"{camera}: busy (another program holds it) or not a capture device; {cameras_here()}"


@dataclass(frozen=True, slots=True)
class NetworkCamera:
    """A camera or stream at an address, read with FFmpeg where OpenCV has it."""

    address: str

    @property
    def name(self) -> str:
        return redacted(self.address)

    @property
    def states_its_fps(self) -> bool:
        # FFmpeg states 25 for every MJPEG stream over HTTP.
        return not self.address.lower().startswith("http")

    def open(self, patience: Patience, on_report: Callable[[str], None]) -> Any:
        cv2 = require_cv2()
        begun = time.perf_counter()
        if has_backend(cv2.CAP_FFMPEG):
            capture = cv2.VideoCapture(as_opencv_takes(self.address), cv2.CAP_FFMPEG, _timeouts(cv2, patience))
        else:
            capture = cv2.VideoCapture(as_opencv_takes(self.address))
        if not capture.isOpened():
            capture.release()
            raise SourceError(f"network camera {self.name}: {self._why_not(time.perf_counter() - begun, patience)}")
        return capture

    def _why_not(self, waited: float, patience: Patience) -> str:
        """What OpenCV does not say. Nothing of the address: part of a password may stand where the host should."""
        if waited > 0.5 * patience.opening:  # no time for an attempt of our own
            return (
                f"nothing answers there within {patience.opening:g} s, or it is no video stream;"
                " check the address, the user and the password"
            )
        unknown = "no video stream can be opened there; check the address, the user and the password"
        try:
            parts = urlsplit(self.address)  # takes it apart as FFmpeg does
            port = parts.port or TCP_PORTS.get(parts.scheme)
        except ValueError:
            return unknown
        through_proxy = parts.scheme in ("http", "https") and "http_proxy" in os.environ
        if parts.scheme not in TCP_PORTS or port is None or not parts.hostname or through_proxy:
            return unknown
        try:
            socket.create_connection((parts.hostname, port), min(1.0, 0.2 * patience.opening)).close()
        except ConnectionRefusedError:
            return "the connection is refused: no server at this port; check the address, and whether the camera is on"
        except (socket.gaierror, UnicodeError):
            return "no such host; check the address"
        except TimeoutError:
            return "nothing answers there; check the address, and whether the camera is on"
        except OSError as error:
            return f"cannot be reached: {error.strerror or error}"
        return "answers, but with no video stream; check the path, the user and the password"


@dataclass(frozen=True, slots=True)
class GStreamerPipeline:
    """`gst:` and a pipeline. Where it has no `appsink`, one that takes BGR is put at its end."""

    spec: str
    states_its_fps: bool = True

    @property
    def name(self) -> str:
        return redacted(self.spec)

    def open(self, patience: Patience, on_report: Callable[[str], None]) -> Any:
        cv2 = require_cv2()
        if not has_gstreamer():
            raise SourceError(
                f"source {self.name}: this OpenCV was built without GStreamer (pip's always is);"
                " use the system's (JetPack's, or apt install python3-opencv)"
                " or one built with -D WITH_GSTREAMER=ON, or name the camera itself: 0, /dev/video0 or rtsp://…"
            )
        pipeline = self.spec.removeprefix("gst:").strip()
        if "appsink" not in pipeline:
            pipeline += " ! videoconvert ! video/x-raw,format=BGR ! appsink"
        capture = cv2.VideoCapture(as_opencv_takes(pipeline), cv2.CAP_GSTREAMER, _timeouts(cv2, patience))
        if not capture.isOpened():
            capture.release()
            raise SourceError(
                f"source {self.name}: GStreamer cannot run it; to see why: gst-launch-1.0 {redacted(pipeline)}"
            )
        return capture


@dataclass(frozen=True, slots=True)
class Camera:
    """A video device of this machine. One camera may have several, not all of which deliver pictures."""

    path: str
    name: str  # as the driver calls it; "" where it says nothing


def list_cameras(devices: Path = Path("/dev"), names: Path = Path("/sys/class/video4linux")) -> tuple[Camera, ...]:
    """The /dev/video* of a Linux machine in order of their numbers; none on other systems."""
    numbers = sorted(
        int(match[1]) for path in devices.glob("video*") if (match := re.fullmatch(r"video([0-9]+)", path.name))
    )
    return tuple(Camera(str(devices / f"video{n}"), _driver_name(names / f"video{n}" / "name")) for n in numbers)


def cameras_here() -> str:
    cameras = list_cameras()
    if not cameras:
        return "this machine has no /dev/video*"
    return "this machine has " + ", ".join(f"{c.path} ({c.name})" if c.name else c.path for c in cameras)


def _driver_name(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def _timeouts(cv2: Any, patience: Patience) -> list[int]:
    return [
        cv2.CAP_PROP_OPEN_TIMEOUT_MSEC,
        max(1, round(patience.opening * 1000)),
        cv2.CAP_PROP_READ_TIMEOUT_MSEC,
        max(1, round(patience.reading * 1000)),
    ]
