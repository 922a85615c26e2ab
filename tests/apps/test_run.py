"""The run: sources through a session into files. Bundle, session and sources are stand-ins."""

import errno
import json
import os
import shutil
import signal
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from command_line import lines_of, video_frames

from framestep.apps import run as run_module
from framestep.apps.run import Summary, run
from framestep.apps.run_options import RunOptions
from framestep.apps.status import LaneStatus
from framestep.apps.video_recorder import VideoRecorder
from framestep.runtime.errors import FramestepError, SourceError
from framestep.runtime.manifest import FORMAT, VERSION, FrameSpec, Graph, Labels, Manifest, Origin, Port
from framestep.runtime.preprocess import Preprocess
from framestep.runtime.session import NonFiniteOutputError, Result
from framestep.runtime.sources import Frame

LABELS = ("dark", "bright", "background")
BRIGHT, DARK = 200, 20


def manifest(labels=LABELS, rate=None) -> Manifest:
    def outputs(**shapes) -> tuple[Port, ...]:
        return tuple(Port(name, "output", "float32", ("S", *shape)) for name, shape in shapes.items())

    frame = Port("frame", "frame", "uint8", ("S", 32, 32, 3))
    embeddings = Port("text_embeddings", "text_embeddings", "float32", ("C", 8))
    tokens = Port("input_ids", "input_ids", "int64", ("B", 64))
    return Manifest(
        format=FORMAT,
        version=VERSION,
        family="stand-in",
        precision="fp32",
        frame=FrameSpec(32, 32),
        graphs={
            "backbone": Graph("b.onnx", (frame,), outputs(features=(16, 512), pooled=(8,))),
            "label": Graph("l.onnx", (frame, embeddings), outputs(scores=("C",), patch_scores=("C", 4, 4))),
            "text": Graph("t.onnx", (tokens,), outputs(text_embeddings=(8,))),
        },
        states=(),
        origin=Origin("none", "0"),
        rate=rate,
        labels=Labels(labels, "labels", "background") if labels else None,
    )


class StandInSession:
    """`scores` say how bright a frame is; a frame of pure white gives NaN."""

    def __init__(self, bundle, engine, device, streams, outputs, threads, precision, graphs) -> None:
        self.labels = bundle.manifest.labels.names if bundle.manifest.labels else ()
        self.outputs = outputs
        self.preprocess = Preprocess(bundle.manifest.frame)
        self.engine_choice = f"{engine} on {device}"
        self.steps: list[int] = []  # streams in each
        self.warmed_up = False
        self.step_s = 0.0
        self._count = streams

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass

    def open_stream(self):
        return StandInStream()

    def warm_up(self, steps: int) -> None:
        self.warmed_up = True

    def step(self, frames):
        time.sleep(self.step_s)
        self.steps.append(len(frames))
        results, broken = {}, []
        for stream, rgb in frames.items():
            if rgb.min() == 255:
                stream.position = 0
                broken.append(stream)
                continue
            bright = float(rgb.mean()) / 255
            scores = np.array([1 - bright, bright, 0.9], np.float32)[: len(self.labels)]
            patch_scores = np.full((len(scores), 4, 4), 0.1, np.float32)
            patch_scores[1:2, :, :2] = patch_scores[:1, :, 2:] = 0.9
            values = {
                "features": np.full((16, 512), bright, np.float32),
                "pooled": np.full(8, bright, np.float32),
                "scores": scores,
                "patch_scores": patch_scores,
            }
            results[stream] = Result({name: values[name] for name in self.outputs}, stream.position, 5.0)
            stream.position += 1
        if broken:
            raise NonFiniteOutputError(tuple(broken), ("pooled",), results)
        return results


class StandInStream:
    slot = 0

    def __init__(self) -> None:
        self.position = 0

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass


class StandInFile:
    """Frames of the given brightness, at 10 a second unless at `times`."""

    live = False

    def __init__(self, name: str, values: list[int], size=(36, 64), fails_after: int | None = None, times=None) -> None:
        self.name = name
        self._times = times
        self.fps = 10.0
        self.dropped = self.bad_frames = 0
        self.ended = self.closed = False
        self.delivered = 0
        self._values = values
        self._size = size
        self._fails_after = fails_after

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def stop(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = True

    def read(self, timeout: float | None = None) -> Frame | None:
        if self.delivered == self._fails_after:
            raise SourceError(f"{self.name}: gone")
        if self.delivered == len(self._values):
            self.ended = True
            return None
        i = self.delivered
        self.delivered += 1
        rgb = np.full((*self._size, 3), self._values[i], np.uint8)
        return Frame(rgb, i, i / 10 if self._times is None else self._times[i], time.perf_counter())


class StandInCamera(StandInFile):
    """A frame every `period` seconds by the clock; older ones are dropped. Ends after `frames`."""

    live = True

    def __init__(self, name: str, period: float, frames: int) -> None:
        super().__init__(name, [DARK] * frames)
        self._period = period
        self._start = time.perf_counter()

    def read(self, timeout: float | None = None) -> Frame | None:
        if self.delivered >= len(self._values):
            self.ended = True
            return None
        assert timeout is not None and timeout <= 0.1  # the loop must stay responsive to signals
        due = self._start + self.delivered * self._period
        wait = due - time.perf_counter()
        if wait > timeout:
            time.sleep(timeout)
            return None
        time.sleep(max(wait, 0))
        newest = min(int((time.perf_counter() - self._start) / self._period), len(self._values) - 1)
        self.dropped += newest - self.delivered
        self.delivered = newest + 1
        rgb = np.full((36, 64, 3), DARK, np.uint8)
        return Frame(rgb, newest, newest * self._period, time.perf_counter())


class Recorder:
    """A status that remembers."""

    def __init__(self) -> None:
        self.reports: list[str] = []
        self.errors: list[str] = []
        self.shown: list[list[LaneStatus]] = []
        self.closed = False

    def update(self, lanes: Callable) -> None:
        self.shown.append(lanes())

    def report(self, message: str) -> None:
        self.reports.append(message)

    def error(self, message: str) -> None:
        self.errors.append(message)

    def close(self) -> None:
        self.closed = True


class Stage:
    """A run with stand-ins for bundle, session and sources."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.manifest = manifest()
        self.sources: dict[str, StandInFile] = {}
        self.opened: list[tuple[str, dict]] = []
        self.session: StandInSession
        self.step_s = 0.0
        self.status = Recorder()
        bundles = SimpleNamespace(open=lambda path: SimpleNamespace(path=path, manifest=self.manifest))
        monkeypatch.setattr(run_module, "Bundle", bundles)
        monkeypatch.setattr(run_module, "Session", self._session)
        monkeypatch.setattr(run_module, "open_source", self._open)

    def run(self, *sources: StandInFile, **options) -> Summary:
        self.sources = {source.name: source for source in sources}
        defaults = {"engine": "auto", "device": "cpu"}
        names = tuple(self.sources) or ("clip.mp4",)
        asked = RunOptions(bundle=Path("b.bundle"), sources=names, **{**defaults, **options})
        return run(asked, self.status)

    def _session(self, *arguments) -> StandInSession:
        self.session = StandInSession(*arguments)
        self.session.step_s = self.step_s
        return self.session

    def _open(self, name: str, **options) -> StandInFile:
        assert self.session.warmed_up
        self.opened.append((name, options))
        return self.sources[name]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


# What is written


def test_a_file_gives_one_line_a_frame_in_order(stage: Stage, tmp_path: Path) -> None:
    summary = stage.run(StandInFile("clip.mp4", [DARK, BRIGHT, DARK]), output=tmp_path / "out.jsonl")
    lines = lines_of(tmp_path / "out.jsonl")
    assert [line["index"] for line in lines] == [line["position"] for line in lines] == [0, 1, 2]
    assert [line["timestamp"] for line in lines] == [0.0, 0.1, 0.2]
    assert all(line["source"] == "clip.mp4" and line["stream"] == 0 for line in lines)
    assert all(line["latency_ms"] == 5.0 and 0 <= line["age_ms"] < 1000 for line in lines)
    assert lines[1]["scores"] == {"dark": 0.215686, "bright": 0.784314, "background": 0.9}
    assert (summary.frames, summary.stopped, summary.errors) == (3, "every source ended", [])
    assert summary.files == {"results": [str(tmp_path / "out.jsonl")]}
    assert stage.sources["clip.mp4"].closed and stage.status.closed


def test_named_outputs_replace_the_scores(stage: Stage, tmp_path: Path) -> None:
    stage.run(StandInFile("clip.mp4", [51]), output=tmp_path / "out.jsonl", outputs=("pooled",))
    (line,) = lines_of(tmp_path / "out.jsonl")
    assert line["pooled"] == [0.2] * 8 and "scores" not in line


def test_a_bundle_without_labels_gives_lines_without_scores(stage: Stage, tmp_path: Path) -> None:
    stage.manifest = manifest(labels=())
    stage.run(StandInFile("clip.mp4", [DARK]), output=tmp_path / "out.jsonl", record=tmp_path / "out.mp4")
    (line,) = lines_of(tmp_path / "out.jsonl")
    assert "scores" not in line
    assert stage.session.outputs == ("pooled",)
    assert video_frames(tmp_path / "out.mp4") == 1
    assert stage.status.reports == [
        "b.bundle: has no labels, so it gives no scores; `framestep label b.bundle --labels FILE` adds some"
    ]


def test_who_asks_for_an_output_is_not_told_of_labels(stage: Stage, tmp_path: Path) -> None:
    stage.manifest = manifest(labels=())
    stage.run(StandInFile("clip.mp4", [DARK]), output=tmp_path / "out.jsonl", outputs=("pooled",))
    stage.run(StandInFile("clip.mp4", [DARK]), save_features=tmp_path / "out.npz")
    assert stage.status.reports == []


def test_events_have_hysteresis_and_none_is_of_the_background(stage: Stage, tmp_path: Path) -> None:
    values = [DARK] * 3 + [BRIGHT] * 4 + [DARK] * 2
    summary = stage.run(StandInFile("clip.mp4", values), events=tmp_path / "events.jsonl", on=0.6)
    events = lines_of(tmp_path / "events.jsonl")
    found = [(event["label"], event["start_index"], event["end_index"]) for event in events]
    assert found == [("dark", 0, 2), ("bright", 3, 6), ("dark", 7, 8)]
    assert events[1]["start"] == 0.3 and events[1]["peak_score"] == pytest.approx(BRIGHT / 255)
    assert summary.events == 3
    assert f"events     3 in {tmp_path}/events.jsonl" in summary.as_text().splitlines()


def test_a_run_that_keeps_nothing_says_what_would_be_kept(stage: Stage) -> None:
    summary = stage.run(StandInFile("clip.mp4", [DARK] * 3))
    assert any(line.startswith("files      none; --output, --events") for line in summary.as_text().splitlines())


def test_saved_features_are_every_frames(stage: Stage, tmp_path: Path) -> None:
    stage.run(StandInFile("clip.mp4", [0, 51, 102]), save_features=tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as found:
        assert found["features"].shape == (3, 16, 512) and found["pooled"].shape == (3, 8)
        np.testing.assert_allclose(found["pooled"][:, 0], [0, 0.2, 0.4])
        assert found["scores"].shape == (3, 3) and found["labels"].tolist() == list(LABELS)
        assert found["indices"].tolist() == [0, 1, 2] and found["timestamps"].tolist() == [0.0, 0.1, 0.2]
        assert "patch_scores" not in found and "text_embeddings" not in found


def test_saved_masks_are_every_frames_class_map(stage: Stage, tmp_path: Path) -> None:
    summary = stage.run(StandInFile("clip.mp4", [0, 51, 102], size=(36, 64)), save_masks=tmp_path / "masks")
    names = ["0.000000.png", "0.000001.png", "0.000002.png", "labels.json"]
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == names
    mask = cv2.imread(str(tmp_path / "masks" / names[1]), cv2.IMREAD_UNCHANGED)
    assert mask.shape == (36, 64) and mask.dtype == np.uint8
    # patch_scores put "bright" at the left and "dark" at the right; the crop shows columns 14 to 49
    assert (mask[:, :14] == 255).all() and (mask[:, 50:] == 255).all()
    assert (mask[:, 14:31] == 1).all() and (mask[:, 33:50] == 0).all()
    legend = json.loads((tmp_path / "masks" / "labels.json").read_text("utf-8"))
    assert legend == {"labels": list(LABELS), "background": "background", "not_seen": 255, "sources": ["clip.mp4"]}
    assert summary.files == {"masks": [str(tmp_path / "masks")]}


def test_masks_of_several_sources_lie_side_by_side(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()  # an empty folder is fine
    stage.run(StandInFile("a", [DARK] * 2), StandInFile("b", [DARK]), save_masks=tmp_path / "masks")
    names = sorted(path.name for path in (tmp_path / "masks").glob("*.png"))
    assert names == ["0.000000.png", "0.000001.png", "1.000000.png"]


@pytest.mark.parametrize("overlay", [None, "all", "bright"])
def test_a_recording_plays_every_frame_of_a_file(stage: Stage, tmp_path: Path, overlay: str | None) -> None:
    stage.run(StandInFile("clip.mp4", [DARK] * 12), record=tmp_path / "out.mp4", overlay=overlay)
    assert video_frames(tmp_path / "out.mp4") == 12
    assert ("patch_scores" in stage.session.outputs) == (overlay is not None)


def test_a_recording_of_a_variable_frame_rate_takes_as_long_as_its_source(stage: Stage, tmp_path: Path) -> None:
    times = [0, 0.1, 0.2, 1.2, 2.2, 2.21, 2.22, 2.23, 2.3]
    stage.run(StandInFile("clip.mp4", [DARK] * 9, times=times), record=tmp_path / "out.mp4")
    assert video_frames(tmp_path / "out.mp4") == pytest.approx(24, abs=1)


def test_the_summary_counts(stage: Stage) -> None:
    source = StandInFile("clip.mp4", [DARK] * 4)
    source.bad_frames = 2
    summary = stage.run(source, deadline_ms=4.0)
    assert summary.missed_deadlines == 4 and summary.bad_frames == 2
    assert summary.latency_ms.p99 == pytest.approx(5.0, rel=0.003) and summary.latency_ms.max == 5.0
    assert stage.run(StandInFile("clip.mp4", [DARK] * 4), deadline_ms=6.0).missed_deadlines == 0
    json.dumps(summary.as_dict(), allow_nan=False)
    assert "4 frames in" in summary.as_text() and "\n" in summary.as_text()
    one = stage.run(StandInFile("clip.mp4", [DARK]), deadline_ms=4.0).as_text()
    assert one.startswith("1 frame in") and "1 frame later than" in one


def test_the_status_names_the_likeliest_labels(stage: Stage) -> None:
    stage.run(StandInFile("clip.mp4", [BRIGHT]))
    assert [label for label, _ in stage.status.shown[0][0].top] == ["background", "bright", "dark"]


# Several sources


def test_several_files_are_streams_of_one_session(stage: Stage, tmp_path: Path) -> None:
    summary = stage.run(
        StandInFile("a.mp4", [DARK] * 5),
        StandInFile("b.mp4", [BRIGHT] * 3),
        output=tmp_path / "out.jsonl",
        events=tmp_path / "events.jsonl",
        record=tmp_path / "out.mp4",
        save_features=tmp_path / "out.npz",
    )
    assert stage.session.steps == [2, 2, 2, 1, 1]
    lines = lines_of(tmp_path / "out.jsonl")
    for number, (name, count) in enumerate((("a.mp4", 5), ("b.mp4", 3))):
        own = [line for line in lines if line["stream"] == number]
        assert [line["index"] for line in own] == list(range(count))
        assert {line["source"] for line in own} == {name}
        assert video_frames(tmp_path / f"out.{number}.mp4") == count
        assert np.load(tmp_path / f"out.{number}.npz")["pooled"].shape == (count, 8)
    assert {(event["source"], event["label"]) for event in lines_of(tmp_path / "events.jsonl")} == {
        ("a.mp4", "dark"),
        ("b.mp4", "bright"),
    }
    assert [source.frames for source in summary.sources] == [5, 3]


def test_live_sources_are_stepped_with_what_each_has_now(stage: Stage, tmp_path: Path) -> None:
    summary = stage.run(
        StandInCamera("fast", 0.01, 30),
        StandInCamera("slow", 0.1, 3),
        output=tmp_path / "out.jsonl",
        record=tmp_path / "out.mp4",
    )
    frames = [source.frames for source in summary.sources]
    assert frames[0] > 10 and frames[1] == 3
    assert summary.sources[0].frames + summary.sources[0].dropped == 30
    indices = [line["index"] for line in lines_of(tmp_path / "out.jsonl") if line["source"] == "fast"]
    assert indices == sorted(set(indices))


def test_a_camera_that_is_slow_to_close_does_not_hold_up_the_others(stage: Stage, tmp_path: Path) -> None:
    slow, other = StandInCamera("slow to close", 0.01, 100), StandInFile("clip.mp4", [DARK] * 12)
    left = []  # frames of the other source when the camera is closed
    slow.close = lambda: left.append(12 - other.delivered)  # type: ignore[method-assign]
    read = slow.read

    def fail_after_3(timeout: float | None = None) -> Frame | None:
        if slow.delivered >= 3:
            raise SourceError("slow to close: gone")
        return read(timeout)

    slow.read = fail_after_3  # type: ignore[method-assign]
    stage.run(slow, other, output=tmp_path / "out.jsonl")
    assert slow.ended and left == [0]


def test_a_slow_model_drops_live_frames_and_counts_them(stage: Stage) -> None:
    stage.step_s = 0.03
    summary = stage.run(StandInCamera("camera", 0.01, 30))
    assert summary.dropped >= 10
    assert summary.frames + summary.dropped == 30


# Ends


def test_max_frames_stops_every_source(stage: Stage, tmp_path: Path) -> None:
    source = StandInFile("clip.mp4", [DARK] * 9)
    summary = stage.run(source, max_frames=4, output=tmp_path / "out.jsonl")
    assert len(lines_of(tmp_path / "out.jsonl")) == summary.frames == source.delivered == 4
    assert summary.stopped == "reached --max-frames" and source.closed


def test_a_source_that_fails_is_reported_and_the_others_go_on(stage: Stage, tmp_path: Path) -> None:
    summary = stage.run(
        StandInFile("a.mp4", [DARK] * 5, fails_after=2),
        StandInFile("b.mp4", [DARK] * 5),
        output=tmp_path / "out.jsonl",
    )
    assert summary.errors == stage.status.errors == ["a.mp4: gone"]
    assert [source.frames for source in summary.sources] == [2, 5]


def test_non_finite_output_is_reported_once_and_the_run_goes_on(stage: Stage, tmp_path: Path) -> None:
    summary = stage.run(
        StandInFile("a.mp4", [DARK, 255, 255, DARK, 255, DARK]),
        StandInFile("b.mp4", [DARK] * 6),
        output=tmp_path / "out.jsonl",
    )
    own = [line["index"] for line in lines_of(tmp_path / "out.jsonl") if line["stream"] == 0]
    assert own == [0, 3, 5]
    assert summary.sources[0].non_finite == 3 and summary.sources[1].frames == 6
    assert len(stage.status.reports) == 2 and "a.mp4: frame 1: " in stage.status.reports[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_every_file(stage: Stage, tmp_path: Path, number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    summary = stage.run(
        StandInCamera("camera", 0.02, 10_000),
        output=tmp_path / "out.jsonl",
        events=tmp_path / "events.jsonl",
        record=tmp_path / "out.mp4",
        save_features=tmp_path / "out.npz",
    )
    assert summary.stopped == "stopped by user"
    assert len(lines_of(tmp_path / "out.jsonl")) == summary.frames > 3
    assert len(lines_of(tmp_path / "events.jsonl")) == 1
    assert video_frames(tmp_path / "out.mp4") >= summary.frames - 2
    assert len(np.load(tmp_path / "out.npz")["indices"]) == summary.frames
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "out.jsonl", "out.mp4", "out.npz"]
    assert signal.getsignal(number) == handler


def test_an_error_in_the_middle_finishes_the_files(stage: Stage, tmp_path: Path) -> None:
    source = StandInFile("clip.mp4", [DARK] * 9)
    original = source.read

    def read(timeout=None):
        if source.delivered == 6:
            raise RuntimeError("a bug")
        return original(timeout)

    source.read = read
    with pytest.raises(RuntimeError, match="a bug"):
        stage.run(source, output=tmp_path / "out.jsonl", record=tmp_path / "out.mp4")
    assert len(lines_of(tmp_path / "out.jsonl")) == 6
    assert video_frames(tmp_path / "out.mp4") == 6


# Files that fail


def test_a_recording_without_room_is_given_up_and_the_rest_goes_on(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("Usage", "total used free")
    free = iter([1 << 40, 1 << 40])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, next(free, 0)))
    summary = stage.run(
        StandInFile("clip.mp4", [DARK] * 50), output=tmp_path / "out.jsonl", record=tmp_path / "out.mp4"
    )
    assert len(lines_of(tmp_path / "out.jsonl")) == 50
    assert video_frames(tmp_path / "out.mp4") == 32
    assert len(summary.errors) == len(stage.status.errors) == 1
    assert str(tmp_path / "out.mp4") in summary.errors[0]


def test_a_folder_that_is_removed_costs_its_files_and_no_others(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stick").mkdir()
    looks = []

    def disk_usage(folder: Path) -> SimpleNamespace:
        looks.append(folder)
        if len(looks) == 2:
            shutil.rmtree(folder)
        if len(looks) >= 2:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder))
        return SimpleNamespace(free=1 << 40)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    summary = stage.run(
        StandInFile("clip.mp4", [DARK] * 50), output=tmp_path / "out.jsonl", record=tmp_path / "stick" / "out.mp4"
    )
    assert len(lines_of(tmp_path / "out.jsonl")) == 50
    assert len(summary.errors) == 1
    assert "out.mp4: cannot be written: No such file or directory" in summary.errors[0]


def test_a_file_that_the_system_fails_to_finish_keeps_no_other_from_being_finished(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = VideoRecorder.close

    def fail(recorder: VideoRecorder) -> None:
        if recorder.path.name == "out.0.mp4":
            raise OSError(errno.EIO, "Input/output error", "stick/out.0.mp4")
        close(recorder)

    monkeypatch.setattr(VideoRecorder, "close", fail)
    files = [StandInFile(name, [DARK] * 5) for name in ("clip.mp4", "other.mp4")]
    summary = stage.run(*files, record=tmp_path / "out.mp4", save_features=tmp_path / "out.npz")
    assert video_frames(tmp_path / "out.1.mp4") == 5
    assert [len(np.load(tmp_path / f"out.{number}.npz")["indices"]) for number in (0, 1)] == [5, 5]
    assert summary.errors == ["stick/out.0.mp4: cannot be written: Input/output error"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_run_ends_when_nothing_can_be_written_any_more(stage: Stage) -> None:
    summary = stage.run(StandInFile("clip.mp4", [DARK] * 50), output=Path("/dev/full"))
    assert summary.frames == 1 and summary.stopped == "nothing can be written any more"
    assert summary.errors == ["/dev/full: cannot be written: No space left on device"]
    assert summary.files == {} and "files" not in summary.as_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_file_that_holds_nothing_is_not_listed_and_the_others_are(stage: Stage, tmp_path: Path) -> None:
    clip = StandInFile("clip.mp4", [DARK] * 5)
    summary = stage.run(clip, events=Path("/dev/full"), output=tmp_path / "out.jsonl")
    assert summary.errors == ["/dev/full: cannot be written: No space left on device"]
    assert summary.files == {"results": [str(tmp_path / "out.jsonl")]}
    assert len(lines_of(tmp_path / "out.jsonl")) == 5


# Options that cannot be met are refused before a source is opened


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlay": "a bird", "record": "out.mp4"}, "--overlay a bird: .*dark, bright"),
        ({"overlay": "dark"}, "--overlay dark: .*--record"),
        ({"output": "nowhere/out.jsonl"}, "--output .*nowhere/out.jsonl: "),
        ({"record": "out.avi"}, r"--record .*out.avi: .*\.mp4"),
        ({"save_features": "out.txt"}, r"--save-features .*out.txt: .*\.npz"),
        ({"output": "same", "events": "same"}, "--events .*same: is also the file of --output"),
        ({"record": "clip.mp4"}, "--record .*clip.mp4: is also the file of --source"),
        ({"output": "clip.mp4"}, "--output .*clip.mp4: is also the file of --source"),
        ({"save_masks": "clip.mp4"}, "--save-masks .*clip.mp4: is also the file of --source"),
        ({"output": "same.mp4", "record": "same.mp4"}, "--record .*same.mp4: is also the file of --output"),
        ({"save_masks": "same", "output": "same"}, "--save-masks .*same: is also the file of --output"),
        ({"save_masks": "nowhere/masks"}, "--save-masks .*nowhere/masks: .*does not exist"),
        ({"output": "out", "outputs": ("depth",)}, "--outputs 'depth': .*features, pooled, scores"),
        ({"output": "out", "outputs": ("",)}, "--outputs '': .*features, pooled, scores"),
        ({"output": "out", "outputs": ("features",)}, "--outputs features: 8192 values"),
        ({"outputs": ("pooled",)}, "--outputs pooled: .*--output"),
        ({"off": 0.7}, r"--off 0.7: .*--on \(0.5\)"),
        ({"off": 0.3}, r"--off 0.3: says when segments end; add --events FILE.jsonl"),
        ({"on": 0.3, "output": "out"}, "--on 0.3: says when a label is present; add --events .*--record"),
        ({"deadline_ms": float("inf"), "record": "out.mp4"}, "--deadline-ms inf: must be finite"),
        ({"show": True}, "--show: "),
    ],
)
def test_impossible_options_are_refused(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    paths = ("output", "events", "record", "save_features", "save_masks")
    asked = {key: tmp_path / value if key in paths else value for key, value in options.items()}
    with pytest.raises(FramestepError, match=message) as caught:
        stage.run(StandInFile("clip.mp4", [DARK]), **asked)
    assert "\n" not in str(caught.value)
    assert stage.opened == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "path"),
    [
        ("output", "b.bundle/manifest.json"),
        ("output", "x/../b.bundle/labels"),
        ("events", "b.bundle/new.jsonl"),
        ("record", "b.bundle/new.mp4"),
        ("save_features", "b.bundle/new.npz"),
        ("save_masks", "b.bundle/masks"),
        ("save_masks", "b.bundle"),
    ],
)
def test_nothing_is_written_into_a_bundle(stage: Stage, tmp_path: Path, option: str, path: str) -> None:
    manifest = tmp_path / "b.bundle" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text('{"format": "framestep"}')
    with pytest.raises(FramestepError, match=f"--{option.replace('_', '-')} .*: lies in the bundle .*b.bundle"):
        stage.run(StandInFile("clip.mp4", [DARK]), **{option: tmp_path / path})
    assert stage.opened == [] and list(manifest.parent.iterdir()) == [manifest]


@pytest.mark.parametrize(("option", "name"), [("record", "pipe.mp4"), ("save_features", "pipe.npz")])
def test_no_file_takes_the_place_of_a_pipe(stage: Stage, tmp_path: Path, option: str, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(FramestepError, match=f"{name}: is a device or a pipe; name a file"):
        stage.run(StandInFile("clip.mp4", [DARK]), **{option: tmp_path / name})
    assert stage.opened == [] and (tmp_path / name).is_fifo()


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_source_under_another_name_is_not_overwritten(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clip.mp4").write_text("video")
    link(Path("other.jsonl"), Path("clip.mp4"))
    with pytest.raises(FramestepError, match="--output other.jsonl: is also the file of --source"):
        stage.run(StandInFile("clip.mp4", [DARK]), output=Path("other.jsonl"))
    assert Path("clip.mp4").read_text() == "video"


def test_masks_do_not_mix_with_older_ones(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "0.000007.png").write_text("old")
    with pytest.raises(FramestepError, match="--save-masks .*: is not empty; name a new folder"):
        stage.run(StandInFile("clip.mp4", [DARK]), save_masks=tmp_path)
    with pytest.raises(FramestepError, match="--save-masks .*: is a file; name a folder"):
        stage.run(StandInFile("clip.mp4", [DARK]), save_masks=tmp_path / "0.000007.png")


def test_more_labels_than_a_byte_holds_are_refused_for_masks(stage: Stage, tmp_path: Path) -> None:
    stage.manifest = manifest(labels=tuple(map(str, range(256))))
    with pytest.raises(FramestepError, match="--save-masks .*255 labels apart; this bundle has 256"):
        stage.run(StandInFile("clip.mp4", [DARK]), save_masks=tmp_path / "masks")


@pytest.mark.parametrize(
    "options", [{"overlay": "all", "record": "out.mp4"}, {"events": "out.jsonl"}, {"save_masks": "out.masks"}]
)
def test_what_needs_labels_is_refused_without(stage: Stage, tmp_path: Path, options: dict) -> None:
    stage.manifest = manifest(labels=())
    asked = {key: tmp_path / value if "." in value else value for key, value in options.items()}
    with pytest.raises(FramestepError, match=r"no labels.*framestep label"):
        stage.run(StandInFile("clip.mp4", [DARK]), **asked)


def test_a_source_that_does_not_open_leaves_old_results_alone(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.jsonl").write_text("old")

    def refuse(name: str, **options) -> StandInFile:
        raise SourceError(f"{name}: no such camera")

    monkeypatch.setattr(run_module, "open_source", refuse)
    with pytest.raises(SourceError, match="no such camera"):
        stage.run(StandInFile("clip.mp4", [DARK]), output=tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "old"


def test_show_says_which_opencv_opens_windows(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_windows(*_) -> None:
        raise cv2.error("not implemented")

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", no_windows)
    with pytest.raises(FramestepError, match=r"--show: .*opencv-python-headless"):
        stage.run(StandInFile("clip.mp4", [DARK]), show=True)


def test_a_key_in_the_window_stops_the_run(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = []
    monkeypatch.setenv("DISPLAY", ":0")
    for name in ("namedWindow", "destroyWindow", "destroyAllWindows"):
        monkeypatch.setattr(cv2, name, lambda *_: None)
    monkeypatch.setattr(cv2, "imshow", lambda title, picture: pictures.append(picture))
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: 1.0)
    monkeypatch.setattr(cv2, "waitKey", lambda _: ord("q") if len(pictures) == 3 else -1)
    summary = stage.run(StandInFile("clip.mp4", [DARK] * 9), show=True)
    assert summary.frames == 3 and summary.stopped == "stopped by user"


# Options on their way to the source


@pytest.mark.parametrize(("asked", "in_bundle", "expected"), [(None, 4.0, 4.0), (2.0, 4.0, 2.0), (0, 4.0, None)])
def test_the_rate_is_the_bundles_unless_asked(stage: Stage, asked, in_bundle, expected) -> None:
    stage.manifest = manifest(rate=in_bundle)
    stage.run(StandInFile("clip.mp4", [DARK]), rate=asked)
    assert stage.opened[0][1]["rate"] == expected


def test_camera_options_reach_the_source(stage: Stage) -> None:
    camera = {"width": 640, "height": 480, "camera_fps": 15.0, "fourcc": "MJPG"}
    stage.run(StandInFile("clip.mp4", [DARK]), **camera)
    assert camera.items() <= stage.opened[0][1].items()
