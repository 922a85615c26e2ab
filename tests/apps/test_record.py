"""Files that a run writes."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import pytest

from framestep.apps import record, video_recorder
from framestep.apps.output_places import DISK_RESERVE, check_writable
from framestep.apps.record import ArrayRecorder, JsonLines
from framestep.apps.video_recorder import VideoRecorder
from framestep.runtime.errors import OutputError

Usage = namedtuple("Usage", "total used free")


def picture(value: int = 0, height: int = 64, width: int = 96) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def frames_in(path: Path) -> tuple[int, float, tuple[int, int]]:
    """Frames that can be decoded, frames a second, (height, width)."""
    video = cv2.VideoCapture(str(path))
    assert video.isOpened()
    fps, count, shape = video.get(cv2.CAP_PROP_FPS), 0, (0, 0)
    while True:
        read, frame = video.read()
        if not read:
            return count, fps, shape
        count += 1
        shape = frame.shape[:2]


def bar(step: int) -> np.ndarray:
    """A white bar as long as the step."""
    bgr = picture(0, 64, 512)
    bgr[:, : 8 * step] = 255
    return bgr


def steps_in(path: Path) -> list[int]:
    """The step of each frame."""
    video, steps = cv2.VideoCapture(str(path)), []
    while True:
        read, frame = video.read()
        if not read:
            return steps
        steps.append(round(float((frame > 128).mean()) * 64))


# Before a run


def test_a_writable_place_is_accepted_and_left_as_it_is(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.jsonl", "--output")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.jsonl").write_text("old")
    check_writable(tmp_path / "old.jsonl", "--output")
    assert (tmp_path / "old.jsonl").read_text() == "old"


def test_unwritable_places_are_refused_by_option_and_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nowhere" / "out", tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(OutputError, match=f"--record {path}: ") as caught:
            check_writable(path, "--record")
        assert "\n" not in str(caught.value)


def test_what_goes_to_files_makes_none_of_the_name_of_standard_output() -> None:
    with pytest.raises(OutputError, match=r"--events -: does not go to standard output; name a file"):
        check_writable(Path("-"), "--events")


# JSON lines


def test_lines_are_complete_on_disk_as_soon_as_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "out.jsonl")
    lines.write({"label": "ein Mädchen", "score": 0.5})
    assert (tmp_path / "out.jsonl").read_text("utf-8") == '{"label": "ein Mädchen", "score": 0.5}\n'
    lines.close()
    lines.close()


def test_a_full_disk_is_an_output_error_that_names_the_file() -> None:
    lines = JsonLines(Path("/dev/full"))
    with pytest.raises(OutputError, match=r"/dev/full: cannot be written: No space left"):
        lines.write({"a": 1})
    lines.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_a_line_that_did_not_fit_is_cut_off(tmp_path: Path) -> None:
    script = f"""
import resource
from pathlib import Path
from framestep.apps.record import JsonLines
from framestep.runtime.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
lines = JsonLines(Path({str(tmp_path / "out.jsonl")!r}))
try:
    for i in range(100):
        lines.write({{"number": i}})
except OutputError as error:
    print(error)
lines.close()
print(lines.files() == [lines.path])
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == f"{tmp_path / 'out.jsonl'}: cannot be written: File too large\nTrue\n"
    written = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in written] == list(range(len(written))) and written


def test_a_pipe_that_nobody_reads_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "PIPE_PATIENCE_S", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match=r"pipe: is a pipe that nobody reads; start what reads it first"):
        JsonLines(tmp_path / "pipe")


def test_a_pipe_is_given_time_to_find_its_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Timer(0.2, lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    lines = JsonLines(tmp_path / "pipe")
    many = [{"number": number} for number in range(10_000)]  # more than a pipe holds
    for line in many:
        lines.write(line)
    lines.close()
    reader.join()
    assert [json.loads(line) for line in read[0].splitlines()] == many


def test_lines_are_brought_to_the_disk_when_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    )
    lines = JsonLines(tmp_path / "out.jsonl")
    lines.write({"a": 1})
    assert synced == []
    lines.close()
    assert synced == [str(tmp_path / "out.jsonl")]


def test_videos_and_arrays_are_on_the_disk_before_they_have_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    for module in (record, video_recorder):
        monkeypatch.setattr(module, "sync", lambda path: synced.append(path.name))
        monkeypatch.setattr(module, "sync_names", lambda folder: synced.extend(path.name for path in folder.iterdir()))
    video = VideoRecorder(tmp_path / "out.mp4", 10)
    video.write(picture(), 0)
    video.close()
    arrays = ArrayRecorder(tmp_path / "out.npz", {})
    arrays.write({"pooled": np.zeros(3, np.float32)})
    arrays.close()
    first, video_there, second, *both = synced
    assert first.startswith(".out.partial-") and video_there == "out.mp4"
    assert second.startswith(".out.npz.partial-") and sorted(both) == ["out.mp4", "out.npz"]


# Videos


