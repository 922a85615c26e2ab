"""How `open_source` reads what the user named."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from framestep.runtime.errors import SourceError
from framestep.runtime.sources import has_gstreamer, open_source, opencv


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one image."""
    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((16, 16, 3), np.uint8))
    return tmp_path


def test_path_that_does_not_exist_is_an_error_that_names_it(tmp_path: Path) -> None:
    for spec in (str(tmp_path / "nothing"), tmp_path / "nothing"):
        with pytest.raises(SourceError, match=r"nothing: no such file or folder"):
            open_source(spec)


@pytest.mark.parametrize("spec", ["", "  "])
def test_an_empty_name_is_not_the_folder_where_one_stands(spec: str) -> None:
    with pytest.raises(SourceError, match="source '': names nothing"):
        open_source(spec)


def test_path_object_is_never_a_camera_number(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.rename(folder.with_name("0"))
    monkeypatch.chdir(folder.parent)
    assert len(list(open_source(Path("0")))) == 1


def test_unknown_scheme_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(SourceError, match=r"gopher://x/y: gopher:// is not supported; .* rtsp://"):
        open_source("gopher://x/y")


@pytest.mark.skipif(has_gstreamer(), reason="this OpenCV has GStreamer")
def test_pipeline_without_gstreamer_is_an_error_that_says_what_to_use() -> None:
    with pytest.raises(SourceError) as caught:
        open_source("gst:videotestsrc ! appsink")
    message = str(caught.value)
    assert message.startswith("source gst:videotestsrc ! appsink: this OpenCV was built without GStreamer")
    assert "apt install python3-opencv" in message
    assert "\n" not in message


def test_pipeline_is_run_by_gstreamer_with_a_sink_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Any, ...]] = []

    class Pipeline:
        def __init__(self, *arguments: Any) -> None:
            opened.append(arguments)

        def isOpened(self) -> bool:
            return "broken" not in opened[-1][0]

        def get(self, key: int) -> float:
            return 25.0

        def grab(self) -> bool:
            return True

        def retrieve(self) -> tuple[bool, np.ndarray]:
            return True, np.zeros((4, 4, 3), np.uint8)

        def release(self) -> None:
            pass

    monkeypatch.setattr(cv2, "VideoCapture", Pipeline)
    monkeypatch.setattr("framestep.runtime.sources.cameras.has_gstreamer", lambda: True)
    with open_source("gst: videotestsrc") as source:
        assert next(source).rgb.shape == (4, 4, 3)
        assert (source.live, source.fps) == (True, 25.0)
    assert opened[0][:2] == (
        "videotestsrc ! videoconvert ! video/x-raw,format=BGR ! appsink",
        cv2.CAP_GSTREAMER,
    )
    with open_source("gst:videotestsrc ! appsink drop=true"):
        assert opened[1][0] == "videotestsrc ! appsink drop=true"
    with pytest.raises(SourceError, match=r"gst:broken: GStreamer cannot run it; to see why: gst-launch-1\.0"):
        open_source("gst:broken")


def test_missing_opencv_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    (folder / "clip.mp4").write_bytes(b"x")
    for spec in ("0", "rtsp://127.0.0.1/x", "gst:x", "synthetic", folder, folder / "clip.mp4"):
        with pytest.raises(SourceError, match="pip install --upgrade opencv-python"):
            open_source(spec)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"width": 0}, "width is 0"),
        ({"height": -3}, "height is -3"),
        ({"camera_fps": 0}, "camera_fps is 0"),
        ({"fourcc": "MJPEG"}, "fourcc is 'MJPEG': must be four"),
    ],
)
def test_impossible_camera_option_is_an_error(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SourceError, match=complaint):
        open_source(0, **options)


def test_camera_options_are_reported_where_they_are_not_used() -> None:
    reports: list[str] = []
    open_source("synthetic", width=640, fourcc="MJPG", on_report=reports.append)
    assert reports == ["synthetic: width, fourcc not used: this is no USB camera"]


def test_reports_go_to_the_log_by_default(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="framestep"):
        open_source("synthetic:fps=5", rate=10)
    assert caplog.messages == ["synthetic:fps=5: rate 10 is above the source's 5 frames a second: all are delivered"]


def test_opening_leaves_opencv_and_the_environment_as_they_were(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(opencv.FFMPEG_LOGLEVEL, raising=False)
    get_level = cv2.getLogLevel if hasattr(cv2, "getLogLevel") else cv2.utils.logging.getLogLevel
    before = get_level()
    (tmp_path / "noise.mp4").write_bytes(b"noise")
    with pytest.raises(SourceError):
        open_source(tmp_path / "noise.mp4")
    assert get_level() == before
    assert opencv.FFMPEG_LOGLEVEL not in opencv.os.environ
