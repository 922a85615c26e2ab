"""What is drawn onto frames."""

import numpy as np
import pytest

from framestep.apps import drawing
from framestep.apps.annotate import Annotator, Shown, check_overlay
from framestep.apps.latency import Latencies
from framestep.runtime.errors import FramestepError
from framestep.runtime.manifest import FrameSpec
from framestep.runtime.preprocess import Preprocess

LABELS = ("a cat", "a dog", "background")


def annotator(labels=LABELS, resize="crop", values=(12.0, 13.0, 40.0), **options) -> Annotator:
    latencies = Latencies()
    for value in values:
        latencies.add(value)
    return Annotator(labels, Preprocess(FrameSpec(112, 112, resize)), latencies, **options)


def shown(height=180, width=320, **results) -> Shown:
    return Shown(np.full((height, width, 3), 100, np.uint8), 7, 1.5, 12.0, **results)


@pytest.mark.parametrize(
    ("height", "width"), [(180, 320), (720, 1280), (640, 360), (7, 9), (1, 1), (31, 641), (2160, 640)]
)
def test_pictures_are_at_least_640_wide_with_even_sides_and_the_frames_aspect(height: int, width: int) -> None:
    grid = np.random.default_rng(0).random((3, 7, 7), np.float32)
    for overlay in (None, "all", "a dog"):
        picture = annotator(overlay=overlay).draw(
            shown(height, width, scores=np.array([0.1, 0.9, 0.5], np.float32), patch_scores=grid)
        )
        assert picture.dtype == np.uint8 and picture.ndim == 3
        assert picture.shape[1] >= 640 and picture.shape[0] % 2 == picture.shape[1] % 2 == 0
        assert picture.shape[0] > picture.shape[1] * height / width - 2


@pytest.mark.parametrize(("height", "width"), [(1, 400), (400, 1), (1, 3000)])
def test_slivers_of_a_picture_are_drawn_at_a_size_that_can_be_looked_at(height: int, width: int) -> None:
    grid = np.random.default_rng(0).random((3, 7, 7), np.float32)
    for overlay in (None, "all", "a dog"):
        picture = annotator(overlay=overlay).draw(
            shown(height, width, scores=np.array([0.1, 0.9, 0.5], np.float32), patch_scores=grid)
        )
        assert 2 < picture.shape[0] <= 4200 and picture.shape[1] == max(640, width)


def test_the_frame_given_is_not_changed() -> None:
    frame = shown(720, 1280, scores=np.ones(3, np.float32), patch_scores=np.ones((3, 4, 4), np.float32))
    before = frame.rgb.copy()
    annotator(overlay="all").draw(frame)
    assert np.array_equal(frame.rgb, before)


def test_a_frame_without_labels_is_left_as_it_is_above_the_strip() -> None:
    picture = annotator(labels=()).draw(shown(360, 640))
    assert (picture[:360] == 100).all()
    assert not (picture[360:] == 100).all()


def test_the_strip_shows_latency() -> None:
    quiet = annotator(labels=(), values=()).draw(shown(360, 640))[360:]
    busy = annotator(labels=()).draw(shown(360, 640))[360:]
    assert not np.array_equal(quiet, busy)


def test_a_heat_map_is_warm_where_the_label_is() -> None:
    scores = np.zeros((3, 4, 4), np.float32)
    scores[1, 3, 3] = 1.0
    picture = annotator(overlay="a dog", resize="stretch").draw(shown(720, 1280, patch_scores=scores)).astype(int)
    red_minus_blue = picture[:720, :, 2] - picture[:720, :, 0]
    assert red_minus_blue[650, 1200] > 40
    assert red_minus_blue[650, 300] <= 0


def test_nothing_is_drawn_over_what_the_model_does_not_see() -> None:
    scores = np.ones((3, 4, 4), np.float32) * 0.9
    picture = annotator(overlay="all", resize="crop").draw(shown(720, 1280, patch_scores=scores))
    assert (picture[:720, :275] == 100).all()  # the crop is the middle 720 columns of 1280
    assert (picture[:720, 1005:] == 100).all()
    assert not (picture[100:600, 300:900] == 100).any(axis=2).all()


