"""Network cameras, with a real one on loopback."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import pytest

from framestep.runtime.errors import SourceError
from framestep.runtime.sources import LiveTiming, open_source

PATIENT = LiveTiming(opening=30.0)  # what would be waited for makes a test too long
QUICK = LiveTiming(opening=5.0, stall=0.5, first_retry=0.05, longest_retry=0.2)


def test_network_camera_delivers_its_pictures(mjpeg_camera: Any) -> None:
    with open_source(mjpeg_camera.address, timing=QUICK) as source:
        frames = [next(source) for _ in range(10)]
    assert source.live
    assert {frame.rgb.shape for frame in frames} == {(120, 160, 3)}
    assert 0 <= frames[0].timestamp < 1  # 0 where the very first one was not already replaced by a newer one
    assert all(early.timestamp < late.timestamp for early, late in pairwise(frames))
    assert all(early.index < late.index for early, late in pairwise(frames))
    assert tuple(frames[0].rgb[100, 10]) == pytest.approx((60, 60, 60), abs=6)
    reds = frames[0].rgb[55, :, 0].astype(int)
    blues = frames[0].rgb[55, :, 2].astype(int)
    assert (reds - blues).max() > 150  # the square is (240, 200, 40) in RGB


def test_camera_that_goes_away_and_returns_is_reconnected_and_reported(mjpeg_camera: Any) -> None:
    reports: list[str] = []
    with open_source(mjpeg_camera.address, on_report=reports.append, timing=QUICK) as source:
        before = [next(source) for _ in range(5)][-1]
        mjpeg_camera.stop()
        while not any("still not back" in report for report in reports):
            source.read(timeout=0.1)
        away_from = time.perf_counter()
        mjpeg_camera.start()
        after = next(source)
        later = next(source)
    assert mjpeg_camera.connections == 2
    assert before.index < after.index < later.index
    assert before.timestamp < after.timestamp < later.timestamp
    # The timestamp went on over the time that was lost.
    assert after.timestamp - before.timestamp == pytest.approx(after.captured - before.captured, abs=1e-6)
    assert after.captured > away_from
    assert "lost" in reports[0]
    assert "trying again in 0.05 s" in reports[0]
    assert "back after" in reports[-1]
    assert all(report.startswith(f"{mjpeg_camera.address}: ") for report in reports)


def test_camera_that_stays_connected_but_sends_nothing_is_reopened(mjpeg_camera: Any) -> None:
    reports: list[str] = []
    with open_source(mjpeg_camera.address, on_report=reports.append, timing=QUICK) as source:
        next(source)
        mjpeg_camera.freeze()
        while not any("no frame for" in report for report in reports):
            source.read(timeout=0.1)
        mjpeg_camera.stop()
        mjpeg_camera.start()
        assert next(source).index > 0
    assert "back after" in reports[-1]


def test_reading_with_a_timeout_does_not_wait_longer(mjpeg_camera: Any) -> None:
    with open_source(mjpeg_camera.address, timing=QUICK) as source:
        mjpeg_camera.freeze()
        while source.read(timeout=0.1) is not None:
            pass
        started = time.perf_counter()
        assert source.read(timeout=0.05) is None
        assert source.read(timeout=0) is None
        assert time.perf_counter() - started < 0.3
        assert not source.ended


@pytest.mark.parametrize("scheme", ["http", "rtsp", "RTSP", "tcp"])
def test_a_refused_connection_is_told_at_once_without_the_password(mjpeg_camera: Any, scheme: str) -> None:
    address = mjpeg_camera.address.replace("http", scheme)
    mjpeg_camera.stop()
    with pytest.raises(SourceError) as caught:
        open_source(address.replace("//", "//me:secret@"), timing=PATIENT)
    message = str(caught.value)
    assert message.startswith(f"network camera {address.replace('//', '//***@')}: the connection is refused: ")
    assert "secret" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("rtsp://me:secret@no-such-host.invalid/live", "no such host"),
        ("rtsp://me:secret@" + 64 * "h" + ".invalid/live", "no such host"),  # longer than a name may be
        ("rtsp://me:12/secret@host/live", "no such host"),  # FFmpeg takes `me` for the host
        ("http://me:se/cret@host/live", "no video stream can be opened there"),
        ("http://127.0.0.1:99999/live", "no video stream can be opened there"),
    ],
)
def test_an_address_that_leads_nowhere_is_told_at_once_without_the_password(address: str, why: str) -> None:
    with pytest.raises(SourceError, match=rf"^network camera .*: {why}") as caught:
        open_source(address, timing=PATIENT)
    told = str(caught.value)
    assert not any(part in told for part in ("me:", "12/", "cret@"))


def test_a_server_without_video_is_told_from_one_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/live"
        with pytest.raises(SourceError, match=r": answers, but with no video stream; check the path, the user and"):
            open_source(address, timing=PATIENT)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")  # which FFmpeg asks instead
        with pytest.raises(SourceError, match=r": no video stream can be opened there"):
            open_source("http://no-such-host.invalid/live", timing=PATIENT)
        server.shutdown()


def test_camera_that_is_mute_at_first_is_an_error(mjpeg_camera: Any) -> None:
    mjpeg_camera.freeze()
    started = time.perf_counter()
    with pytest.raises(SourceError, match=r"camera\.mjpg"):
        open_source(mjpeg_camera.address, timing=LiveTiming(opening=0.4, stall=0.3))
    assert time.perf_counter() - started < 3


def test_closing_a_lost_camera_is_prompt(mjpeg_camera: Any) -> None:
    source = open_source(mjpeg_camera.address, timing=LiveTiming(first_retry=30), on_report=lambda text: None)
    next(source)
    mjpeg_camera.stop()
    time.sleep(0.1)
    started = time.perf_counter()
    source.close()
    assert time.perf_counter() - started < 1
    assert list(source) == []
