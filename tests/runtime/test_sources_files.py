"""Video files and folders of images as sources."""

from __future__ import annotations

import re
import struct
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import golden
import numpy as np
import pytest

from framestep.runtime.errors import SourceError
from framestep.runtime.sources import open_source

HEIGHT, WIDTH = 96, 256
REAL_FOOTAGE = golden.real_footage()


def picture(step: int) -> np.ndarray:
    """BGR; a white bar as long as the step, and a blue corner that tells the order of the channels."""
    bgr = np.full((HEIGHT, WIDTH, 3), 30, np.uint8)
    bgr[:48, :32] = (255, 0, 0)
    bgr[48:, : 4 * step] = 230
    return bgr


def step_of(rgb: np.ndarray) -> int:
    return round(float((rgb[80] > 128).mean()) * WIDTH / 4)


def write_video(path: Path, fourcc: str = "mp4v", frames: int = 50, fps: float = 25.0) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), fps, (WIDTH, HEIGHT))
    assert writer.isOpened()
    for step in range(frames):
        writer.write(picture(step))
    writer.release()
    return path


def mjpeg_chunks(avi: bytes) -> list[tuple[int, int]]:
    """Start and size of each frame's JPEG in an AVI file."""
    chunks, at = [], 0
    while (at := avi.find(b"00dc", at)) >= 0:
        size = int.from_bytes(avi[at + 4 : at + 8], "little")
        if avi[at + 8 : at + 10] == b"\xff\xd8":
            chunks.append((at + 8, size))
        at += 4
    return chunks


def write_timed_video(path: Path, milliseconds: list[int]) -> Path:
    """A Matroska file whose frames have these presentation times, the last one shown for 40 ms."""
    data = bytearray(write_video(path, "MJPG", len(milliseconds)).read_bytes())
    times, cluster = iter(milliseconds), 0
    for found in re.finditer(rb"\xe7(?:\x81(.)|\x82(..))\xa3|\x81(..)\x80\xff\xd8\xff", bytes(data), re.DOTALL):
        if found[3] is None:
            cluster = int.from_bytes(found[1] or found[2], "big")
        else:  # a frame's time is relative to its cluster's
            data[found.start(3) : found.end(3)] = (next(times) - cluster).to_bytes(2, "big", signed=True)
    assert next(times, None) is None
    duration = data.find(b"\x44\x89\x88") + 3
    data[duration : duration + 8] = struct.pack(">d", milliseconds[-1] + 40)
    path.write_bytes(data)
    return path


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.mark.parametrize(("name", "fourcc"), [("clip.mp4", "mp4v"), ("clip.avi", "MJPG")])
def test_video_delivers_every_frame_in_order_as_rgb(tmp_path: Path, name: str, fourcc: str) -> None:
    path = write_video(tmp_path / name, fourcc)
    with open_source(path) as source:
        frames = list(source)
    assert [frame.index for frame in frames] == list(range(50))
    assert [step_of(frame.rgb) for frame in frames] == list(range(50))
    assert np.allclose([frame.timestamp for frame in frames], np.arange(50) / 25, atol=1e-3)
    assert all(earlier.captured <= later.captured for earlier, later in pairwise(frames))
    first = frames[0].rgb
    assert (first.shape, first.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
    assert first[20, 10, 2] > 200
    assert first[20, 10, 0] < 60
    assert (source.live, source.fps, source.length, source.ended) == (False, 25.0, 50, True)
    assert (source.dropped, source.bad_frames, source.name) == (0, 0, str(path))


def test_sound_video_reports_nothing(tmp_path: Path, reports: list[str]) -> None:
    list(open_source(write_video(tmp_path / "clip.mp4"), on_report=reports.append))
    assert reports == []


UNEVEN = [*range(0, 400, 33), *range(400, 2400, 200), *range(2400, 3000, 33)]  # as a phone films, in ms


@pytest.mark.parametrize("start", [0, 3000])
def test_frames_of_a_variable_frame_rate_come_at_their_own_times(
    tmp_path: Path, reports: list[str], start: int
) -> None:
    path = write_timed_video(tmp_path / "clip.mkv", [start + time for time in UNEVEN])
    frames = list(open_source(path, on_report=reports.append))
    assert [step_of(frame.rgb) for frame in frames] == list(range(len(UNEVEN)))
    assert np.allclose([frame.timestamp for frame in frames], np.array(UNEVEN) / 1000, atol=1e-3)
    assert reports == []

    sampled = list(open_source(path, rate=5, on_report=reports.append))
    assert [round(frame.timestamp * 5) for frame in sampled] == list(range(15))
    assert [UNEVEN[frame.index] / 1000 for frame in sampled] == pytest.approx([f.timestamp for f in sampled], abs=1e-3)
    assert reports == []


def test_truncated_video_of_a_variable_frame_rate_is_reported(tmp_path: Path, reports: list[str]) -> None:
    path = write_timed_video(tmp_path / "clip.mkv", UNEVEN)
    data = path.read_bytes()
    path.write_bytes(data[: data.rfind(b"\x1f\x43\xb6\x75")])  # the last cluster is gone
    frames = list(open_source(path, on_report=reports.append))
    assert 0 < len(frames) < len(UNEVEN)
    assert len(reports) == 1
    assert f"clip.mkv: ends early: {len(frames)} of the " in reports[0]


def test_video_without_sane_times_continues_at_its_nominal_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Undated:
        def __init__(self, *arguments: Any) -> None:
            self._capture = opener(*arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._capture, name)

        def get(self, key: int) -> float:
            return 0.0 if key == cv2.CAP_PROP_POS_MSEC else self._capture.get(key)

    path = write_video(tmp_path / "clip.mp4", frames=10)
    opener = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Undated)
    assert np.allclose([frame.timestamp for frame in open_source(path)], np.arange(10) / 25)