@pytest.mark.parametrize("jitter", [0, 0.4])  # of a frame: taken late by a rate from a finer one
def test_a_recording_of_a_file_has_every_regular_frame_once(tmp_path: Path, jitter: float) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", 12.5)
    for i in range(30):
        recorder.write(picture(i * 5), round((i + i % 3 * jitter) / 12.5, 3))
    assert not (tmp_path / "out.mp4").exists()
    recorder.close()
    recorder.close()
    assert frames_in(tmp_path / "out.mp4") == (30, 12.5, (64, 96))
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_a_recording_of_a_variable_frame_rate_shows_each_frame_at_its_time(tmp_path: Path) -> None:
    times = np.cumsum([0] + [0.05] * 20 + [0.5] * 4 + [0.01] * 20 + [1.5] + [0.1] * 4)
    recorder = VideoRecorder(tmp_path / "out.mp4", 10)
    for i, timestamp in enumerate(times):
        recorder.write(bar(i), 3 + timestamp)  # whatever the source begins with
    recorder.close()
    shown = steps_in(tmp_path / "out.mp4")
    assert len(shown) / 10 == pytest.approx(times[-1] + 0.1, abs=0.1)
    for number, step in enumerate(shown):
        # what a player of the source shows then, or one frame of the recording before or after
        earliest, latest = np.searchsorted(times, [number / 10 - 0.1, number / 10 + 0.1], side="right") - 1
        assert max(earliest, 0) <= step <= latest


def test_a_file_that_jumps_in_time_does_not_fill_the_disk(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", 5)
    for timestamp in (0, 0.2, 95_000, 95_000.2):
        recorder.write(picture(), timestamp)
    recorder.close()
    assert frames_in(tmp_path / "out.mp4")[0] == pytest.approx(60 * 5, abs=5)


def test_a_live_recording_runs_at_the_pace_of_its_timestamps(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", None)
    times = np.arange(0, 4, 0.1)
    times = times[(times < 2) | (times > 2.45)]  # half a second was lost
    for timestamp in times:
        recorder.write(picture(), timestamp)
    recorder.close()
    count, fps, _ = frames_in(tmp_path / "out.mp4")
    assert fps == pytest.approx(10, abs=0.1)
    assert count / fps == pytest.approx(4.0, abs=0.21)


def test_a_live_recording_does_not_fill_long_absences(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", None)
    for timestamp in [*np.arange(0, 2, 0.1), *np.arange(3600, 3602, 0.1)]:
        recorder.write(picture(), timestamp)
    recorder.close()
    count, _, _ = frames_in(tmp_path / "out.mp4")
    assert 55 <= count <= 65  # 2 s, at most 2 s of the absence, 2 s


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_short_live_recordings_are_playable(tmp_path: Path, frames: int) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", None)
    for i in range(frames):
        recorder.write(picture(), i / 20)
    recorder.close()
    assert frames_in(tmp_path / "out.mp4")[0] == frames


def test_frames_of_other_sizes_are_fitted_into_the_first_ones(tmp_path: Path) -> None:
    recorder = VideoRecorder(tmp_path / "out.mp4", 10)
    for i, size in enumerate(((64, 96), (200, 96), (10, 300), (1, 1))):
        recorder.write(picture(200, *size), i / 10)
    recorder.close()
    assert frames_in(tmp_path / "out.mp4") == (4, 10, (64, 96))


def test_without_frames_there_is_no_video(tmp_path: Path) -> None:
    VideoRecorder(tmp_path / "out.mp4", None).close()
    assert list(tmp_path.iterdir()) == []


def test_an_old_recording_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_text("old")
    recorder = VideoRecorder(tmp_path / "out.mp4", 10)
    recorder.write(picture(), 0)
    assert (tmp_path / "out.mp4").read_text() == "old"
    recorder.close()
    assert frames_in(tmp_path / "out.mp4")[0] == 1


def test_a_disk_filling_up_stops_the_recording_and_keeps_it_playable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [1 << 40]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1 << 40, 0, free[0]))
    recorder = VideoRecorder(tmp_path / "out.mp4", 10)
    for i in range(20):
        recorder.write(picture(), i / 10)
    free[0] = DISK_RESERVE - 1
    with pytest.raises(OutputError, match=r"out.mp4: disk nearly full .*stopped after 32 frames"):
        for i in range(20, 60):
            recorder.write(picture(), i / 10)
    recorder.close()
    assert frames_in(tmp_path / "out.mp4")[0] == 32


def test_a_disk_that_is_full_before_the_first_frame_leaves_no_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1 << 40, 0, DISK_RESERVE - 1))
    recorder = VideoRecorder(tmp_path / "out.mp4", 10)
    with pytest.raises(OutputError, match="recording stopped after 0 frames"):
        recorder.write(picture(), 0.0)
    recorder.close()
    assert not recorder.finished and list(tmp_path.iterdir()) == []


