"""USB cameras, through a stand-in at OpenCV's `VideoCapture` boundary; and what all live sources share."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from framestep.runtime.errors import SourceError
from framestep.runtime.sources import Camera, LiveTiming, cameras, list_cameras, live, open_source

QUICK = LiveTiming(opening=2.0, stall=0.3, first_retry=0.02, longest_retry=0.08)


class StandInCamera:
    """A USB camera that delivers pictures when told to, and what OpenCV's VideoCapture makes of it."""

    def __init__(self) -> None:
        self.plugged = True
        self.busy = False
        self.mute = False
        self.grants: dict[int, float] = {}  # overrides what was asked
        self.captures: list[StandInCapture] = []
        self.undecodable: set[int] = set()
        self.delivered = 0
        self._waiting = 0
        self._pending = 0
        self._hang: threading.Event | None = None
        self._moved = threading.Condition()

    def open(self, *arguments: Any) -> StandInCapture:
        capture = StandInCapture(self, arguments)
        self.captures.append(capture)
        return capture

    def deliver(self, count: int) -> None:
        """Have the reader take `count` frames, and return when it is back for the next."""
        with self._moved:
            self._pending += count
            self._moved.notify_all()
            assert self._moved.wait_for(lambda: self._pending == 0 and self._waiting, timeout=5)

    def unplug(self) -> None:
        with self._moved:
            self.plugged = False
            self._moved.notify_all()

    def plug_in(self, frames: int = 1) -> None:
        """Back with so many frames to deliver at once."""
        with self._moved:
            self._pending = frames
            self.plugged = True
            self._moved.notify_all()

    def hang(self) -> threading.Event:
        """Block every read in progress until the event is set; captures opened later work."""
        with self._moved:
            self._hang = threading.Event()
            for capture in self.captures:
                capture.hung = self._hang
            self._moved.notify_all()
            return self._hang

    def grab(self, capture: StandInCapture) -> bool:
        with self._moved:
            self._waiting += 1
            self._moved.notify_all()
            self._moved.wait_for(lambda: capture.hung or self._pending or not self.plugged or self.mute)
            self._waiting -= 1
            if capture.hung is None and self.plugged and not self.mute:
                self._pending -= 1
                self.delivered += 1
                capture.number = self.delivered - 1
                self._moved.notify_all()
                return True
        if capture.hung is not None:
            capture.hung.wait(10)
        return False


class StandInCapture:
    def __init__(self, camera: StandInCamera, arguments: tuple[Any, ...]) -> None:
        self.camera = camera
        self.arguments = arguments
        self.opened = camera.plugged and not camera.busy
        self.settings: list[tuple[int, float]] = []
        self.hung: threading.Event | None = None
        self.released = threading.Event()
        self.number = -1

    def isOpened(self) -> bool:
        return self.opened

    def set(self, key: int, value: float) -> bool:
        self.settings.append((key, value))
        return True

    def get(self, key: int) -> float:
        usual = {cv2.CAP_PROP_FPS: 30.0}
        return {**usual, **dict(self.settings), **self.camera.grants}.get(key, 0.0)

    def grab(self) -> bool:
        return self.camera.grab(self)

    def retrieve(self) -> tuple[bool, np.ndarray | None]:
        if self.number in self.camera.undecodable:
            return False, None
        picture = np.zeros((6, 8, 3), np.uint8)
        picture[:, :, 2] = self.number  # BGR
        return True, picture

    def release(self) -> None:
        self.released.set()


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInCamera]:
    camera = StandInCamera()
    monkeypatch.setattr(cv2, "VideoCapture", camera.open)
    # The stand-in delivers only when told to, so that closing would mostly wait for its full time.
    monkeypatch.setattr(live, "CLOSING", 0.05)
    camera.plug_in(frames=1)  # what opening waits for
    yield camera
    camera.unplug()


@pytest.fixture
def reports() -> list[str]:
    return []


def read_until(source: Any, condition: Callable[[], bool]) -> None:
    deadline = time.perf_counter() + 5
    while not condition():
        assert time.perf_counter() < deadline
        source.read(timeout=0.02)


@pytest.mark.parametrize("spec", [0, "0", "/dev/video0"])
def test_camera_is_opened_by_number_or_device_file(camera: StandInCamera, spec: str | int) -> None:
    with open_source(spec, timing=QUICK) as source:
        frame = next(source)
    assert camera.captures[0].arguments == ("/dev/video0", cv2.CAP_V4L2)
    assert (source.name, source.live, source.fps) == (str(spec), True, 30.0)
    assert (frame.index, frame.timestamp, frame.rgb.shape, frame.rgb.dtype) == (0, 0.0, (6, 8, 3), np.uint8)
    assert camera.captures[0].settings == []


