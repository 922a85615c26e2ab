"""Patch scores brought to the pixels of the frame, against torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from framestep.runtime.errors import FrameError
from framestep.runtime.manifest import FrameSpec
from framestep.runtime.masks import NOT_SEEN, class_map, logits, score_maps
from framestep.runtime.preprocess import Preprocess

STRETCH = Preprocess(FrameSpec(112, 112, "stretch"))


def sigmoid(values: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-values.astype(np.float64)))).astype(np.float32)


def upsampled(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    torch = pytest.importorskip("torch")
    return torch.nn.functional.interpolate(
        torch.from_numpy(grid.astype(np.float32))[None], size=(height, width), mode="bilinear", align_corners=False
    )[0].numpy()


@pytest.mark.parametrize(("height", "width"), [(112, 112), (180, 320), (97, 61), (5, 3), (1, 1)])
@pytest.mark.parametrize("grid", [(7, 7), (4, 9), (1, 1), (1, 6)])
def test_score_maps_of_a_whole_frame_are_torchs_bilinear_upsampling(height, width, grid) -> None:
    scores = np.random.default_rng(0).random((3, *grid), np.float32)
    found = score_maps(scores, height, width, STRETCH)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, upsampled(scores, height, width), atol=1e-5)


def test_the_class_map_is_the_softmax_over_upsampled_logits() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(3).normal(0, 3, (5, 6, 7)).astype(np.float32)
    found = class_map(sigmoid(values), 180, 322, STRETCH)
    expected = torch.from_numpy(upsampled(values, 180, 322)).softmax(0)
    best, index = expected.max(0)
    clear = (expected.topk(2, dim=0).values.diff(dim=0)[0].abs() > 1e-3).numpy()
    assert clear.mean() > 0.95
    assert np.array_equal(found.classes[clear], index.numpy()[clear])
    np.testing.assert_allclose(found.probability, best.numpy(), atol=1e-3)


def test_a_crop_covers_its_part_of_the_frame_and_leaves_the_rest_unseen() -> None:
    values = np.random.default_rng(1).normal(0, 2, (3, 7, 7)).astype(np.float32)
    crop = Preprocess(FrameSpec(112, 112, "crop"))
    assert crop.region(224, 448) == (0, 112, 224, 224)
    maps = score_maps(sigmoid(values), 224, 448, crop)
    np.testing.assert_allclose(maps[:, :, 112:336], upsampled(sigmoid(values), 224, 224), atol=1e-5)
    assert np.isnan(maps[:, :, :112]).all() and np.isnan(maps[:, :, 336:]).all()
    found = class_map(sigmoid(values), 224, 448, crop)
    assert (found.classes[:, 112:336] == upsampled(values, 224, 224).argmax(0)).mean() > 0.999
    unseen = np.ones((224, 448), bool)
    unseen[:, 112:336] = False
    assert (found.classes[unseen] == NOT_SEEN).all() and (found.probability[unseen] == 0).all()
    assert (found.classes[~unseen] >= 0).all()


def test_the_bars_of_a_letterbox_are_left_out() -> None:
    scores = np.random.default_rng(1).random((3, 7, 7), np.float32)
    letterbox = Preprocess(FrameSpec(112, 112, "letterbox"))
    assert letterbox.region(224, 448) == (-112, 0, 448, 448)
    maps = score_maps(scores, 224, 448, letterbox)
    np.testing.assert_allclose(maps, upsampled(scores, 448, 448)[:, 112:336], atol=1e-5)
    assert (class_map(scores, 224, 448, letterbox).classes >= 0).all()


def test_a_map_can_be_smaller_than_the_frame() -> None:
    scores = np.random.default_rng(1).random((3, 7, 7), np.float32)
    crop = Preprocess(FrameSpec(112, 112, "crop"))
    maps = score_maps(scores, 720, 1440, crop, size=(56, 112))
    np.testing.assert_allclose(maps[:, :, 28:84], upsampled(scores, 56, 56), atol=1e-5)
    assert np.isnan(maps[:, :, :28]).all() and np.isnan(maps[:, :, 84:]).all()


def test_labels_that_are_all_unlikely_are_still_told_apart() -> None:
    # SigLIP's bias near -13 puts every patch that does not match there
    values = np.array([-18, -17, -20], np.float32)[:, None, None] * np.ones((1, 4, 4), np.float32)
    found = class_map(sigmoid(values), 32, 32, STRETCH)
    assert (found.classes == 1).all()
    np.testing.assert_allclose(found.probability, 1 / (1 + np.exp(-1) + np.exp(-3)), rtol=1e-4)


def test_logits_undo_the_sigmoid() -> None:
    values = np.array([-80, -40, -18, -1, 0, 1, 8, 12], np.float32)
    np.testing.assert_allclose(logits(sigmoid(values)), values, rtol=2e-3)


def test_scores_that_were_rounded_to_0_or_1_are_borne() -> None:
    scores = np.stack([np.ones((2, 2)), np.zeros((2, 2)), np.full((2, 2), 1e-42)]).astype(np.float32)
    found = class_map(scores, 8, 8, STRETCH)
    assert (found.classes == 0).all() and np.isfinite(found.probability).all()


def test_hundreds_of_labels_are_worked_through_in_pieces() -> None:
    values = np.random.default_rng(0).normal(0, 3, (300, 4, 4)).astype(np.float32)
    found = class_map(sigmoid(values), 60, 2000, STRETCH)
    assert (found.classes == upsampled(values, 60, 2000).argmax(0)).mean() > 0.99


def test_scores_of_another_shape_are_an_error() -> None:
    with pytest.raises(FrameError, match=r"\[labels, grid_h, grid_w\], found \[3, 49\]"):
        class_map(np.zeros((3, 49), np.float32), 8, 8, STRETCH)


def test_masks_need_numpy_alone() -> None:
    script = (
        "import sys; import framestep.runtime.masks; "
        "print([name for name in ('cv2', 'torch', 'onnxruntime', 'rich', 'typer') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