@pytest.mark.parametrize("damage", ["zeros", "flipped bits"])
def test_video_continues_past_corrupt_frames_and_counts_them(tmp_path: Path, reports: list[str], damage: str) -> None:
    data = bytearray(write_video(tmp_path / "clip.avi", "MJPG").read_bytes())
    corrupt = (20, 21, 33)
    for index in corrupt:
        start, size = mjpeg_chunks(bytes(data))[index - sum(done < index for done in corrupt)]
        chunk = data[start : start + size]
        data[start : start + size] = bytes(size) if damage == "zeros" else bytes(byte ^ 0x5A for byte in chunk)
    (tmp_path / "bad.avi").write_bytes(data)

    source = open_source(tmp_path / "bad.avi", on_report=reports.append)
    frames = list(source)
    sound = [index for index in range(50) if index not in corrupt]
    assert [frame.index for frame in frames] == sound
    assert [step_of(frame.rgb) for frame in frames] == sound
    assert np.allclose([frame.timestamp for frame in frames], np.array(sound) / 25, atol=1e-3)
    assert source.bad_frames == 3
    assert len(reports) == 2
    assert "bad.avi: frame 20 cannot be decoded" in reports[0]
    assert "3 of 50 frames could not be decoded" in reports[1]


def test_video_whose_first_frames_are_corrupt_starts_at_the_first_sound_one(tmp_path: Path) -> None:
    data = bytearray(write_video(tmp_path / "clip.avi", "MJPG").read_bytes())
    for start, size in mjpeg_chunks(bytes(data))[:2]:
        data[start : start + size] = bytes(size)
    (tmp_path / "bad.avi").write_bytes(data)
    source = open_source(tmp_path / "bad.avi")
    assert next(source).index == 2
    assert source.bad_frames == 2


def test_truncated_video_is_read_to_its_end_and_reported(tmp_path: Path, reports: list[str]) -> None:
    data = write_video(tmp_path / "clip.avi", "MJPG").read_bytes()
    start, _ = mjpeg_chunks(data)[30]
    (tmp_path / "short.avi").write_bytes(data[: start - 8])
    source = open_source(tmp_path / "short.avi", on_report=reports.append)
    assert [step_of(frame.rgb) for frame in source] == list(range(30))
    assert source.bad_frames == 0
    assert len(reports) == 1
    assert "short.avi: ends early: 30 of the 50 frames" in reports[0]