def test_options_are_set_pixel_format_first(camera: StandInCamera, reports: list[str]) -> None:
    options: dict[str, Any] = {"width": 1280, "height": 720, "camera_fps": 60, "fourcc": "MJPG"}
    with open_source(0, **options, timing=QUICK, on_report=reports.append) as source:
        assert source.fps == 60
    assert camera.captures[0].settings == [
        (cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG")),
        (cv2.CAP_PROP_FRAME_WIDTH, 1280),
        (cv2.CAP_PROP_FRAME_HEIGHT, 720),
        (cv2.CAP_PROP_FPS, 60),
    ]
    assert reports == []


def test_what_the_camera_grants_instead_is_reported(camera: StandInCamera, reports: list[str]) -> None:
    camera.grants = {
        cv2.CAP_PROP_FRAME_WIDTH: 640,
        cv2.CAP_PROP_FOURCC: cv2.VideoWriter.fourcc(*"YUYV"),
    }
    with open_source(0, width=1280, fourcc="MJPG", timing=QUICK, on_report=reports.append):
        pass
    assert reports == ["0: the camera grants width 640 instead of 1280, fourcc 'YUYV' instead of 'MJPG'"]


def test_missing_camera_is_an_error_that_says_which_exist(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def there() -> tuple[Camera, ...]:
        return (Camera("/dev/video0", "HD Webcam"), Camera("/dev/video2", ""))

    monkeypatch.setattr(cameras, "list_cameras", there)
    with pytest.raises(SourceError) as caught:
        open_source(97)
    assert str(caught.value) == (
        "camera 97 (/dev/video97): does not exist; this machine has /dev/video0 (HD Webcam), /dev/video2"
    )
    monkeypatch.setattr(cameras, "list_cameras", tuple)
    with pytest.raises(SourceError, match=r"^camera /dev/video97: does not exist; this machine has no /dev/vi"):
        open_source("/dev/video97")
    assert capfd.readouterr().err == ""


def test_busy_camera_is_an_error_that_names_it(camera: StandInCamera) -> None:
    camera.busy = True
    # /dev/null stands for a device file that exists on every machine.
    with pytest.raises(SourceError, match=r"^camera /dev/null: busy .*; this machine has"):
        open_source("/dev/null", timing=QUICK)
    assert camera.captures[0].released.is_set()


def test_camera_that_opens_but_delivers_nothing_is_an_error(camera: StandInCamera) -> None:
    camera.mute = True
    with pytest.raises(SourceError, match="0: opens but delivers no frame"):
        open_source(0, timing=QUICK)


def test_camera_that_hangs_at_first_is_an_error_after_the_time_for_opening(camera: StandInCamera) -> None:
    camera.plug_in(frames=0)
    with pytest.raises(SourceError, match=r"0: no frame within 0\.2 s"):
        open_source(0, timing=LiveTiming(opening=0.2))


def test_slow_consumer_gets_the_newest_frame_and_drops_are_counted(camera: StandInCamera) -> None:
    with open_source(0, timing=QUICK) as source:
        assert next(source).rgb[0, 0].tolist() == [0, 0, 0]
        camera.deliver(5)
        frame = next(source)
        assert (frame.index, frame.rgb[0, 0].tolist(), source.dropped) == (5, [5, 0, 0], 4)
        camera.deliver(1)
        assert (next(source).index, source.dropped) == (6, 4)
        assert source.read(timeout=0) is None


def test_frames_skipped_by_the_rate_are_not_dropped(camera: StandInCamera) -> None:
    with open_source(0, rate=0.5, timing=QUICK) as source:
        assert next(source).index == 0
        camera.deliver(20)
        assert source.read(timeout=0) is None
        assert source.dropped == 0


def test_frame_that_cannot_be_decoded_is_counted_and_keeps_its_index(camera: StandInCamera, reports: list[str]) -> None:
    camera.undecodable = {1, 2}
    with open_source(0, timing=QUICK, on_report=reports.append) as source:
        next(source)
        camera.deliver(3)
        assert (next(source).index, source.bad_frames, source.dropped) == (3, 2, 0)
    assert reports == ["0: frame 1 cannot be decoded; continuing past bad frames"]


def test_frame_after_one_that_cannot_be_decoded_takes_its_place_in_the_rate(camera: StandInCamera) -> None:
    camera.undecodable = {0, 1}
    camera.plug_in(frames=3)
    with open_source(0, rate=0.5, timing=QUICK, on_report=lambda text: None) as source:
        assert (next(source).index, source.bad_frames) == (2, 2)


def test_unplugged_camera_is_reopened_with_growing_pauses_and_continues(
    camera: StandInCamera, reports: list[str]
) -> None:
    with open_source(0, timing=QUICK, on_report=reports.append) as source:
        camera.deliver(2)
        before = next(source)
        camera.unplug()
        read_until(source, lambda: len(reports) >= 5)
        camera.plug_in()
        after = next(source)
    assert camera.captures[0].released.is_set()
    assert (before.index, after.index) == (2, 3)
    assert after.timestamp - before.timestamp == pytest.approx(after.captured - before.captured, abs=1e-6)
    assert reports[:5] == [
        "0: lost; trying again in 0.02 s",
        "0: still not back; trying again in 0.04 s",
        "0: still not back; trying again in 0.08 s",
        "0: still not back; trying again in 0.08 s",
        "0: still not back; trying again in 0.08 s",
    ]
    assert reports[-1].startswith("0: back after")


def test_pauses_start_small_again_after_a_return(camera: StandInCamera, reports: list[str]) -> None:
    with open_source(0, timing=QUICK, on_report=reports.append) as source:
        next(source)
        for _ in range(2):
            camera.unplug()
            read_until(source, lambda: "still not back" in reports[-1] if reports else False)
            camera.plug_in()
            next(source)
    assert [report for report in reports if "lost" in report] == ["0: lost; trying again in 0.02 s"] * 2


def test_default_pauses_are_one_second_doubling_to_thirty() -> None:
    timing = LiveTiming()
    assert (timing.first_retry, timing.longest_retry) == (1.0, 30.0)


def test_read_that_blocks_does_not_block_the_consumer(camera: StandInCamera, reports: list[str]) -> None:
    with open_source(0, timing=QUICK, on_report=reports.append) as source:
        next(source)
        release = camera.hang()
        started = time.perf_counter()
        camera.plug_in()
        assert next(source).index == 1  # through a second capture
        assert time.perf_counter() - started < 1.5
        assert re.fullmatch(r"0: stalled: no frame, 0\.[345] s; trying again in 0\.02 s", reports[0])
        assert "back after" in reports[1]
        assert len(camera.captures) == 2
        assert not camera.captures[0].released.is_set()
        release.set()
        assert camera.captures[0].released.wait(2)
        camera.deliver(1)
        assert next(source).index == 2


def test_close_stops_the_thread_and_releases_the_camera(camera: StandInCamera, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "CLOSING", 2.0)
    others = set(threading.enumerate())
    source = open_source(0, timing=QUICK)
    threading.Timer(0.05, camera.unplug).start()
    source.close()
    assert camera.captures[0].released.is_set()
    assert not [thread.name for thread in set(threading.enumerate()) - others if "framestep" in thread.name]
    assert source.ended
    assert list(source) == []
    source.close()


def test_reads_that_block_hold_up_the_end_of_their_sources_for_one_moment(
    camera: StandInCamera, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert live.CLOSING <= 0.3
    monkeypatch.setattr(cv2, "VideoCapture", camera.open)
    other = StandInCamera()
    other.plug_in(frames=1)
    sources = [open_source(0, timing=QUICK)]
    monkeypatch.setattr(cv2, "VideoCapture", other.open)
    sources.append(open_source(1, timing=QUICK))
    releases = [camera.hang(), other.hang()]
    waits: list[float] = []
    join = threading.Thread.join

    def remember(thread: threading.Thread, timeout: float) -> None:
        waits.append(timeout)
        join(thread, timeout)

    monkeypatch.setattr(live._Reader, "join", remember)
    for source in sources:
        source.stop()
    for source in sources:
        source.close()
    assert len(waits) == 2
    assert sum(waits) <= live.CLOSING + 0.1
    for release in releases:
        release.set()
    assert all(capture.released.wait(2) for capture in (*camera.captures, *other.captures))


def test_close_ends_a_read_in_another_thread(camera: StandInCamera) -> None:
    source = open_source(0, timing=QUICK)
    next(source)
    threading.Timer(0.05, camera.unplug).start()
    threading.Timer(0.1, source.close).start()
    assert list(source) == []


def test_interrupt_ends_a_read_at_once(camera: StandInCamera) -> None:
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with open_source(0) as source:
            next(source)
            started = time.perf_counter()
            threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                next(source)
            assert time.perf_counter() - started < 0.5
            camera.unplug()
    finally:
        signal.signal(signal.SIGINT, before)


def test_unexpected_failure_in_the_reader_reaches_the_consumer(
    camera: StandInCamera, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_source(0, timing=QUICK) as source:
        next(source)

        def broken(capture: StandInCapture) -> tuple[bool, np.ndarray]:
            raise ZeroDivisionError("in the reader")

        monkeypatch.setattr(StandInCapture, "retrieve", broken)
        camera.plug_in()
        with pytest.raises(ZeroDivisionError, match="in the reader"):
            next(source)


def test_cameras_are_listed_in_order_with_their_names(tmp_path: Path) -> None:
    devices, names = tmp_path / "dev", tmp_path / "names"
    devices.mkdir()
    for device in ("video10", "video2", "video-loop", "null"):
        (devices / device).touch()
    (names / "video2").mkdir(parents=True)
    (names / "video2" / "name").write_text("HD Webcam: HD Webcam\n")
    assert list_cameras(devices, names) == (
        Camera(str(devices / "video2"), "HD Webcam: HD Webcam"),
        Camera(str(devices / "video10"), ""),
    )
