"""The synthetic source and its ground truth."""

from __future__ import annotations

import numpy as np
import pytest

from framestep.runtime.errors import SourceError
from framestep.runtime.sources import MOTIONS, SyntheticSource, open_source


def opened(spec: str) -> SyntheticSource:
    source = open_source(spec)
    assert isinstance(source, SyntheticSource)
    return source


def test_options_set_the_scene() -> None:
    source = opened("synthetic:seed=3,frames=30,width=64,height=48,fps=10")
    frames = list(source)
    assert [frame.index for frame in frames] == list(range(30))
    assert [frame.timestamp for frame in frames] == [index / 10 for index in range(30)]
    assert {(frame.rgb.shape, frame.rgb.dtype.name) for frame in frames} == {((48, 64, 3), "uint8")}
    assert (source.fps, source.length, source.live, source.ended) == (10.0, 30, False, True)
    assert opened("synthetic").length == 300


def test_the_same_seed_gives_the_same_frames_and_truth() -> None:
    first, second, other = (opened(f"synthetic:frames=100,seed={seed}") for seed in (3, 3, 4))
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.rgb, b.rgb)
    assert [first.truth(i) for i in range(100)] == [second.truth(i) for i in range(100)]
    assert [first.truth(i) for i in range(100)] != [other.truth(i) for i in range(100)]


@pytest.mark.parametrize("seed", range(6))
def test_the_shape_is_in_its_box_and_fills_it(seed: int) -> None:
    source = opened(f"synthetic:frames=400,seed={seed},width=160,height=120")
    frames = np.stack([frame.rgb for frame in source])
    # The shapes are coloured and the background is grey.
    coloured = np.ptp(frames.astype(int), axis=3) > 40
    for index in range(0, 400, 7):
        left, top, right, bottom = source.truth(index).box
        rows, columns = np.nonzero(coloured[index])
        assert left <= columns.min() <= left + 4
        assert top <= rows.min() <= top + 4
        assert right - 5 <= columns.max() < right
        assert bottom - 5 <= rows.max() < bottom


def test_labels_name_the_motion_that_the_boxes_make() -> None:
    source = opened("synthetic:frames=3000,seed=1")
    truths = [source.truth(index) for index in range(3000)]
    centres = np.array([((t.box[0] + t.box[2]) / 2, (t.box[1] + t.box[3]) / 2) for t in truths])
    widths = np.array([t.box[2] - t.box[0] for t in truths])
    seen = set()
    for start, end in segments([t.label for t in truths]):
        if end - start < 15:  # cut off by the end of the scene
            continue
        label = truths[start].label
        seen.add(label)
        dx, dy = centres[end - 1] - centres[start]
        growth = widths[end - 1] / widths[start]
        path = centres[start:end:4]
        steps = np.diff(path, axis=0)
        turn = np.sum(steps[:-1, 0] * steps[1:, 1] - steps[:-1, 1] * steps[1:, 0])
        expected = {
            "still": abs(dx) < 1 and abs(dy) < 1 and growth == 1,
            "left": dx < -20 and abs(dy) < 2,
            "right": dx > 20 and abs(dy) < 2,
            "up": dy < -20 and abs(dx) < 2,
            "down": dy > 20 and abs(dx) < 2,
            "growing": growth > 1.1,
            "shrinking": growth < 0.9,
            "clockwise": turn > 0,
            "anticlockwise": turn < 0,
        }
        assert expected[label], (label, dx, dy, growth, turn)
    assert seen == set(MOTIONS)


def test_no_frame_is_prepared_before_it_is_asked_for() -> None:
    source = opened("synthetic:frames=1000000,seed=2")
    assert source.read().index == 0 and source._choreography._known < 100
    short = opened("synthetic:frames=300,seed=2")
    assert [source.truth(index) for index in (299, 0, 150)] == [short.truth(index) for index in (299, 0, 150)]


def segments(labels: list[str]) -> list[tuple[int, int]]:
    starts = [0, *(i for i in range(1, len(labels)) if labels[i] != labels[i - 1])]
    return list(zip(starts, [*starts[1:], len(labels)], strict=True))


def test_truth_is_known_for_any_frame_of_the_scene_and_no_other() -> None:
    source = opened("synthetic:frames=5")
    assert source.truth(4).label in MOTIONS
    for index in (-1, 5):
        with pytest.raises(IndexError):
            source.truth(index)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("speed=3", "unknown option 'speed'; the options are seed, frames, width, height, fps"),
        ("frames=many", "frames is 'many'"),
        ("frames=0", "frames is 0: must be at least 1"),
        ("width=4", "width is 4: must be at least 16"),
        ("width=100000000", "width is 100000000: must be at most 16384"),
        ("frames=1000000000000", "frames is 1000000000000: must be at most 1000000"),
        ("fps=1e12", "fps is 1e+12: must be greater than 0 and at most 1000"),
        ("fps=nan", "fps is nan: must be greater than 0"),
        ("fps=0", "fps is 0: must be greater than 0"),
        ("seed=-1", "seed is -1"),
    ],
)
def test_impossible_option_is_an_error_that_names_it(options: str, complaint: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(f"synthetic:{options}")
    assert complaint in str(caught.value)
    assert f"synthetic:{options}" in str(caught.value)