def trimmed_video(path: Path, first: int, frames: int) -> Path:
    """An MP4 of 50 frames with its index in front, whose list of edits shows `frames` of them from `first` on."""
    data = bytearray(write_video(path).read_bytes())
    edits = data.find(b"elst") + 4  # flags, count, duration in ms, first time in the units of the track
    units = int.from_bytes(data[(at := data.find(b"mdhd") + 16) : at + 4], "big")
    assert data.count(b"elst") == 1 and int.from_bytes(data[edits + 4 : edits + 8], "big") == 1
    data[edits + 8 : edits + 12] = (frames * 1000 // 25).to_bytes(4, "big")
    data[edits + 12 : edits + 16] = (first * units // 25).to_bytes(4, "big")
    index, pixels = data.find(b"moov") - 4, data.find(b"mdat") - 4
    moved, at = data[index:], data.find(b"stco") - index + 8
    for entry in range(at + 4, at + 4 + 4 * int.from_bytes(moved[at : at + 4], "big"), 4):
        moved[entry : entry + 4] = (int.from_bytes(moved[entry : entry + 4], "big") + len(moved)).to_bytes(4, "big")
    path.write_bytes(data[:pixels] + moved + data[pixels:index])
    return path


def test_video_that_was_trimmed_by_its_list_of_edits_is_whole(tmp_path: Path, reports: list[str]) -> None:
    source = open_source(trimmed_video(tmp_path / "clip.mp4", 15, 20), on_report=reports.append)
    assert source.length == 50
    assert [step_of(frame.rgb) for frame in source] == list(range(15, 35))
    assert reports == []


def test_trimmed_video_that_was_cut_off_is_reported(tmp_path: Path, reports: list[str]) -> None:
    path = trimmed_video(tmp_path / "clip.mp4", 15, 35)
    path.write_bytes(path.read_bytes()[:-1500])
    frames = list(open_source(path, on_report=reports.append))
    assert [step_of(frame.rgb) for frame in frames][:5] == list(range(15, 20))
    assert f"clip.mp4: ends early: {frames[-1].index + 1} of the 50 frames" in reports[-1]


def test_damaged_header_that_announces_billions_of_frames_does_not_hold_up_the_end(
    tmp_path: Path, reports: list[str]
) -> None:
    data = bytearray(write_video(tmp_path / "clip.avi", "MJPG").read_bytes())
    for chunk, offset in ((b"avih", 16), (b"strh", 32)):
        start = data.find(chunk) + 8 + offset
        data[start : start + 4] = (2_000_000_000).to_bytes(4, "little")
    (tmp_path / "huge.avi").write_bytes(data)
    source = open_source(tmp_path / "huge.avi", on_report=reports.append)
    assert source.length == 2_000_000_000
    started = time.perf_counter()
    assert [step_of(frame.rgb) for frame in source] == list(range(50))
    assert time.perf_counter() - started < 5
    assert "ends early: 50 of the 2000000000 frames" in reports[-1]


def _missing(folder: Path) -> Path:
    return folder / "missing.mp4"


def _empty(folder: Path) -> Path:
    path = folder / "empty.mp4"
    path.touch()
    return path


def _noise(folder: Path) -> Path:
    path = folder / "noise.mp4"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8).tobytes())
    return path


def _cut_before_its_index(folder: Path) -> Path:
    path = write_video(folder / "cut.mp4")
    path.write_bytes(path.read_bytes()[:-1500])
    return path


def _no_sound_frame(folder: Path) -> Path:
    data = bytearray(write_video(folder / "hopeless.avi", "MJPG", frames=5).read_bytes())
    for start, size in mjpeg_chunks(bytes(data)):
        data[start : start + size] = bytes(size)
    (folder / "hopeless.avi").write_bytes(data)
    return folder / "hopeless.avi"


