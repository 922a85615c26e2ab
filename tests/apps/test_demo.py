"""The demo's scenes are fair, and its model sees in them what only memory can show."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from framestep.apps import demo as demo_module
from framestep.apps.demo import MODEL, demo
from framestep.apps.demo.scenes import GRACE, LABELS, draw_scene, name_frames
from framestep.apps.run import STOPPED_BY_USER
from framestep.runtime.errors import OutputError, SourceError

MEGABYTE = 1_000_000


def test_a_scene_is_the_same_every_time_and_others_are_others() -> None:
    first, again, other = draw_scene(5, 60), draw_scene(5, 60), draw_scene(6, 60)
    np.testing.assert_array_equal(first.frames, again.frames)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert (first.frames != other.frames).any()


def test_any_size_tells_the_same_story() -> None:
    small, large = draw_scene(9, 80), draw_scene(9, 80, 160)
    np.testing.assert_array_equal(small.labels, large.labels)
    assert large.frames.shape == (80, 160, 160, 3)
    shrunk = large.frames.reshape(80, 80, 2, 80, 2, 3).mean((2, 4))[::16, ::16, ::16]
    assert np.abs(shrunk.mean() - small.frames.mean()) < 6


def test_a_frames_label_does_not_depend_on_frames_to_come() -> None:
    rng = np.random.default_rng(0)
    past, one, other = (rng.integers(0, len(LABELS), count) for count in (30, 20, 20))
    np.testing.assert_array_equal(
        name_frames(np.concatenate([past, one]))[:30], name_frames(np.concatenate([past, other]))[:30]
    )


def test_a_new_motion_gives_the_label_from_its_seventh_frame_on() -> None:
    motions = np.array([1] * 20 + [2] * 20)
    assert GRACE == 13
    assert name_frames(motions).tolist() == [1] * 26 + [2] * 14


def test_scenes_hold_every_label_and_several_events() -> None:
    labels = [draw_scene(seed, 320, 16).labels for seed in range(8)]
    assert set(np.concatenate(labels)) == set(range(len(LABELS)))
    assert all((np.diff(stream) != 0).sum() >= 5 for stream in labels)
    share = np.bincount(np.concatenate(labels)) / sum(map(len, labels))
    assert share.max() < 0.25  # no label can be guessed


def test_a_source_that_is_not_there_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file or folder"):
        demo(tmp_path / "demo", str(tmp_path / "absent.mp4"))
    assert not (tmp_path / "demo").exists()


def test_nothing_is_made_in_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "framestep"}')
    with pytest.raises(OutputError, match="--output .*: lies in the bundle"):
        demo(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("stopped", "errors", "error"),
    [
        (STOPPED_BY_USER, [], KeyboardInterrupt),
        ("every source ended", ["annotated.mp4: disk nearly full"], OutputError),
    ],
)
def test_a_run_that_was_cut_short_is_not_taken_for_whole(tmp_path: Path, monkeypatch, stopped, errors, error) -> None:
    monkeypatch.setattr(demo_module, "run", lambda *given: SimpleNamespace(stopped=stopped, errors=errors))
    with pytest.raises(error):
        demo_module._run(tmp_path / "demo.bundle", "clip.mp4", tmp_path)


def test_the_model_takes_at_most_eight_megabytes() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 8 * MEGABYTE


def test_training_was_within_its_budget_and_reached_what_it_says() -> None:
    facts = json.loads((MODEL / "training.json").read_text())
    assert facts["window"] == 16
    assert facts["accuracy"] >= 0.90
    assert facts["frames"] / facts["streams"] >= 300
    assert facts["minutes"] < 40


def test_without_memory_the_same_training_does_not_get_there() -> None:
    facts, control = (json.loads((MODEL / name).read_text()) for name in ("training.json", "training_window_1.json"))
    assert control["window"] == 1
    assert control["accuracy"] <= 0.45
    for same in ("steps", "seed", "streams", "frames"):
        assert control[same] == facts[same]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo(folder)


def test_the_demo_names_what_happens_in_the_video_that_it_annotates(made) -> None:
    folder, facts = made
    assert facts["accuracy_of_clip"] >= 0.88
    truth = (folder / "clip.labels.txt").read_text().split("\n")
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    long = [event for event in events if event["end_index"] - event["start_index"] >= 12]
    assert len(long) >= 5
    right = [truth[(event["start_index"] + event["end_index"]) // 2] == event["label"] for event in long]
    assert np.mean(right) >= 0.7


def test_int8_keeps_the_accuracy_of_the_demo_model(made) -> None:
    _, facts = made
    assert facts["accuracy"]["fp32"] >= 0.88  # compressed video of another size, none of it seen in training
    assert facts["accuracy"]["int8"] >= facts["accuracy"]["fp32"] - 0.005
    assert facts["bytes"]["int8"] < facts["bytes"]["fp32"]


def test_int8_agrees_after_a_thousand_frames_as_it_did_after_fifty(made) -> None:
    _, facts = made
    (drift,) = json.loads(Path(facts["report"]).with_suffix(".json").read_text())["drift"]
    by_age = {group["first"]: group for group in drift["groups"]}
    assert by_age[1000]["agreement"] >= by_age[50]["agreement"]
    assert by_age[1000]["cosine"] >= by_age[50]["cosine"] - 1e-3


def test_fp16_keeps_the_accuracy_of_the_demo_model(made, tmp_path) -> None:
    from framestep.apps.calibrating import CalibrateArguments, calibrate

    folder, _ = made
    arguments = CalibrateArguments(
        folder / "demo.fp32.bundle",
        tmp_path / "half.bundle",
        (str(folder / "clips"),),
        precision=("fp16",),
        drift_frames=0,
    )
    (accuracy,) = calibrate(arguments, lambda line: None)["accuracy"]
    assert accuracy["accuracy"] >= accuracy["reference_accuracy"] - 0.001


def test_the_demo_leaves_everything_it_speaks_of(made) -> None:
    _, facts = made
    for name in ("bundle", "video", "picture", "results", "events", "report"):
        assert Path(facts[name]).exists(), name