def test_a_still_black_scene_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_recorder, "FRAMES_WITHOUT_GROWTH", video_recorder.FRAMES_WITHOUT_GROWTH // 3)
    recorder = VideoRecorder(tmp_path / "out.mp4", 25)
    for i in range(1100):
        recorder.write(picture(0, 414, 640), i / 25)
    recorder.close()
    assert recorder.finished


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_a_recording_that_could_not_be_written_is_an_output_error(tmp_path: Path) -> None:
    script = f"""
import resource
import numpy as np
from pathlib import Path
from framestep.apps import video_recorder
from framestep.runtime.errors import OutputError
video_recorder.FRAMES_WITHOUT_GROWTH = 40
noise = np.random.default_rng(0).integers(0, 256, (8, 240, 320, 3), np.uint8)
recorder = video_recorder.VideoRecorder(Path({str(tmp_path / "out.mp4")!r}), 10)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    for i in range(2000):
        recorder.write(noise[i % 8], i / 10)
except OutputError as error:
    print(i, error)
try:
    recorder.close()
except OutputError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    growth, finish = found.stdout.splitlines()
    assert "no longer grows" in growth and int(growth.split()[0]) < 200
    assert f"{tmp_path / 'out.mp4'}: the recording could not be finished" in finish
    assert list(tmp_path.iterdir()) == []


# Arrays


def test_arrays_come_back_stacked(tmp_path: Path) -> None:
    features = np.random.default_rng(0).random((50, 6, 8)).astype(np.float32)
    recorder = ArrayRecorder(tmp_path / "out.npz", {"labels": np.array(["a", "größer"])})
    for i, value in enumerate(features):
        recorder.write({"features": value, "pooled": value.T[0], "indices": np.array(i, np.int64)})
    assert list(tmp_path.iterdir()) == []
    recorder.close()
    recorder.close()
    with np.load(tmp_path / "out.npz", allow_pickle=False) as found:
        assert np.array_equal(found["features"], features)
        assert np.array_equal(found["pooled"], features[:, :, 0])
        assert np.array_equal(found["indices"], np.arange(50))
        assert found["labels"].tolist() == ["a", "größer"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


def test_arrays_do_not_pile_up_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    recorder = ArrayRecorder(tmp_path / "out.npz", {})
    row = np.zeros(100_000, np.float32)
    tracemalloc.start()
    for _ in range(100):  # 40 MB
        recorder.write({"features": row})
    recorder.close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000
    assert np.load(tmp_path / "out.npz")["features"].shape == (100, 100_000)


def test_a_disk_filling_up_leaves_room_to_pack_the_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = np.zeros(1 << 20, np.uint8)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1 << 40, 0, DISK_RESERVE + (20 << 20)))
    recorder = ArrayRecorder(tmp_path / "out.npz", {})
    with pytest.raises(OutputError, match=r"out.npz: disk nearly full .*after 32 frames"):
        for _ in range(100):
            recorder.write({"features": row})
    recorder.close()
    assert np.load(tmp_path / "out.npz")["features"].shape == (32, 1 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_arrays_that_do_not_fit_are_an_output_error_and_leave_nothing(tmp_path: Path) -> None:
    script = f"""
import resource
import numpy as np
from pathlib import Path
from framestep.apps.record import ArrayRecorder
from framestep.runtime.errors import OutputError
recorder = ArrayRecorder(Path({str(tmp_path / "out.npz")!r}), {{}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for action in (lambda: [recorder.write({{"a": np.zeros(9_000, np.uint8)}}) for _ in range(20)], recorder.close):
    try:
        action()
    except OutputError as error:
        print(error)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first = found.stdout.splitlines()[0]
    assert first.startswith(f"{tmp_path / 'out.npz'}: cannot be written: File too large")
    left = [path.name for path in tmp_path.iterdir()]
    assert left in ([], ["out.npz"])
    if left:
        assert np.load(tmp_path / "out.npz")["a"].shape == (11, 9_000)


def test_without_frames_there_is_no_archive(tmp_path: Path) -> None:
    ArrayRecorder(tmp_path / "out.npz", {"labels": np.array(["a"])}).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="--output"):
        check_writable(tmp_path / "out.jsonl", "--output")


def test_a_mask_that_does_not_fit_leaves_no_half_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = record.MaskFolder(tmp_path / "masks", {"labels": ["a"]})
    folder.write(0, 1, np.zeros((4, 4), np.uint8))

    def fill_disk(path: Path, data: bytes) -> int:
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with pytest.raises(OutputError, match=r"0\.000002\.png: cannot be written: No space left on device"):
        folder.write(0, 2, np.zeros((4, 4), np.uint8))
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["0.000001.png", "labels.json"]


def test_a_recording_goes_where_a_link_leads(tmp_path: Path) -> None:
    disk, here = tmp_path / "disk", tmp_path / "here"
    disk.mkdir()
    here.mkdir()
    for name in ("video.mp4", "arrays.npz"):
        (here / name).symlink_to(disk / name)
    video, arrays = VideoRecorder(here / "video.mp4", 10.0), ArrayRecorder(here / "arrays.npz", {})
    video.write(np.zeros((32, 32, 3), np.uint8), 0.0)
    arrays.write({"pooled": np.zeros(3, np.float32)})
    for recorder in (video, arrays):
        recorder.close()
    assert all(link.is_symlink() for link in here.iterdir())
    assert sorted(path.name for path in disk.iterdir()) == ["arrays.npz", "video.mp4"]