@pytest.mark.parametrize("make", [_missing, _empty, _noise, _cut_before_its_index, _no_sound_frame])
def test_what_is_no_video_is_an_error_that_names_it(
    tmp_path: Path, make: Callable[[Path], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path)
    with pytest.raises(SourceError) as caught:
        open_source(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    printed = capfd.readouterr()
    assert (printed.out, "global cap" in printed.err) == ("", False)


def test_name_with_a_colon_is_a_file_and_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "clip.mp4", frames=3).rename(tmp_path / "a:b.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(list(open_source("a:b.mp4"))) == 3


def test_closed_video_delivers_nothing_more(tmp_path: Path) -> None:
    with open_source(write_video(tmp_path / "clip.mp4")) as source:
        next(source)
    assert source.read() is None
    assert list(source) == []
    source.close()


@pytest.mark.skipif(REAL_FOOTAGE is None, reason="the footage is not here")
def test_real_footage_is_read_whole(reports: list[str]) -> None:
    assert REAL_FOOTAGE is not None
    source = open_source(REAL_FOOTAGE, on_report=reports.append)
    shapes = {frame.rgb.shape for frame in source}
    assert (source._next_index, shapes, source.bad_frames, reports) == (325, {(180, 320, 3)}, 0, [])


def write_images(folder: Path, names: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for step, name in enumerate(names):
        assert cv2.imwrite(str(folder / name), picture(step))
    return folder


def test_images_come_in_natural_order(tmp_path: Path) -> None:
    names = ["a1.png", "a2.png", "A10.png", "b2x3.png", "b2x12.png", "b10x1.png"]
    folder = write_images(tmp_path / "images", names)
    (folder / "notes.txt").write_text("no image")
    (folder / "._a1.png").write_bytes(b"leftover")
    source = open_source(folder)
    assert [step_of(frame.rgb) for frame in source] == list(range(6))
    assert (source.length, source.live, source.bad_frames) == (6, False, 0)


def test_images_may_differ_in_size_depth_and_channels(tmp_path: Path) -> None:
    tmp_path.joinpath("images").mkdir()
    cv2.imwrite(str(tmp_path / "images/1.png"), np.full((10, 20), 7, np.uint8))
    cv2.imwrite(str(tmp_path / "images/2.png"), np.full((30, 40, 4), 9, np.uint8))
    cv2.imwrite(str(tmp_path / "images/3.png"), np.full((50, 60, 3), 11 * 256, np.uint16))
    frames = list(open_source(tmp_path / "images"))
    assert [frame.rgb.shape for frame in frames] == [(10, 20, 3), (30, 40, 3), (50, 60, 3)]
    assert [int(frame.rgb[0, 0, 0]) for frame in frames] == [7, 9, 11]
    assert {frame.rgb.dtype for frame in frames} == {np.dtype(np.uint8)}


def test_image_that_is_larger_than_any_frame_is_skipped_and_counted(tmp_path: Path, reports: list[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, height in (("0.png", 16384), ("1.png", 16385)):
        cv2.imwrite(str(folder / name), np.zeros((height, 1, 3), np.uint8))
    with open_source(folder, on_report=reports.append) as source:
        assert [frame.rgb.shape for frame in source] == [(16384, 1, 3)]
    assert source.bad_frames == 1
    assert reports == [f"{folder}: 1.png has more than 16384 pixels a side; skipped"]


def test_image_that_cannot_be_decoded_is_skipped_and_counted(tmp_path: Path, reports: list[str]) -> None:
    folder = write_images(tmp_path / "images", ["0.png", "1.png", "2.png"])
    (folder / "1.png").write_bytes(b"no picture")
    source = open_source(folder, on_report=reports.append)
    assert [frame.index for frame in source] == [0, 2]
    assert source.bad_frames == 1
    assert reports == [f"{folder}: 1.png cannot be decoded; skipped"]


def test_folder_without_a_sound_image_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no images.*directly in it") as caught:
        open_source(tmp_path)
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(SourceError, match="no image in it can be decoded") as caught:
        list(open_source(tmp_path, on_report=lambda text: None))
    assert str(tmp_path) in str(caught.value)


def test_one_image_is_a_folder_of_one(tmp_path: Path) -> None:
    write_images(tmp_path, ["only.png", "other.png"])
    assert [step_of(frame.rgb) for frame in open_source(tmp_path / "only.png")] == [0]


def test_images_are_taken_to_be_at_the_rate_unless_their_fps_is_given(tmp_path: Path, reports: list[str]) -> None:
    folder = write_images(tmp_path / "images", [f"{step}.png" for step in range(20)])
    at_rate = list(open_source(folder, rate=4, on_report=reports.append))
    assert [frame.timestamp for frame in at_rate] == [step / 4 for step in range(20)]
    assert len(reports) == 1
    assert "taken to be 4 a second" in reports[0]

    sampled = list(open_source(folder, rate=4, camera_fps=8, on_report=reports.append))
    assert [frame.index for frame in sampled] == list(range(0, 20, 2))
    assert len(reports) == 1


def test_a_video_is_released_only_between_two_reads(tmp_path: Path) -> None:
    class Slow:
        def __init__(self, capture: Any) -> None:
            self.capture, self.grabbing, self.torn = capture, threading.Event(), False

        def grab(self) -> bool:
            self.grabbing.set()
            time.sleep(0.05)
            self.grabbing.clear()
            return True

        def release(self) -> None:
            self.torn = self.grabbing.is_set()
            self.capture.release()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.capture, name)

    source: Any = open_source(write_video(tmp_path / "clip.mp4"))
    source.read()
    slow = source._capture = Slow(source._capture)
    reader = threading.Thread(target=source.read)
    reader.start()
    slow.grabbing.wait(20)
    source.close()
    reader.join(20)
    assert not slow.torn
    assert source.read() is None