def test_the_background_stays_clear_in_the_class_map() -> None:
    scores = np.full((3, 4, 4), 0.1, np.float32)
    scores[2] = 0.9
    inside = annotator(overlay="all", background="background", resize="stretch").draw(
        shown(720, 1280, patch_scores=scores)
    )[5:715, 5:1275]
    assert (inside == 100).all()


def test_what_the_model_did_not_see_is_left_as_it_is() -> None:
    scores = np.random.default_rng(0).random((3, 4, 4), np.float32)
    for overlay in ("all", "a dog"):
        picture = annotator(overlay=overlay).draw(shown(720, 1280, patch_scores=scores))  # sees columns 280 to 1000
        assert (picture[:720, :275] == 100).all() and (picture[:720, 1005:] == 100).all()
        assert not (picture[:720, 285:995] == 100).all(axis=2).any()


@pytest.mark.parametrize("label", ["Größe", "猫", "кот"])
def test_labels_in_any_script_are_told_apart(label: str) -> None:
    if not drawing.DRAWS_UNICODE:
        pytest.skip("this OpenCV's fonts hold ASCII only")
    scores = np.array([0.5], np.float32)
    question = annotator(labels=("?" * len(label),)).draw(shown(scores=scores))
    assert not np.array_equal(annotator(labels=(label,)).draw(shown(scores=scores)), question)


@pytest.mark.parametrize(
    ("label", "drawn"),
    [("Größe à côté", "Grosse a cote"), ("Łódź – ½", "Lodz - 1?2"), ("кот", "???"), ("a cat", "a cat")],
)
def test_an_opencv_with_ascii_fonts_draws_letters_without_their_accents(
    monkeypatch: pytest.MonkeyPatch, label: str, drawn: str
) -> None:
    monkeypatch.setattr(drawing, "DRAWS_UNICODE", False)
    scores = np.array([0.5], np.float32)
    found = annotator(labels=(label,)).draw(shown(scores=scores))
    assert np.array_equal(found, annotator(labels=(drawn,)).draw(shown(scores=scores)))


@pytest.mark.parametrize("unicode", [True, False])
def test_characters_that_cannot_be_drawn_do_no_harm(monkeypatch: pytest.MonkeyPatch, unicode: bool) -> None:
    monkeypatch.setattr(drawing, "DRAWS_UNICODE", unicode and drawing.DRAWS_UNICODE)
    labels = ("\ud800", "a\nb", "\x00", "\u202e", "🦜", "")
    annotator(labels=labels, overlay="all").draw(
        shown(scores=np.full(6, 0.5, np.float32), patch_scores=np.full((6, 2, 2), 0.5, np.float32))
    )


def test_hundreds_of_labels_and_long_names_fit() -> None:
    labels = [f"label {i} " + "with a very long name " * (i % 4) for i in range(300)]
    scores = np.random.default_rng(0).random(300, np.float32)
    grid = np.random.default_rng(0).random((300, 2, 2), np.float32)
    picture = annotator(labels, overlay="all").draw(shown(scores=scores, patch_scores=grid))
    assert picture.shape[1] == 640


def test_an_unknown_overlay_label_is_refused_with_those_there_are() -> None:
    with pytest.raises(FramestepError, match=r"--overlay a bird: .*a cat, a dog"):
        check_overlay("a bird", LABELS)
    with pytest.raises(FramestepError, match=r"--overlay all: .*no labels"):
        check_overlay("all", ())
    check_overlay("all", LABELS)
    check_overlay("a dog", LABELS)


@pytest.mark.parametrize("room", [0, 5, 40, 41, 200])
def test_a_label_of_any_length_is_cut_to_the_room_there_is(room: int) -> None:
    text = "a label that goes on " * 5000
    cut = drawing.shortened(text, 0.5, room)
    left = cut.removesuffix("...")
    assert text.startswith(left) and len(left) < 40
    assert not left or drawing.text_width(cut, 0.5) <= room
    assert drawing.text_width(text[: len(left) + 1] + "...", 0.5) > room
    assert drawing.shortened("short", 0.5, 1000) == "short"
