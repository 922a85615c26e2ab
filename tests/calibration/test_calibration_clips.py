"""Video that can be calibrated on, and video that cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from framestep.apps.video_recorder import VideoRecorder
from framestep.calibration.clips import Clip, read_clips, there_and_back
from framestep.calibration.compare import long_clip
from framestep.calibration.errors import CalibrationError
from framestep.runtime.bundle import Bundle
from framestep.runtime.errors import SourceError
from framestep.runtime.manifest import Labels


def write_video(path: Path, frames) -> str:
    recorder = VideoRecorder(path, 25.0)
    for index, frame in enumerate(frames):
        recorder.write(frame, index / 25)
    recorder.close()
    return str(path)


def noise(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (96, 64)) for _ in range(count)]


def test_frames_come_at_the_models_size_and_are_shared_among_clips(golden_bundle, tmp_path) -> None:
    manifest = Bundle.open(golden_bundle).manifest
    write_video(tmp_path / "a.mp4", noise(30))
    write_video(tmp_path / "b.mp4", noise(5))
    write_video(tmp_path / "c.mp4", noise(30))
    clips = read_clips([str(tmp_path)], manifest, 40)
    assert [len(clip.frames) for clip in clips] == [14, 5, 21]  # what a short clip leaves goes to the others
    assert clips[0].frames.shape[1:] == (64, 64, 3)


def test_synthetic_and_single_files_are_clips_too(golden_bundle, tmp_path) -> None:
    manifest = Bundle.open(golden_bundle).manifest
    file = write_video(tmp_path / "a.mp4", noise(12))
    clips = read_clips(["synthetic:frames=20", file], manifest, 100)
    assert [len(clip.frames) for clip in clips] == [20, 12]


def test_a_clip_is_named_without_folder_and_password(golden_bundle, tmp_path, monkeypatch) -> None:
    from framestep.calibration import clips as module

    manifest = Bundle.open(golden_bundle).manifest
    file = write_video(tmp_path / "a.mp4", noise(12))
    camera = "rtsp://user:secret@10.0.0.7/door"
    opened = module.open_source
    monkeypatch.setattr(
        module, "open_source", lambda name, **more: opened("synthetic" if name == camera else name, **more)
    )
    assert [clip.name for clip in read_clips([file, "synthetic:frames=20", camera], manifest, 60)] == [
        "a.mp4",
        "synthetic:frames=20",
        "rtsp://***@10.0.0.7/door",
    ]


@pytest.mark.parametrize("grey", [0, 128])
def test_black_or_even_video_is_refused(golden_bundle, tmp_path, grey) -> None:
    file = write_video(tmp_path / "even.mp4", [np.full((64, 64, 3), grey, np.uint8)] * 20)
    with pytest.raises(CalibrationError, match="every frame is one even colour"):
        read_clips([file], Bundle.open(golden_bundle).manifest, 100)


def test_too_few_frames_are_refused(golden_bundle, tmp_path) -> None:
    file = write_video(tmp_path / "short.mp4", noise(3))
    with pytest.raises(CalibrationError, match="too few frames to calibrate on: 3; give at least 8"):
        read_clips([file], Bundle.open(golden_bundle).manifest, 100)


def test_an_unreadable_clip_is_refused(golden_bundle, tmp_path) -> None:
    (tmp_path / "damaged.mp4").write_bytes(b"no video")
    with pytest.raises(SourceError, match="damaged.mp4"):
        read_clips([str(tmp_path / "damaged.mp4")], Bundle.open(golden_bundle).manifest, 100)


def test_the_truth_about_frames_may_begin_with_a_mark_and_must_be_text(golden_bundle, tmp_path) -> None:
    manifest = replace(Bundle.open(golden_bundle).manifest, labels=Labels(("a cat", "a dog"), "labels.safetensors"))
    video, truth = write_video(tmp_path / "a.mp4", noise(12)), tmp_path / "a.labels.txt"
    truth.write_bytes("\ufeffa dog\r\n".encode() + b"a cat\r\n" * 11)
    (clip,) = read_clips([video], manifest, 100)
    assert clip.truth is not None and clip.truth.tolist() == [1] + 11 * [0]
    truth.write_bytes(b"caf\xe9\n" * 12)
    with pytest.raises(CalibrationError, match="a.labels.txt: cannot be read: not UTF-8 text"):
        read_clips([video], manifest, 100)


def test_the_truth_is_counted_in_frames_of_the_video_before_any_is_left_out(golden_bundle, tmp_path) -> None:
    labels = Labels(("a cat", "a dog"), "labels.safetensors")
    manifest = replace(Bundle.open(golden_bundle).manifest, labels=labels, rate=5.0)
    video, truth = write_video(tmp_path / "a.mp4", noise(40)), tmp_path / "a.labels.txt"  # 25 frames a second
    lines = ["a dog" if index % 10 == 0 else "a cat" for index in range(40)]
    truth.write_text("\n".join(lines))
    (clip,) = read_clips([video], manifest, 100)
    assert clip.truth is not None and clip.truth.tolist() == [1, 0] * 4  # frames 0, 5, 10, ...
    truth.write_text("\n".join([*lines[:10], "a bird", *lines[11:]]))
    with pytest.raises(CalibrationError, match="a.labels.txt: line 11: expected a label of .*, found 'a bird'"):
        read_clips([video], manifest, 100)
    truth.write_text("\n".join(lines[:35]))
    with pytest.raises(CalibrationError, match="a.labels.txt: line 36: expected a label of .*, found nothing"):
        read_clips([video], manifest, 100)


def test_a_long_stream_is_made_without_a_jump() -> None:
    order = there_and_back(4, 11)
    assert order.tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2]
    assert there_and_back(1, 3).tolist() == [0, 0, 0]


def test_a_long_clip_is_a_short_one_played_there_and_back_and_takes_no_memory() -> None:
    frames = np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3)
    long = long_clip([Clip("short", frames[:1]), Clip("longest", frames)], 1_000_000)
    assert long.frames is frames
    first = [frame for frame, _ in zip(long.played(), range(7), strict=False)]
    assert [int(frame[0, 0, 0]) // 12 for frame in first] == [0, 1, 2, 1, 0, 1, 2]
    assert all(frame.base is not None for frame in first)
    assert sum(1 for _ in long.played()) == 1_000_000
    assert [frame.tolist() for frame in Clip("once", frames).played()] == frames.tolist()
