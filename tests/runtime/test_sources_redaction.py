"""Passwords do not show in what is said about a source."""

from __future__ import annotations

import pytest

from framestep.runtime.errors import SourceError
from framestep.runtime.sources import open_source
from framestep.runtime.sources.cameras import GStreamerPipeline, NetworkCamera
from framestep.runtime.sources.redaction import redacted


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://cam/stream1", "rtsp://cam/stream1"),
        ("rtsp://admin:hunter2@cam/1", "rtsp://***@cam/1"),
        ("rtsp://admin:hun/ter2@cam/1", "rtsp://***@cam/1"),
        ("rtsp://admin:hun@ter2@cam", "rtsp://***@cam"),
        ("http://cam/video.cgi?user=admin&pwd=hunter2", "http://cam/video.cgi?user=admin&pwd=***"),
        ("http://cam/v?PassWord=hunter2&channel=1", "http://cam/v?PassWord=***&channel=1"),
        ("http://cam/v?api_key=hunter2&accessToken=hunter2", "http://cam/v?api_key=***&accessToken=***"),
        ("http://cam/v?loginuse=admin&loginpas=hunter2", "http://cam/v?loginuse=admin&loginpas=***"),
        ("gst:rtspsrc location=rtsp://u:hunter2@cam ! appsink", "gst:rtspsrc location=rtsp://***@cam ! appsink"),
        ("gst:rtspsrc user-id=u user-pw=hunter2 ! appsink", "gst:rtspsrc user-id=u user-pw=*** ! appsink"),
        ('gst:rtspsrc user-pw="hunter2 hunter2" ! appsink', "gst:rtspsrc user-pw=*** ! appsink"),
        ("C:/me@home/clip.mp4", "C:/me@home/clip.mp4"),
    ],
)
def test_secrets_are_replaced_and_the_rest_stays(address: str, shown: str) -> None:
    assert redacted(address) == shown


def test_names_of_devices_hold_no_password() -> None:
    assert NetworkCamera("rtsp://u:hun/ter2@cam").name == "rtsp://***@cam"
    assert "hunter2" not in GStreamerPipeline("gst:rtspsrc location=rtsp://u:hunter2@cam").name


@pytest.mark.parametrize("gstreamer", [True, False])
@pytest.mark.parametrize(
    "spec",
    [
        "rstp://u:hunter2@cam",
        "rtsp :///u:hunter2@cam",
        "gst:rtspsrc location=rtsp://u:hunter2@cam",
        "gst:rtspsrc location=rtsp://cam user-pw=hunter2",
    ],
)
def test_errors_hold_no_password(monkeypatch: pytest.MonkeyPatch, spec: str, gstreamer: bool) -> None:
    monkeypatch.setattr("framestep.runtime.sources.cameras.has_gstreamer", lambda: gstreamer)
    with pytest.raises(SourceError) as caught:
        open_source(spec)
    assert "hunter2" not in str(caught.value) and "cam" in str(caught.value)
